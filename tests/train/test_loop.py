"""The one loop: what it records is what was used, a stop keeps what was learnt, a screen sees every step."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from rlnb.model import LoRA, load_model
from rlnb.record import progress, runs
from rlnb.task.rewards import RewardError
from rlnb.train import common, fit, loop, train
from rlnb.train.loop import ALL_CUT, Recorder, fingerprint, settings

from datasets import Dataset
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

ROWS = Dataset.from_list([{"prompt": "1 + 1", "completion": " = 2"}] * 4)


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("loop") / "tiny")


@pytest.fixture
def make(base, tmp_path):
    def make(lora=LoRA(rank=2), callbacks=(), **given):  # noqa: B008  frozen
        model, tokenizer = load_model(base, lora)
        usual = dict(
            output_dir=str(tmp_path / "out"), max_steps=3, learning_rate=5e-3, report_to="none",
            save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=1, seed=7,
        )  # fmt: skip
        return SFTTrainer(model=model, args=SFTConfig(**usual | given), train_dataset=ROWS,
                          processing_class=tokenizer, callbacks=list(callbacks))  # fmt: skip

    return make


class Seen(progress.Screen):
    """Remembers what it was shown."""

    def __init__(self, stop_at=None):
        self.total, self.steps, self.stop_at = None, [], stop_at

    def show(self, rows, total):
        self.total = total
        self.steps.append(rows[-1]["step"])
        self.stopping |= rows[-1]["step"] == self.stop_at


def test_a_run_records_what_was_used(make):
    trainer = make(lora=LoRA(rank=4, alpha=8))
    run = fit("sft", trainer, ROWS, problems=())
    again = runs.load(run.id)
    assert again.status == "done" and again.seed == 7 and again.labels == 4 and again.model == "tiny"
    assert (again.config["rank"], again.config["alpha"], again.config["learning_rate"]) == (4, 8, 5e-3)
    assert again.config["data"] == fingerprint(ROWS) and again.train_seconds > 0
    assert [row["step"] for row in again.curve() if "loss" in row] == [1, 2, 3]
    assert trainer.args.output_dir == str(run.folder)


def test_the_fingerprint_tells_data_apart():
    other = ROWS.map(lambda row, i: {"completion": " = 3" if i == 3 else row["completion"]}, with_indices=True)
    assert fingerprint(ROWS) == fingerprint(list(ROWS)) != fingerprint(other)
    assert fingerprint(iter(ROWS)) is None


def test_the_settings_of_a_whole_model_have_no_rank(make):
    found = settings(make(lora=None), ROWS)
    assert "rank" not in found and found["completion_only_loss"] is None


def test_a_screen_sees_each_step_and_can_stop_the_training(make):
    whole = Seen()
    with progress.on(whole):
        fit("sft", make(), ROWS, problems=())
    assert (whole.total, whole.steps) == (3, [1, 2, 3])
    short = Seen(stop_at=1)  # it ends after the step that follows
    with progress.on(short), pytest.raises(progress.Stopped, match="stopped at step 2 of 3"):
        fit("sft", make(), ROWS, problems=())
    stopped = runs.find(status="interrupted")[0]
    assert short.steps == [1, 2] and stopped.adapter.is_dir()


def test_an_interrupted_training_keeps_its_adapter_and_a_failed_one_does_not(make, base):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise error

    for error, status in ((KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")):
        trainer = make(callbacks=[Break()])
        with pytest.raises(type(error)):
            fit("sft", trainer, ROWS, problems=())
        run = runs.find(status=status)[0]
        assert run.adapter.is_dir() == (status == "interrupted")
        if status == "interrupted":
            again, _ = load_model(base, run.adapter)
            now, then = (dict(m.named_parameters()) for m in (again, trainer.model))
            assert all(torch.equal(now[name], then[name]) for name in now)
            assert any(now[name].abs().max() > 0 for name in now if "lora_B" in name)


def test_what_cannot_teach_is_refused_unless_it_is_asked_for(make):
    def frozen():
        trainer = make()
        trainer.model.requires_grad_(False)
        return trainer

    with pytest.raises(ValueError, match="before training: the adapter is frozen"):
        fit("sft", frozen(), ROWS, problems=())
    assert not runs.find()
    run = fit("sft", frozen(), ROWS, problems=(), check=False)
    losses = [row["loss"] for row in run.curve() if "loss" in row]
    assert run.status == "done" and len(set(losses)) == 1  # and nothing was learnt


def test_a_training_whose_completions_are_all_cut_off_is_given_up(make):
    with runs.start("grpo") as run:
        recorder, state = Recorder(run), SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=99)
        for ratio in [1.0] * (ALL_CUT - 1) + [0.9] + [1.0] * (ALL_CUT - 1):
            recorder.on_log(None, state, None, {"reward": 0.0, "completions/clipped_ratio": ratio})
        with pytest.raises(ValueError, match="cut off at max_completion_length, at 64 tokens"):
            logs = {"reward": 0.0, "completions/clipped_ratio": 1.0, "completions/mean_length": 64.0}
            recorder.on_log(None, state, None, logs)


def test_an_adapter_for_which_there_is_no_room_is_saved_elsewhere(make, monkeypatch, base):
    def full(model, folder, save=loop.save_adapter):
        if folder == runs.find()[0].adapter:
            raise OSError(28, "No space left on device")
        return save(model, folder)

    monkeypatch.setattr(loop, "save_adapter", full)
    with pytest.raises(OSError, match=r"No space left on device.*: what was learnt is in ") as error:
        fit("sft", make(), ROWS, problems=())
    place = Path(str(error.value).rpartition(" ")[2])
    load_model(base, place)
    assert runs.find()[0].status == "failed"
    shutil.rmtree(place.parent)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_completion_that_no_reward_judges_stops_the_training(method, base, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")

    def half(completions, **_):
        return [1.0 if i % 2 else None for i in range(len(completions))]

    def other(completions, **_):
        return [0.0 if i % 4 else None for i in range(len(completions))]

    with pytest.raises(RewardError, match=r"no reward judged the completion .*each returned None"):
        train(method, start="base", reward=[half, other], problems=())
    assert runs.find()[0].status == "failed"


def test_what_samples_without_autocast_reads_a_base_in_16_bits(base, monkeypatch):
    """TRL's own generation, which RLOO uses: the adapter is in float32 there, and its base is not."""
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    model, tokenizer = load_model(base, LoRA(rank=2), dtype="bfloat16")
    args = RLOOConfig(**common(RLOOConfig, 0), max_steps=1, per_device_train_batch_size=4, num_generations=2,
                      max_completion_length=4)  # fmt: skip
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1 + 1"}]}] * 4)

    def every_second(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    own = {"args": args, "train_dataset": data, "processing_class": tokenizer, "reward_funcs": every_second}
    trainer = RLOOTrainer(model=model, **own)
    assert fit("rloo", trainer, data, problems=()).status == "done"
