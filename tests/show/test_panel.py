"""The training panel, driven as a reader drives it but without a screen: its widgets are set, its
buttons clicked. Runs are real ones of the practice model, of a few steps.
"""

import itertools
import json
import os
import re
import signal
import threading
import time

import pytest

from rlnb.show import forecast, live, run_table, widgets
from rlnb.record import runs
from rlnb.train import recipes, methods as training
from rlnb.model import memory, load as models
from rlnb.show.panel import Panel


@pytest.fixture(autouse=True)
def smoke(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.setenv("RLNB_NOTEBOOK", "02_sft")
    monkeypatch.delenv("RLNB_MODEL", raising=False)


def until(holds, seconds=60):
    """Waits for what a thread does."""
    for _ in range(seconds * 50):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def record(method="sft", strict=None, seconds=4.0, step=0.5, **changes):
    """A run as the registry has it, without a training: `seconds` long, `step` seconds a step."""
    recipe = recipes.recipe(method, **changes)
    model = recipes.model_name()
    with runs.start(method, model=model, config=recipe, seed=0) as run:
        for n in range(1, recipe.steps + 1):
            run.log(n, loss=1 / n, mean_token_accuracy=0.5)
        if strict is not None:
            run.finish(strict={"k": strict, "n": 100})
    lines = [row | {"seconds": 1 + step * i} for i, row in enumerate(run.curve())]
    (run.folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": seconds}))
    return runs.load(run.id)


def cells(panel):
    """The table's rows as text, from left to right, and its buttons."""
    width = len(run_table.COLUMNS) + 2
    children = panel.table.box.children
    found = [children[i : i + width] for i in range(0, len(children), width)]
    return [[getattr(c, "value", None) or getattr(c, "description", "") for c in row] for row in found]


def plain(html):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html)).strip()


# --- knobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", training.METHODS)
def test_each_method_gets_its_own_knobs(method):
    panel = Panel(method, trials=False)
    own = {"sft": {"demonstrations"}, "dpo": {"pairs", "beta"}, "grpo": {"group", "temperature"},
           "ppo": {"kl_coef", "epochs"}}.get(method, set())  # fmt: skip
    assert {"rank", "max_lora_rank", "learning_rate", "steps", "batch", "seed"} | own <= set(panel.knobs)
    assert panel.recipe == recipes.recipe(method)
    assert all(knob.description and len(knob.options) > 1 for knob in panel.knobs.values())
    assert panel.problems() == {} and not panel.buttons["run"].disabled


def test_a_rate_is_moved_on_a_log_scale():
    rates = [value for _, value in Panel("sft", trials=False).knobs["learning_rate"].options]
    assert all(1.1 < b / a < 1.8 for a, b in itertools.pairwise(rates))
    assert rates[0] <= 2e-5 and rates[-1] >= 0.05


def test_ranks_are_those_that_the_model_permits():
    panel = Panel("sft", trials=False)
    assert [value for _, value in panel.knobs["rank"].options] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert forecast.narrowest("abacus-3m") == 128


def test_an_invalid_pair_of_ranks_is_said_at_the_slider_and_does_not_run():
    panel = Panel("sft", trials=False)
    panel.knobs["rank"].value = 128
    assert "LoRA rank 128 is above max_lora_rank 64" in panel.notes["rank"].value
    assert panel.buttons["run"].disabled and not panel.run() and panel.ended.is_set()
    panel.knobs["max_lora_rank"].value = 128
    assert panel.notes["rank"].value == "" and not panel.buttons["run"].disabled
    panel.knobs["max_lora_rank"].value = 8
    assert "LoRA rank 128 is above max_lora_rank 8" in panel.notes["rank"].value
    panel.reset()
    assert panel.recipe == recipes.recipe("sft") and panel.notes["rank"].value == ""


def test_settings_that_exclude_each_other_are_said_too():
    panel = Panel("grpo", trials=False)
    panel.knobs["batch"].value = 8
    panel.knobs["group"].value = 32
    assert "batch=8" in panel.notes["batch"].value and panel.buttons["run"].disabled
    assert not panel.run() and "batch=8" in panel.status.value


def test_knobs_take_what_they_do_not_offer():
    panel = Panel("sft", recipe=recipes.recipe("sft", steps=7), seed=23, trials=False)
    assert panel.knobs["steps"].value == 7 and panel.knobs["seed"].value == 23
    panel.set(learning_rate=1.234e-3, steps=3)
    assert panel.recipe.learning_rate == 1.234e-3 and panel.recipe.steps == 3
    with pytest.raises(KeyError):
        panel.set(warp=9)


# --- forecast ------------------------------------------------------------------------------------


def test_trainable_parameters_are_told_exactly_at_every_move():
    panel = Panel("sft", trials=False)
    for rank in (1, 8, 128):
        panel.set(rank=rank, max_lora_rank=128)
        model, _ = models.load_model("abacus-3m", models.LoRA(rank=rank), max_lora_rank=128)
        assert f"trains {models.trainable(model)[0]:,} parameters" in plain(panel.costs.value)


def test_time_comes_from_earlier_runs_and_grows_with_the_steps():
    panel = Panel("sft", trials=False)
    assert "not known yet" in panel.costs.value
    record(seconds=3.0, step=0.5, steps=4, strict=50)  # 0.5 before, 4 steps, 0.5 after, for 16 problems
    panel = Panel("sft", trials=False)
    panel.set(steps=100)
    cost = forecast.forecast(panel.recipe)
    assert cost.step == pytest.approx(0.5) and cost.seconds == pytest.approx(0.5 + 50 + 0.5) and cost.exact
    assert "takes 51 s , 100 steps of 0.5 s" in plain(panel.costs.value)
    panel.set(batch=64)
    cost = forecast.forecast(panel.recipe)
    assert cost.step == pytest.approx(2.0) and not cost.exact
    assert "from runs of other sizes" in panel.costs.value


def test_timings_are_of_this_model_profile_method_and_of_runs_that_ended_well(monkeypatch):
    run = record(seconds=3.0, steps=4)
    assert len(forecast.timings("sft")) == len(forecast.timings(None)) == 1
    assert forecast.timings("dpo") == []
    monkeypatch.setenv("RLNB_MODEL", "other")
    assert forecast.timings("sft") == []
    monkeypatch.delenv("RLNB_MODEL")
    for change in ({"status": "interrupted"}, {"profile": "cpu"}, {"machine": {"platform": "other"}}):
        file = run.folder / "run.json"
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | change))
        assert forecast.timings("sft") == []
        file.write_text(before)
    assert len(forecast.timings("sft")) == 1


def test_a_kl_makes_other_steps_and_a_learning_rate_does_not():
    record("grpo", seconds=5.0, steps=4)
    assert forecast.forecast(recipes.recipe("grpo", learning_rate=1e-5, steps=9)).exact
    assert not forecast.forecast(recipes.recipe("grpo", beta=0.1)).exact


def test_memory_grows_with_batch_and_rank_and_holds_what_the_process_has():
    small, large = (forecast.forecast(recipes.recipe("dpo", batch=b)) for b in (4, 64))
    assert large.memory > 4 * small.memory
    assert small.peak - small.memory > 50 * memory.MB
    wide = forecast.forecast(recipes.recipe("dpo", batch=4, rank=64))
    assert wide.memory > small.memory and wide.trainable == 4 * small.trainable


def test_a_move_far_from_all_timings_has_some_steps_timed():
    panel = Panel("sft")
    panel.box._view_count = 1  # a front end shows it
    until(lambda: "steps of" in panel.costs.value)
    (trial,) = runs.all(runs.root() / ".trials")
    assert trial.status == "done" and not trial.adapter.exists() and runs.all() == []
    assert forecast.forecast(panel.recipe).exact
    panel.knobs["learning_rate"].value = 1e-3
    assert not panel.trial.timer.is_alive()


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_from_click_to_table():
    panel = Panel("sft", trials=False)
    panel.set(learning_rate=1e-3, steps=4, rank=8)
    panel.buttons["run"].click()
    assert panel.buttons["run"].disabled and not panel.buttons["stop"].disabled
    until(panel.ended.is_set)
    run = panel.last
    assert run.status == "done" and run.adapter.is_dir() and len(run.curve()) >= 4
    assert run.config["rank"] == 8 and run.config["learning_rate"] == 1e-3
    assert run.notebook == "02_sft"
    assert run_table.held_out(run) in panel.status.value and "%" in panel.status.value
    assert "<svg" in panel.plot.value
    header, row = cells(panel)
    assert [plain(name) for name in header[1:7]] == ["run ▾", *list(run_table.COLUMNS)[1:]]
    assert plain(row[3]) == run_table.held_out(run) and plain(row[6]) == "done"
    assert not panel.buttons["run"].disabled and panel.buttons["stop"].disabled
    assert "parameters" in panel.said  # load_model's line, which nobody printed into a cell


def test_the_kernel_is_free_and_a_second_run_is_refused(capsys):
    panel, other = Panel("sft", trials=False), Panel("orpo", trials=False)
    panel.set(steps=100)
    assert panel.run()
    until(lambda: panel.rows)
    print("meanwhile")
    assert not panel.run() and not other.run()
    assert "A run is going in this kernel" in other.notes["batch"].value
    assert other.ended.is_set() and other.last is None
    panel.buttons["stop"].click()
    panel.wait()
    assert capsys.readouterr().out == "meanwhile\n"


def test_stop_keeps_what_was_learnt():
    panel = Panel("dpo", trials=False, start="base")
    panel.set(steps=200)
    panel.run()
    until(lambda: len(panel.rows) >= 2)
    panel.stop()
    panel.wait()
    run = panel.last
    assert run.status == "interrupted" and "stopped at step" in run.error
    assert "Stopped at step" in panel.status.value and "of 200" in panel.status.value
    assert 2 <= len(run.curve()) < 100
    model, _ = models.load_model("abacus-3m", run.adapter)
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in weights)
    assert plain(cells(panel)[1][6]) == "interrupted"
    panel.set(steps=2)
    assert panel.run(wait=True) and panel.last.status == "done"


def test_ctrl_c_in_a_cell_that_waits_stops_the_run():
    panel = Panel("sft", trials=False)
    panel.set(steps=300)


    def press():
        until(lambda: panel.rows)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        panel.run(wait=True)
    assert panel.last.status == "interrupted" and panel.last.adapter.is_dir()


def test_an_error_is_shown_and_the_panel_goes_on():
    def broken(seed, recipe):
        raise ValueError("no data <here>")

    panel = Panel("sft", train=broken, trials=False)
    panel.run(wait=True)
    assert "ValueError: no data &lt;here&gt;" in panel.status.value
    panel.train = training.sft
    assert panel.run(wait=True) and panel.last.status == "done"


def test_what_a_run_starts_from_is_made_first_at_its_rank_and_shown():
    panel = Panel("dpo", trials=False)
    seen = []
    panel.status.observe(lambda change: seen.append(change["new"]), "value")
    panel.set(rank=8)
    panel.run(wait=True)
    sft = runs.latest(method="sft")
    assert panel.last.parent == sft.id and sft.config["rank"] == 8
    assert any("First sft, which it starts from" in text for text in seen)
    saved = json.loads((panel.last.adapter / "adapter_config.json").read_text())
    assert saved["r"] == 8 and panel.last.method == "dpo"


def test_given_arguments_reach_the_function():
    pairs = training.gold_pairs().select(range(20))
    panel = widgets.panel("dpo", trials=False, start="base", pairs=pairs)
    panel.run(wait=True)
    assert panel.last.labels == 20 and panel.last.parent is None


# --- earlier runs --------------------------------------------------------------------------------


def test_earlier_runs_of_this_notebook_are_drawn_with_what_differs(monkeypatch):
    record(learning_rate=1e-3)
    record(learning_rate=1e-3, rank=4)
    monkeypatch.setenv("RLNB_NOTEBOOK", "other")
    record(rank=2)
    monkeypatch.setenv("RLNB_NOTEBOOK", "02_sft")
    panel = Panel("sft", trials=False)
    assert len(panel.table.runs) == 2
    assert "rank 16" in panel.plot.value and "rank 4" in panel.plot.value
    assert "rate" not in plain(panel.plot.value)  # it is the same in both


def test_runs_are_hidden_and_come_back():
    panel_runs = [record(rank=rank) for rank in (1, 2, 4)]
    panel = Panel("sft", trials=False)
    tick = panel.table.box.children[len(run_table.COLUMNS) + 2]  # of the newest
    tick.value = False
    assert "rank 4" not in panel.plot.value and "rank 1" in panel.plot.value
    assert panel.table.hidden == {panel_runs[-1].id}
    tick.value = True
    assert "rank 4" in panel.plot.value


def test_only_the_newest_runs_are_ticked_to_begin_with():
    made = [record(seconds=float(n)) for n in range(run_table.SHOWN + 2)]
    panel = Panel("sft", trials=False)
    assert panel.table.hidden == {run.id for run in made[:2]}
    assert len(cells(panel)) == len(made) + 1


def test_the_table_is_sorted_by_a_click_on_its_head():
    for strict, seconds in ((50, 3.0), (70, 1.0), (None, 2.0)):
        record(strict=strict, seconds=seconds)
    panel = Panel("sft", trials=False)

    def order(column):
        heads = panel.table.box.children[1 : 1 + len(run_table.COLUMNS)]
        next(h for h in heads if h.description.startswith(column)).click()
        return [run.seconds for run in panel.table.rows()]

    assert [run.seconds for run in panel.table.rows()] == [2.0, 1.0, 3.0]
    assert order("held out") == [1.0, 3.0, 2.0] and order("held out") == [2.0, 3.0, 1.0]
    assert order("seconds") == [3.0, 2.0, 1.0]
    assert plain(cells(panel)[1][4]) == "3"
    with pytest.raises(KeyError):
        panel.table.sort("weather")


def test_deleting_asks_once_more():
    keep, gone = record(rank=4), record(rank=8)
    panel = Panel("sft", trials=False)

    def press():
        panel.table.box.children[2 * (len(run_table.COLUMNS) + 2) - 1].click()

    press()
    assert gone.folder.is_dir() and cells(panel)[1][-1] == "Sure?"
    press()
    assert not gone.folder.exists() and [run.id for run in panel.table.runs] == [keep.id]
    assert list(runs.root().iterdir()) == [keep.folder]
    assert "rank 8" not in panel.plot.value


def test_a_panel_is_a_cells_last_line():
    assert live.Screen in Panel.__mro__
    bundle = widgets.panel("sft", trials=False)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
