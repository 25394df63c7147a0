"""rlnb.record.runs between notebooks: one call each to compare, to delete, to keep what an interrupted
training has learnt, and to keep trials apart.
"""

import threading

import pytest
import tiny

from rlnb.record import runs
from rlnb.model import load as models


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return tmp_path


def made(seed=0, parent=None, method="sft", **config):
    with runs.start(method, config=config, seed=seed, parent=parent) as run:
        run.finish(strict={"k": 3, "n": 4})
    return run


def test_what_differs_between_runs_is_one_call():
    a, b = made(rank=8, steps=4, lr=0.1), made(rank=16, steps=4, seed=1)
    assert runs.differences([a, b]) == {
        a.id: {"rank": 8, "lr": 0.1, "seed": 0}, b.id: {"rank": 16, "lr": None, "seed": 1}
    }  # fmt: skip
    assert runs.differences([a]) == {a.id: {}} and runs.differences([]) == {}


def test_a_comparison_has_the_differences_and_what_came_of_them():
    made(rank=8, steps=4), made(rank=16, steps=4)
    table = runs.compare(runs.find(steps=4))
    assert [row["rank"] for row in table] == [16, 8]
    assert {"id", "rank", "status", "seconds", "result.strict"} <= set(table[0])
    assert not {"seed", "steps", "model"} & set(table[0])
    assert "75.0 % of 4" in str(table) and "<td>75.0 % of 4</td>" in table._repr_html_()
    assert str(runs.compare([])) == "no runs"


def test_a_deleted_run_is_gone_with_all_its_files(registry):
    keep, gone = made(), made()
    (gone.folder / "adapter").mkdir()
    runs.delete(gone)
    assert list(registry.iterdir()) == [keep.folder] and [r.id for r in runs.all()] == [keep.id]
    with pytest.raises(FileNotFoundError):
        runs.delete(gone)


def test_a_run_that_still_runs_is_not_deleted():
    with runs.start("sft") as run, pytest.raises(ValueError, match=f"run {run.id} is still running"):
        runs.delete(run)
    runs.delete(run)


def test_trials_are_kept_apart_and_only_those_of_this_thread(registry):
    other = registry / ".trials"
    with runs.apart(other):
        trial = made(method="trial")
        thread = threading.Thread(target=made)
        thread.start()
        thread.join()
    real = made()
    assert trial.folder.parent == other and [r.id for r in runs.all(other)] == [trial.id]
    assert len(runs.all()) == 2 and real.folder.parent == registry
    with pytest.raises(FileNotFoundError):
        runs.load(trial.id)


@pytest.mark.parametrize(
    ("session", "name"),
    [
        ("/somewhere/notebooks/05_dpo.ipynb", "05_dpo"),
        ("notebooks/solutions/02_sft.ipynb", "solutions/02_sft"),
        ("8b2b9d2e-5c0b-4f0c", None),
        ("", None),
    ],
)
def test_a_run_knows_the_notebook_that_made_it(monkeypatch, session, name):
    monkeypatch.setenv("JPY_SESSION_NAME", session)
    assert made().notebook == name
    monkeypatch.setenv("RLNB_NOTEBOOK", "08_grpo")
    assert made().notebook == "08_grpo"


def test_an_interrupted_training_keeps_its_adapter_and_a_failed_one_does_not(tmp_path):
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = tiny.make(tmp_path / "tiny")
    rows = Dataset.from_list([{"prompt": "1 + 1", "completion": " = 2"}] * 4)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise error

    for error, status in ((KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")):
        model, tokenizer = models.load_model(base, models.LoRA(rank=2))
        settings = SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, learning_rate=0.1, report_to="none",
            save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=1,
        )  # fmt: skip
        with pytest.raises(type(error)), runs.start("sft") as run:
            SFTTrainer(
                model=model, args=settings, train_dataset=rows, processing_class=tokenizer,
                callbacks=[run.callback(), Break()],
            ).train()  # fmt: skip
        assert runs.load(run.id).status == status
        assert run.adapter.is_dir() == (status == "interrupted") and run._training is None
        if status == "interrupted":
            again, _ = models.load_model(base, run.adapter)
            now, then = (dict(m.named_parameters()) for m in (again, model))
            assert all(torch.equal(now[name], then[name]) for name in now)
            assert any(now[name].abs().max() > 0 for name in now if "lora_B" in name)
