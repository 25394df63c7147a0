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

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlnb.model import LoRA, load_model, trainable
from rlnb.model.folders import base_name, resolve
from rlnb.profiles import model_name
from rlnb.record import progress, runs
from rlnb.show import forecast, live, run_table
from rlnb.show.panel import SHOWN, Panel, panel
from rlnb.train import methods
from rlnb.train.recipes import adapter, recipe

BATCH = "per_device_train_batch_size"


@pytest.fixture(autouse=True)
def smoke(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.setenv("RLNB_NOTEBOOK", "02_sft")
    monkeypatch.delenv("RLNB_MODEL", raising=False)


def until(holds, seconds=120):
    """Waits for what a thread does."""
    for _ in range(seconds * 50):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def record(method="sft", strict=None, seconds=4.0, step=0.5, **changes):
    """A run as the registry has it, without a training: `seconds` long, `step` seconds a step."""
    config = recipe(method) | {"rank": 16, "alpha": 32} | changes
    with runs.start(method, model=base_name(resolve(model_name())), config=config, seed=0) as run:
        for n in range(1, config["max_steps"] + 1):
            run.log(n, loss=1 / n, mean_token_accuracy=0.5)
        if strict is not None:
            run.finish(strict={"k": strict, "n": 100})
    lines = [row | {"seconds": 1 + step * i} for i, row in enumerate(run.curve())]
    (run.folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    change(run, seconds=seconds, timers={"train": step * config["max_steps"]})
    return runs.load(run.id)


def change(run, **values):
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cells(panel):
    """The table's rows as text, from left to right."""
    rows = panel.table.value.split("<tr>")[1:]
    return [[plain(cell).replace("&#9632; ", "") for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]


def plain(html):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html)).strip()


@pytest.fixture
def drawn(monkeypatch):
    """The labels of each drawing."""
    found, draw = [], live.curves_html
    monkeypatch.setattr(live, "curves_html", lambda curves, *a: found.append(list(curves)) or draw(curves, *a))
    return found


# --- knobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_gets_its_own_knobs(method):
    panel = Panel(method)
    own = {"sft": {"alpha"}, "dpo": {"beta"}, "grpo": {"num_generations", "temperature"}, "orpo": {"alpha"},
           "ppo": {"kl_coef", "num_ppo_epochs", "lam"}, "reward_model": {"alpha"}}.get(method, set())  # fmt: skip
    always = {"rank", "max_lora_rank", "learning_rate", "max_steps", BATCH, "seed"}
    assert always | own <= set(panel.knobs)
    assert panel.settings == recipe(method) and panel.adapter == adapter(method)
    assert all(knob.description for knob in panel.knobs.values())
    assert panel.problem() == "" and not panel.buttons["run"].disabled


def test_a_rate_is_moved_on_a_log_scale_and_taken_as_it_is():
    panel = Panel("sft")
    rates = [value for _, value in panel.knobs["learning_rate"].options]
    assert all(1.1 < b / a < 1.8 for a, b in itertools.pairwise(rates))
    assert rates[0] <= 2e-5 and rates[-1] >= 0.05 and panel.settings["learning_rate"] == 2e-3
    panel.set(learning_rate=1.234e-3)
    assert panel.settings["learning_rate"] == 1.234e-3


def test_ranks_are_those_that_the_model_permits():
    panel = Panel("sft")
    assert [value for _, value in panel.knobs["rank"].options] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert forecast.narrowest("abacus-3m") == 128
    panel.set(rank=256, max_lora_rank=256)
    assert "above 128, the smallest width" in panel.costs.value and panel.buttons["run"].disabled


def test_an_invalid_pair_of_ranks_is_said_and_does_not_run():
    panel = Panel("sft")
    panel.knobs["rank"].value = 128
    assert "LoRA rank 128 is above max_lora_rank 64" in panel.costs.value
    assert panel.buttons["run"].disabled and not panel.run() and panel.ended.is_set()
    assert "LoRA rank 128 is above max_lora_rank 64" in panel.status.value
    panel.knobs["max_lora_rank"].value = 128
    assert "above" not in panel.costs.value and not panel.buttons["run"].disabled
    panel.knobs["max_lora_rank"].value = 8
    assert "LoRA rank 128 is above max_lora_rank 8" in panel.costs.value
    panel.reset()
    assert panel.settings == recipe("sft") and "trains 299,008 parameters" in plain(panel.costs.value)


def test_settings_that_exclude_each_other_are_said_too():
    panel = Panel("grpo")
    panel.set(per_device_train_batch_size=8, num_generations=32)
    assert "32" in panel.costs.value and panel.buttons["run"].disabled
    assert not panel.run() and "32" in panel.status.value


def test_knobs_take_what_they_do_not_offer():
    panel = Panel("sft", max_steps=7, seed=23)
    assert panel.knobs["max_steps"].value == 7 and panel.knobs["seed"].value == 23
    panel.set(rank=12, max_steps=3)
    assert panel.adapter.rank == 12 and panel.settings["max_steps"] == 3
    with pytest.raises(ValueError, match="no knob"):
        panel.set(warp=9)


def test_alpha_is_a_knob_where_an_adapter_is_new_and_its_scale_is_told():
    panel = Panel("sft")
    assert "alpha / r = 32 / 16 = 2" in plain(panel.costs.value)
    panel.set(rank=64)
    assert "alpha / r = 32 / 64 = 0.5" in plain(panel.costs.value)
    panel.set(alpha=128)
    assert "alpha / r = 128 / 64 = 2" in plain(panel.costs.value)
    assert "alpha" not in Panel("dpo").knobs and "alpha" in Panel("dpo", start="base").knobs


def test_a_saved_adapter_keeps_its_rank_and_its_scale(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    saved = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    save_file({"q_proj.lora_B.weight": np.ones((2, 4))}, folder / "adapter_model.safetensors")
    panel = Panel("dpo", start=folder)
    assert not {"rank", "alpha"} & set(panel.knobs) and "alpha / r = 8 / 4 = 2" in plain(panel.costs.value)
    panel.set(max_lora_rank=1)
    assert "LoRA rank 4 is above max_lora_rank 1" in panel.costs.value


# --- forecast ------------------------------------------------------------------------------------


def test_trainable_parameters_are_told_exactly_at_every_move():
    panel = Panel("sft")
    for rank in (1, 8, 128):
        panel.set(rank=rank, max_lora_rank=128)
        model, _ = load_model("abacus-3m", LoRA(rank=rank), max_lora_rank=128)
        assert f"trains {trainable(model)[0]:,} parameters" in plain(panel.costs.value)


def test_time_comes_from_an_earlier_run_and_grows_with_steps_and_batch():
    assert "time not known before the first run" in Panel("sft").costs.value
    record(seconds=3.0, step=0.5, max_steps=4, strict=50)  # 0.5 before, 4 steps, 0.5 after
    panel = Panel("sft")
    panel.set(max_steps=100)
    found = forecast.seconds(panel.earlier, panel.settings)
    assert found == (pytest.approx(0.5), pytest.approx(0.5 + 50 + 0.5))
    assert "takes about 51 s , 100 steps of 0.5 s" in plain(panel.costs.value)
    panel.set(per_device_train_batch_size=64)
    assert forecast.seconds(panel.earlier, panel.settings)[0] == pytest.approx(2.0)


def test_a_timing_is_of_this_model_profile_method_and_of_a_run_that_ended_well(monkeypatch):
    run = record(seconds=3.0, max_steps=4)
    assert forecast.earlier_run("sft") and forecast.earlier_run("dpo") is None
    monkeypatch.setenv("RLNB_MODEL", "somebody/model")
    assert forecast.earlier_run("sft") is None
    monkeypatch.delenv("RLNB_MODEL")
    before = json.loads((run.folder / "run.json").read_text())
    for other in ({"status": "interrupted"}, {"profile": "cpu"}, {"machine": {"platform": "other"}}):
        change(run, **other)
        assert forecast.earlier_run("sft") is None
        change(run, **before)
    assert forecast.earlier_run("sft")


def test_memory_grows_with_batch_and_rank():
    (few, small), (_, large) = (forecast.training("dpo", "abacus-3m", 16, rows, None) for rows in (4, 64))
    assert large > 4 * small
    many, wide = forecast.training("dpo", "abacus-3m", 64, 4, None)
    assert wide > small and many == 4 * few


def test_a_large_model_holds_what_it_uses(monkeypatch):
    """Its training keeps large blocks and uses them again. For SFT of SmolLM2-135M 3,813 MB are said beside the
    libraries, and a run peaked at 4,731 MB with them.
    """
    _, twice = forecast.training("sft", "abacus-3m", 8, 4, None)
    monkeypatch.setattr(forecast, "LARGE", 1_000_000)
    forecast.training.cache_clear()
    _, once = forecast.training("sft", "abacus-3m", 8, 4, None)
    forecast.training.cache_clear()
    assert twice == 2 * once


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_from_click_to_table(drawn, capsys):
    panel = Panel("sft")
    panel.set(learning_rate=1e-3, max_steps=4, rank=8, alpha=16)
    panel.buttons["run"].click()
    assert panel.buttons["run"].disabled and not panel.buttons["stop"].disabled
    until(panel.ended.is_set)
    run = panel.runs[0]
    assert run.status == "done" and run.adapter.is_dir() and len(run.curve()) >= 4
    assert run.config["rank"] == 8 and run.config["alpha"] == 16 and run.config["learning_rate"] == 1e-3
    assert run.notebook == "02_sft"
    assert run_table.held_out(run) in panel.status.value and "%" in panel.status.value
    assert "<img" in panel.plot.value and len(drawn) > 1 and drawn[-1] == [run_table.clock(run)]
    header, row = cells(panel)
    assert header == list(run_table.COLUMNS)
    assert row[2] == run_table.held_out(run) and row[5] == "done"
    assert not panel.buttons["run"].disabled and panel.buttons["stop"].disabled
    assert "parameters" not in capsys.readouterr().out  # load_model's line goes into no cell


def test_the_kernel_is_free_and_a_second_run_is_refused(capsys):
    panel, other = Panel("sft"), Panel("orpo")
    panel.set(max_steps=100)
    assert panel.run()
    until(lambda: panel.rows)
    print("meanwhile")
    assert not panel.run() and not other.run()
    assert "A run is going in this kernel" in other.status.value
    assert other.ended.is_set() and not other.runs
    panel.buttons["stop"].click()
    panel.wait()
    assert capsys.readouterr().out == "meanwhile\n"


def test_stop_keeps_what_was_learnt():
    panel = Panel("orpo")
    panel.set(max_steps=200)
    panel.run()
    until(lambda: len(panel.rows) >= 2)
    panel.stop()
    panel.wait()
    run = panel.runs[0]
    assert run.status == "interrupted" and "stopped at step" in run.error
    assert "Stopped at step" in panel.status.value and "of 200" in panel.status.value
    assert 2 <= len(run.curve()) < 100
    model, _ = load_model("abacus-3m", run.adapter)
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in weights)
    assert cells(panel)[1][5] == "interrupted"
    panel.set(max_steps=2)
    assert panel.run(wait=True) and panel.runs[0].status == "done"


def test_ctrl_c_in_a_cell_that_waits_stops_the_run():
    panel = Panel("sft")
    panel.set(max_steps=300)

    def press():
        until(lambda: panel.rows)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        panel.run(wait=True)
    assert panel.runs[0].status == "interrupted" and panel.runs[0].adapter.is_dir()


def test_an_error_is_shown_and_the_panel_goes_on(monkeypatch):
    def broken(method, **arguments):
        raise ValueError("no data <here>")

    panel, train = Panel("sft"), methods.train
    monkeypatch.setattr(methods, "train", broken)
    panel.run(wait=True)
    assert "ValueError: no data &lt;here&gt;" in panel.status.value and not panel.runs
    monkeypatch.setattr(methods, "train", train)
    assert panel.run(wait=True) and panel.runs[0].status == "done"


def test_what_a_run_starts_from_is_made_first_at_its_rank():
    panel = Panel("dpo")
    panel.set(rank=8)
    assert "before that an SFT run of this rank" in panel.costs.value
    panel.run(wait=True)
    sft = runs.find(method="sft")[0]
    assert panel.runs[0].parent == sft.id and sft.config["rank"] == 8
    saved = json.loads((panel.runs[0].adapter / "adapter_config.json").read_text())
    assert saved["r"] == 8 and panel.runs[0].method == "dpo"
    assert "before that" not in panel.costs.value


def test_what_is_given_reaches_the_training():
    pairs = methods.gold_pairs().select(range(20))
    mine = panel("dpo", data=pairs, loss_type=["ipo"])
    mine.run(wait=True)
    assert mine.runs[0].labels == 20 and mine.runs[0].config["loss_type"] == ["ipo"]


# --- earlier runs --------------------------------------------------------------------------------


def test_earlier_runs_of_this_notebook_are_drawn_with_what_differs(monkeypatch, drawn):
    record(learning_rate=1e-3)
    record(learning_rate=1e-3, rank=4)
    monkeypatch.setenv("RLNB_NOTEBOOK", "other")
    record(rank=2)
    monkeypatch.setenv("RLNB_NOTEBOOK", "02_sft")
    panel = Panel("sft")
    assert len(panel.runs) == 2
    assert drawn[-1] == ["rank 4", "rank 16"]  # the rate is the same in both
    assert [row[1] for row in cells(panel)[1:]] == ["rank 4", "rank 16"]


def test_the_newest_runs_are_drawn_and_a_run_keeps_its_colour(drawn):
    for n in range(SHOWN + 1):
        record(rank=2**n)
    panel = Panel("sft")
    assert len(cells(panel)) == SHOWN + 2 and len(drawn[-1]) == SHOWN
    before = panel._colours()
    record(rank=3)
    panel.refresh()
    assert panel._colours()[1:] == before[:-1] and len(set(panel._colours())) == SHOWN


def test_a_panel_is_a_cells_last_line():
    assert progress.Screen in Panel.__mro__
    bundle = panel("sft")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
