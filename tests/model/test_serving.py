"""rlnb.model.serving: a real process each time, and once the real server with OpenAI's own client."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny

from rlnb.model import sampling, serving
from rlnb.model.load import load_model
from rlnb.tools.setup import ROOT

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
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def started(monkeypatch):
    """The processes that `serve` starts."""
    found, right = [], serving.subprocess.Popen

    def start(*args, **options):
        found.append(right(*args, **options))
        return found[-1]

    monkeypatch.setattr(serving.subprocess, "Popen", start)
    return found


@pytest.fixture
def program(monkeypatch, started):
    """Any Python program in the server's place; it gets the port."""

    def use(code):
        monkeypatch.setattr(
            serving, "_command", lambda model, port: [sys.executable, "-c", code, str(port)]
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


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json"), serving.serve(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
def test_a_server_ends_with_the_process_that_started_it(folder, tmp_path):
    """However that ends: here by a signal that nobody can catch, as when a kernel is killed."""
    (tmp_path / "ready.py").write_text(READY)
    code = (
        "import sys, time; from rlnb.model import serving\n"
        "serving._command = lambda model, port: ["
        "sys.executable, '-c', serving.WATCHDOG, 'ready', str(port)]\n"
        f"with serving.serve({str(folder)!r}) as server: print(server.url, flush=True); input()"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = next(line for line in parent.stdout if line.startswith("http"))  # without Unsloth rlnb says so first
    health = url.strip().replace("/v1", "/health")
    assert urllib.request.urlopen(health).status == 200
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert gone(health)


def gone(url, seconds=20):
    """Whether nobody answers there any more, after some time at most."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url)
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_real_server_answers_a_chat_call_as_sample_does(folder, started, monkeypatch, tmp_path):
    """And is gone after a call that raises; on the way it has asked nobody for updates."""
    import openai

    monkeypatch.setenv("HF_HOME", str(tmp_path))  # where it would note that it has asked
    with pytest.raises(openai.APIStatusError), serving.serve(folder) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        call = {"model": server.model, "temperature": 0, "max_tokens": 12}
        answer = client.chat.completions.create(messages=CHAT, **call)
        client.chat.completions.create(messages="no messages", **call)
    assert started[0].poll() is not None
    assert gone(server.url.replace("/v1", "/health"), seconds=1)
    if hasattr(os, "killpg"):
        with pytest.raises(ProcessLookupError):  # not one of its group is left
            os.killpg(started[0].pid, 0)
    assert not list(tmp_path.rglob(".check_for_update*"))
    model, tokenizer = load_model(folder)
    ours = sampling.sample(
        model, tokenizer, [CHAT], max_new_tokens=12, temperature=0, progress=False
    )
    assert answer.choices[0].message.content == ours.texts[0][0]
