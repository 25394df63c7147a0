"""The comparison of all methods: what its rows say, and how they are kept."""

import random

import pytest

from rlnb import __main__
from rlnb.record import runs
from rlnb.tools import compare, experiments
from rlnb.train import methods
from rlnb.model.folders import weights
from rlnb.train.loop import fingerprint
from rlnb.train.recipes import adapter, recipe


def rows(method="SFT", shares=(50, 54, 52), **more):
    found = []
    for seed, k in enumerate(shares):
        one = {"method": method, "seed": seed, "labels": 128}
        for split in compare.SPLITS:
            one |= {split: k, f"{split}_n": 100}
        found.append(one | {"tokens": 20.5, "kl": 1.0, "kl_error": 0.1, "train_seconds": 9.4,
                            "peak_memory_mb": 900} | more)  # fmt: skip
    return found


def test_gains_are_paired_by_seed():
    """Both methods swing by 20 points from seed to seed, and one is always two points above."""
    two = rows(shares=(40, 60, 50)) + rows("SFT, DPO", (42, 62, 52))
    gain = compare.gain(two, "SFT, DPO")
    assert (gain.mean, gain.low, gain.high) == pytest.approx((2, 2, 2))
    assert compare.strict(two, "SFT, DPO").high - 0.52 > 0.2
    fewer = rows() + rows("SFT, DPO", (60,))
    assert compare.gain(fewer, "SFT, DPO").mean == pytest.approx(10)  # of the one seed that both have


@pytest.mark.parametrize(
    "low, high, words",
    [(1, 3, "above"), (-3, -1, "below"), (-1, 1, "no difference shown"), (2, 2, "one seed")],
)
def test_words_are_what_the_interval_allows(low, high, words):
    assert compare.Gain((low + high) / 2, low, high).verdict == words


def test_the_table_has_a_line_per_method_in_their_order():
    lines = compare.table(rows("SFT, DPO", (60, 64, 62)) + rows()).splitlines()
    assert len(lines) == 4 and lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2].startswith("| SFT | 52.0 % [47.0, 57.0] |  | 1.00 | 128 | 9 s |")
    assert lines[3].startswith("| SFT, DPO | 62.0 % [57.0, 67.0] | +10.0")


def test_rows_come_back_from_their_file(tmp_path):
    made = rows() + rows("ORPO from base")
    file = tmp_path / "rows.csv"
    file.write_text(experiments.text(made), encoding="utf-8")
    assert experiments.read(file) == made
    assert file.read_text().startswith("method,seed,labels,")


def test_answers_are_counted_by_split():
    found = compare.counts(["id", "id", "rule"], [True, False, True], [10, 21, 99])
    assert (found["id"], found["id_n"], found["rule"], found["rule_n"]) == (1, 2, 1, 1)
    assert found["larger_n"] == 0 and found["tokens"] == 15.5


def test_every_method_is_there_with_what_it_needs():
    assert {"SFT", "SFT, PPO", "SFT, RLOO", "SFT, DPO", "SFT, KTO", "SFT, GRPO"} < set(compare.METHODS)
    assert all(method.needs for method in compare.METHODS.values())
    assert {method.recipe for method in compare.METHODS.values()} == {
        None, "grpo_from_base", *set(methods.METHODS) - {"reward_model"}}  # fmt: skip


def test_a_method_that_is_not_there_is_named(capsys):
    assert __main__.main(["compare", "--only", "DPO"]) == 2
    assert "error: no method 'DPO'; there are 'base', 'SFT', 'SFT on all', " in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    """Real runs of the smoke profile: the second call makes the rows that are missing, and no other."""
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    out = tmp_path / "rows.csv"
    first = compare.row("SFT", 0)
    out.write_text(experiments.text([first]), encoding="utf-8")
    both = experiments.run_grid(compare.row, ["SFT", "SFT, best of 8"], 1, out, resume=True)
    assert both[0] == first == experiments.read(out)[0] and len(both) == 2
    assert first["kl"] == 0 and first["id_n"] == 16 and both[1]["train_seconds"] == 0


def test_one_more_seed_falls_into_a_wider_interval():
    """Of five draws of a normal distribution and a sixth, the sixth is inside 95 times of 100."""
    rng, inside = random.Random(0), 0
    for _ in range(2000):
        *five, sixth = (round(rng.gauss(50, 3), 3) for _ in range(6))
        found = compare.expected(rows(shares=five), "SFT")
        inside += found.low <= sixth / 100 <= found.high
    assert 0.94 < inside / 2000 < 0.96


def test_the_table_by_split():
    found = compare.by_split(rows() + rows("SFT, DPO", (60,))).splitlines()
    assert found[0] == "| | `id` | `templates` | `larger` | `deeper` | `rule` |"
    assert found[2].startswith("| SFT | 52.0 ± 5.0 | ") and found[3].startswith("| SFT, DPO | 60.0 ± 0.0")


@pytest.mark.slow
def test_what_is_asked_for_is_done_side_by_side_and_kept_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set again by what is tested
    out = tmp_path / "rows.csv"
    both = experiments.run_grid(compare.row, ["base", "SFT"], 1, out, jobs=2, first="SFT")
    assert [r["method"] for r in both] == ["base", "SFT"] and experiments.read(out) == both
    assert both[0]["kl"] > both[1]["kl"] == 0


def test_points_say_none_for_what_has_none():
    some = rows("base", kl=7.0) + rows() + rows(compare.BEST, kl=1.2, train_seconds=0.0)
    assert list(compare.points(some, "kl")) == ["SFT", compare.BEST]
    assert compare.points(some, "kl")["SFT"][0] == 1.0
    assert compare.points(some, "train_seconds")[compare.BEST][0] is None
    assert str(compare.points(some, "kl")["SFT"][1].mean)[:4] == "52.0"


def test_the_picture_is_drawn(tmp_path):
    compare.draw(rows(), tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_equal_budgets(monkeypatch):
    """SFT on all sees as many sequences as GRPO samples."""
    monkeypatch.setenv("RLNB_PROFILE", "cpu")
    assert recipe("grpo")["per_device_train_batch_size"] == 64
    assert recipe("sft")["per_device_train_batch_size"] == 16


def test_the_run_of_a_method_is_found_among_others(tmp_path, monkeypatch):
    """DPO after SFT is told from DPO after something else or on other data, and a run without an adapter
    from one with.
    """
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))

    def add(name, parent=None, save=True, **changes):
        method = name.removesuffix("_from_base")
        lora, data = adapter(method), fingerprint(methods.default_data(method, 0))
        own = {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets), "data": data}
        own |= {"rewards": methods._reward_names(method), "weights": weights("abacus-3m")}
        config = recipe(name) | own | changes
        with runs.start(method, model="abacus-3m", config=config, seed=0, parent=parent) as run:
            run.finish(strict={"k": 1, "n": 2})
            if save:
                run.adapter.mkdir()
        return run.id

    sft, other, own = add("sft"), add("sft", max_steps=3), add("sft", data="mine")
    assert compare.find("SFT, DPO") is None and compare.find(compare.BEST) is None
    mine = add("dpo", sft)
    add("dpo", other), add("dpo", own), add("dpo", sft, beta=0.7), add("dpo", sft, data="mine")
    add("dpo", sft, save=False), add("dpo", "gone"), add("dpo", sft, weights="another model's")
    from_base, _ = add("grpo_from_base"), add("grpo_from_base", rewards=["answer_only"])
    assert compare.find("SFT, DPO").id == mine and compare.find("SFT").id == sft
    assert compare.find("SFT, GRPO") is None
    assert compare.find("GRPO from base").id == from_base
    assert compare.find("SFT, DPO", seed=1) is None


def test_another_model_has_a_table_of_its_own(tmp_path, monkeypatch):
    """The rows that ship are of the practice model."""
    before, found = compare.OUT.read_bytes(), {}
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLNB_MODEL", "someone/other")
    monkeypatch.setenv("RLNB_PROFILE", "cpu")  # as main sets it
    monkeypatch.setattr(experiments, "run_grid", lambda *args, **options: found.update(out=args[3]) or rows())
    assert __main__.main(["compare"]) == 0
    assert found["out"] == tmp_path / "runs" / "methods-other.csv" and compare.OUT.read_bytes() == before
    assert found["out"].with_suffix(".png").is_file()
