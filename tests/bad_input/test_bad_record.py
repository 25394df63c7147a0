"""Bad input to rlnb.record and rlnb.show: what the message must say."""

import json
import math

import pytest
from clear import cases, check, environment, inside

from rlnb.measure.intervals import Proportion
from rlnb.record import runs
from rlnb.show import labelling, plots
from rlnb.show.panel import Panel

GOOD = {"schema": 1, "id": "x", "method": "dpo", "started": "2026-11-20T12:00:00+00:00", "status": "done"}
BROKEN = {  # run.json, by the folder's name
    "cut": json.dumps(GOOD)[:40],
    "empty": "",
    "list": "[1, 2]",
    "null": "null",
    "future": json.dumps(GOOD | {"schema": 99}),
    "foreign": json.dumps({"name": "wandb", "state": "finished"}),
    "bytes": "\x00\x01",
    "method": json.dumps(GOOD | {"method": 5}),
    "config": json.dumps(GOOD | {"config": [1]}),
    "result": json.dumps(GOOD | {"result": "0.5"}),
    "seed": json.dumps(GOOD | {"seed": "zero"}),
    "started": json.dumps(GOOD | {"started": None}),
    "missing": json.dumps({"schema": 1, "id": "x"}),
}
ROW = {"id": "a", "question": "1 and 2", "answer": 3, "prompt": [{"role": "user", "content": "?"}],
       "responses": ["3", "4"]}  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with a registry of broken runs, one that is done, and one that has failed."""
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLNB_RUNS", str(folder / "runs"))
        for name, text in BROKEN.items():
            (folder / "runs" / name).mkdir(parents=True)
            (folder / "runs" / name / "run.json").write_text(text)
        (folder / "runs" / "done").mkdir()
        (folder / "runs" / "done" / "run.json").write_text(json.dumps(GOOD))
        (folder / "file").write_text("text")
        yield folder


def logged(step=None, **values):
    def call(house):
        run = runs.load("done")
        run.log(step, **values)

    return call


def start(method, **more):
    return lambda house: inside(runs.start(method, **more), print)


def kept_in(place, **more):
    return lambda house: inside(environment(RLNB_RUNS=house / place), lambda: inside(runs.start("sft"), print))


@cases(
    *((lambda house, name=name: runs.load(name), ValueError, f"{name}/run.json is broken") for name in BROKEN),
    (lambda house: runs.load("future"), ValueError, "future/run.json is broken: it is not of schema 1"),
    (lambda house: runs.load("foreign"), ValueError, "foreign/run.json is broken: it is not of schema 1"),
    (lambda house: runs.load("config"), ValueError, "config/run.json is broken: config is [1]"),
    (lambda house: runs.load("seed"), ValueError, "seed/run.json is broken: seed is 'zero'"),
    (lambda house: runs.load("missing"), ValueError, "missing/run.json is broken", "'method'"),
    (lambda house: runs.load("gone"), FileNotFoundError, "no run 'gone' in", "the newest are: done"),
    (lambda house: runs.load(""), FileNotFoundError, "no run '' in", "the newest are: done"),
    (lambda house: runs.load("../file"), FileNotFoundError, "no run '../file' in", "the newest are: done"),
    (start("my run"), ValueError, "method is 'my run'", "letters, digits, '-' and '_' only"),
    (start(""), ValueError, "method is ''", "letters, digits"),
    (start("../sft"), ValueError, "method is '../sft'", "letters, digits"),
    (start("-sft"), ValueError, "method is '-sft'", "letters, digits"),
    (start("späße"), ValueError, "method is 'späße'", "letters, digits"),
    (kept_in("file"), OSError, "no run can be kept in", "house", "Make room there, or set RLNB_RUNS"),
    (kept_in("file/runs"), OSError, "no run can be kept in", "Make room there, or set RLNB_RUNS"),
    (logged(1, loss="low"), TypeError, "log: loss='low' is no number", "results go to finish()"),
    (logged(1, loss=None), TypeError, "log: loss=None is no number"),
    (logged(1, loss=[1.0]), TypeError, "log: loss=[1.0] is no number"),
    (logged(1, loss={"a": 1}), TypeError, "log: loss={'a': 1} is no number"),
    (logged(1, loss=1.0, name="dpo", kind="x"), TypeError, "name='dpo', kind='x' is no number"),
    (logged("one", loss=1.0), TypeError, "log: step='one' is no number"),
)
@pytest.mark.filterwarnings("ignore:skipped broken run")
def test_of_a_registry(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)


def test_one_warning_names_all_broken_runs_and_the_others_are_found(house):
    with pytest.warns(UserWarning, match=r"skipped broken run\(s\)") as told:
        assert [run.id for run in runs.find()] == ["done"]
    assert len(told) == 1 and all(f"/{name}/run.json" in str(told[0].message) for name in BROKEN)


# --- figures -------------------------------------------------------------------------------------

ROWS = [{"step": 1, "loss": 0.5, "reward": math.nan}]


def lines(series, **more):
    return lambda house: plots.lines(series, **{"xlabel": "x", "ylabel": "y"} | more)


@cases(
    (lambda house: plots.curves(ROWS, "los"), ValueError, "no run has logged ['los']", "logged: loss, reward, step"),
    (lambda house: plots.curves([], "loss"), ValueError, "no run has logged ['loss']"),
    (lambda house: plots.curves({"a": ROWS, "b": []}, ("loss", "kl")), ValueError, "no run has logged ['kl']"),
    (lambda house: plots.bars({"SFT": 53.0}), ValueError, "(53.0, 53.0, 53.0)", "shares in [0, 1], not percent"),
    (lambda house: plots.bars({"SFT": (0.5, -0.2, 0.6)}), ValueError, "(0.5, -0.2, 0.6)", "shares in [0, 1]"),
    (lambda house: plots.bars({"SFT": math.nan}), ValueError, "nan", "shares in [0, 1]"),
    (lambda house: plots.by_kind({"SFT": {"gain": 90}}), ValueError, "(90, 90, 90)", "shares in [0, 1]"),
    (lines({"SFT": [(1, 70)]}, percent=True), ValueError, "(70, 70, 70)", "shares in [0, 1]"),
)
def test_of_a_figure(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)


# --- labelling -----------------------------------------------------------------------------------


def session(rows=(ROW,), annotator="anna", path="labels.jsonl"):
    return labelling.Session(rows, annotator, path)


def answered(house, *choices):
    mine = session(annotator=f"anna{len(choices)}", path=house / "new")
    for choice in choices:
        mine.choose(choice)


@cases(
    (lambda house: session(annotator=""), ValueError, "annotator is ''", "use letters, digits"),
    (lambda house: session(annotator="a/b"), ValueError, "annotator is 'a/b'", "use letters, digits"),
    (lambda house: session(annotator="x" * 65), ValueError, "annotator is 'xxx", "use letters, digits"),
    (lambda house: session(rows=[]), ValueError, "none of the 0 rows has two different responses"),
    (lambda house: session(rows=[ROW | {"responses": ["3"]}]), ValueError, "none of the 1 rows has two different"),
    (lambda house: session(rows=[ROW | {"responses": ["3", "3"]}]), ValueError,
     "none of the 1 rows has two different"),
    (lambda house: session(rows=[ROW | {"responses": ["3", " "]}]), ValueError, "two different responses to compare"),
    (lambda house: session(path=house / "file" / "new.jsonl"), OSError, "file"),
    (lambda house: session(path=house / "file"), OSError, "file"),
)
def test_of_labels(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)


def test_of_answers(house):
    mine = session(path=house / "answers")
    check(lambda: mine.choose("middle"), ValueError, ["the answer is 'middle'", "left, right, tie, skip"], folder=house)
    check(lambda: mine.choose(None), ValueError, ["the answer is None", "left, right, tie, skip"], folder=house)
    check(mine.undo, ValueError, ["anna has answered nothing that could be taken back"], folder=house)
    mine.choose("left")
    check(lambda: mine.choose("left"), ValueError, ["all 1 items are answered", "undo() takes one back"], folder=house)


# --- the panel -----------------------------------------------------------------------------------


def panel(method="dpo", **given):
    return lambda house: Panel(method, **given)


def moved(**values):
    return lambda house: Panel("grpo").set(**values)


@cases(
    (panel("dqn"), ValueError, "no recipe for 'dqn'", "there are sft, reward_model"),
    (panel(bta=1.0), TypeError, "DPOConfig", "unexpected keyword argument 'bta'"),
    (panel(start="no/such/folder"), FileNotFoundError, "no adapter 'no/such/folder'", "is no folder"),
    (lambda house: Panel("dpo", start=house / "runs"), FileNotFoundError, "is not an adapter", "adapter_config.json"),
    (moved(bta=1.0), ValueError, "no knob bta", "there are", "rank"),
)
@pytest.mark.filterwarnings("ignore:skipped broken run")
def test_of_a_panel(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)


@pytest.mark.parametrize(("knobs", "words"), [
    ({"rank": 256}, "LoRA rank 256 is above max_lora_rank 64"),
    ({"rank": 512, "max_lora_rank": 512}, "LoRA rank 512 is above"),
    ({"max_lora_rank": 0}, "max_lora_rank is 0"),
    ({"per_device_train_batch_size": 3}, "num_generations"),
    ({"num_generations": 1}, "at least 2 generations per prompt"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:skipped broken run")
def test_a_panel_says_why_it_does_not_run(knobs, words, house):
    mine = Panel("grpo")
    mine.set(**knobs)
    assert not mine.run() and words in mine.status.value.replace("&#x27;", "'") and words in mine.problem()


def test_a_good_interval_is_drawn():
    assert plots.bars({"SFT": Proportion(5, 10)})
