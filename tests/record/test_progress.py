"""rlnb.record.progress: where a training shows itself, and what it prints in a terminal."""

import subprocess
import sys
import threading

import pytest

from rlnb.record import progress

DPO = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm")


def rows(n, names=("loss",)):
    return [{"step": i + 1, "seconds": 0.5 * (i + 1)} | dict.fromkeys(names, 1 / (i + 1)) for i in range(n)]


@pytest.fixture(autouse=True)
def default_screen(monkeypatch):
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.setattr(progress, "_default", progress.Lines)


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        (DPO, ["loss", "rewards/accuracies", "logps/chosen", "logps/rejected"]),
        (("loss", "mean_token_accuracy", "entropy"), ["loss", "mean_token_accuracy"]),
        (("loss", "accuracy", "margin"), ["loss", "accuracy"]),
        (("loss", "logps/chosen", "logps/rejected"), ["loss", "logps/chosen", "logps/rejected"]),
        (("loss", "reward", "reward_std", "entropy"), ["reward", "reward_std"]),
        (("loss", "reward", "reward_std", "kl"), ["reward", "kl"]),
        (("train_runtime", "epoch"), []),
    ],
)
def test_each_method_has_its_curves(logged, expected):
    assert progress.metrics(logged) == progress.metrics(iter(logged)) == expected


def test_a_terminal_gets_some_ten_lines(capsys):
    screen, curve = progress.Lines(), rows(64, DPO)
    for n in range(1, 65):
        screen.show(curve[:n], 64)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0].startswith("step  1 of 64, 0.5 s: loss 1, rewards/accuracies 1")
    assert lines[-1].startswith("step 64 of 64, 32.0 s: loss 0.01562")


def test_a_screen_is_that_of_the_thread_and_of_the_innermost_block():
    outer, inner, elsewhere = progress.Screen(), progress.Screen(), []
    with progress.on(outer):
        thread = threading.Thread(target=lambda: elsewhere.append(progress.current_screen()))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), progress.on(inner):
            assert progress.current_screen() is inner
            raise RuntimeError
        assert progress.current_screen() is outer
    assert [type(elsewhere[0]), type(progress.current_screen())] == [progress.Lines] * 2


def test_each_training_gets_a_default_screen_of_its_own_but_not_under_rlnb_run(monkeypatch):
    class Cell(progress.Screen):
        pass

    progress.set_default(Cell)
    first, second = progress.current_screen(), progress.current_screen()
    assert type(first) is type(second) is Cell and first is not second
    monkeypatch.setenv("RLNB_NOTEBOOK", "05_dpo")
    assert type(progress.current_screen()) is progress.Lines
    with progress.on(first):
        assert progress.current_screen() is first


def test_a_stop_is_an_interrupt():
    assert issubclass(progress.Stopped, KeyboardInterrupt)


def test_the_record_is_light():
    code = "import sys; from rlnb.record import diagnose, progress, runs, values; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "trl", "peft", "datasets", "numpy", "pandas"} & set(loaded)
