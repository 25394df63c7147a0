"""rlnb.serving: a real process each time; the chat call where `transformers serve` is installed."""

import importlib.util
import json
import os
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny

from rlnb import models, sampling, serving

READY = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
CHAT = [{"role": "user", "content": "Anna has 12 apples and buys 5 more. How many?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models.backend()
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def program(monkeypatch):
    """Any Python program in the server's place; it gets the port."""

    def use(code):
        started = []
        right = serving.subprocess.Popen

        def note(*args, **options):
            started.append(right(*args, **options))
            return started[-1]

        monkeypatch.setattr(serving.subprocess, "Popen", note)
        monkeypatch.setattr(
            serving, "_server_command", lambda model, port: [sys.executable, "-c", code, str(port)]
        )
        return started

    return use


def test_it_waits_until_ready_and_stops_what_it_started(folder, program):
    started = program(READY)
    with serving.serve(folder, timeout=60) as server:
        assert server.model == str(folder)
        health = server.url.replace("/v1", "/health")
        assert urllib.request.urlopen(health).status == 200
        assert started[0].poll() is None
    assert started[0].poll() is not None
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(health)


def test_an_error_inside_stops_it_too(folder, program):
    started = program(READY)
    with pytest.raises(ZeroDivisionError), serving.serve(folder, timeout=60):
        _ = 1 / 0
    assert started[0].poll() is not None


def test_a_server_that_ends_shows_the_end_of_its_log(folder, program):
    program("import sys; print('line 1'); sys.exit('no such model')")
    with (
        pytest.raises(RuntimeError, match=r"ended with status 1: (.*\n)*.*no such model"),
        serving.serve(folder, timeout=60),
    ):
        pass


def test_a_server_that_is_never_ready_is_stopped(folder, program):
    started = program("import time; print('loading', flush=True); time.sleep(600)")
    before = time.monotonic()
    with (
        pytest.raises(TimeoutError, match=r"not ready within 3 s: its log ends\nloading"),
        serving.serve(folder, timeout=3),
    ):
        pass
    assert started[0].poll() is not None
    assert time.monotonic() - before < 60


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(serving, "NEEDED", ("json", "no_such_package"))
    with (
        pytest.raises(ImportError, match=r'needs no_such_package, .* "transformers\[serving\]"'),
        serving.serve(folder),
    ):
        pass


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json"), serving.serve(tmp_path):
        pass


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in serving.NEEDED),
    reason="transformers[serving] is not installed",
)
def test_a_real_server_answers_a_chat_call_as_sample_does(folder):
    with serving.serve(folder) as server:
        body = {"model": server.model, "messages": CHAT, "temperature": 0, "max_tokens": 12}
        request = urllib.request.Request(
            server.url + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    model, tokenizer = models.load_model(folder)
    ours = sampling.sample(
        model, tokenizer, [CHAT], max_new_tokens=12, temperature=0, progress=False
    )
    assert answer["choices"][0]["message"]["content"] == ours.texts[0][0]
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
