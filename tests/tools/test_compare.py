"""The comparison of all methods: what its rows say, and how they are kept."""

import csv
import math

import pytest

from rlnb import __main__
from rlnb.tools import compare, grid


def rows(arm="SFT", shares=(50, 54, 52), **more):
    found = []
    for seed, k in enumerate(shares):
        one = {"arm": arm, "seed": seed, "labels": 128}
        for split in compare.SPLITS:
            one |= {split: k, f"{split}_n": 100}
        found.append(one | {"tokens": 20.5, "kl": 1.0, "kl_error": 0.1, "train_seconds": 9.4,
                            "peak_memory_mb": 900} | more)  # fmt: skip
    return found


def test_the_interval_over_seeds_is_students():
    mean, low, high = grid.over_seeds([1.0, 2.0, 3.0])  # sd 1, t(2) = 4.303, 4.303 / sqrt(3) = 2.484
    assert mean == 2 and (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert grid.over_seeds([5.0]) == (5, 5, 5)


def test_the_factors_are_those_of_the_distribution():
    """The two-sided 5 % point: the density of t, added up outside of it, gives 0.05."""

    def tail(t, df, steps=200_000, far=400.0):
        c = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        width = (far - t) / steps
        points = (t + (i + 0.5) * width for i in range(steps))
        return 2 * width * sum(c * (1 + x * x / df) ** (-(df + 1) / 2) for x in points)

    for n, t in grid.T_95.items():
        if n > 2:  # with one degree of freedom the tail has no end
            assert tail(t, n - 1) == pytest.approx(0.05, abs=2e-4)
    assert 1 - 2 / math.pi * math.atan(grid.T_95[2]) == pytest.approx(0.05, abs=1e-4)


def test_gains_are_paired_by_seed():
    """Both arms swing by 20 points from seed to seed, and one is always two points above."""
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
    file.write_text(grid.text(made), encoding="utf-8")
    assert compare.read(file) == made
    with file.open(newline="") as opened:
        assert next(csv.reader(opened))[:3] == ["arm", "seed", "labels"]


def test_answers_are_counted_by_split():
    found = compare.counts(["id", "id", "rule"], [True, False, True])
    assert (found["id"], found["id_n"], found["rule"], found["rule_n"]) == (1, 2, 1, 1)
    assert found["larger_n"] == 0


def test_every_method_has_an_arm_and_what_it_needs():
    assert {"SFT", "SFT, PPO", "SFT, RLOO", "SFT, DPO", "SFT, KTO", "SFT, GRPO"} < set(compare.ARMS)
    assert all(arm.needs for arm in compare.ARMS.values())


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"no method 'DPO'; there are 'base', 'SFT', 'SFT on all', "):
        __main__.main(["compare", "--only", "DPO"])


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    """Real runs of the smoke profile: the second call makes the rows that are missing, and no other."""
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    out = tmp_path / "rows.csv"
    first = compare.row("SFT", 0)
    out.write_text(grid.text([first]), encoding="utf-8")
    both = grid.carry_out(compare.row, ["SFT", "SFT, best of 8"], 1, out, resume=True)
    assert both[0] == first == compare.read(out)[0] and len(both) == 2
    assert first["kl"] == 0 and first["id_n"] == 16 and both[1]["train_seconds"] == 0


def test_one_more_seed_falls_into_a_wider_interval():
    """Of five draws of a normal distribution and a sixth, the sixth is inside 95 times of 100."""
    import random

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


def test_what_is_asked_for_is_done_side_by_side_and_kept_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set again by what is tested
    out = tmp_path / "rows.csv"
    both = grid.carry_out(compare.row, ["base", "SFT"], 1, out, jobs=2, first="SFT")
    assert [r["arm"] for r in both] == ["base", "SFT"] and compare.read(out) == both
    assert both[0]["kl"] > both[1]["kl"] == 0


def test_points_say_none_for_what_has_none():
    some = rows("base", kl=7.0) + rows() + rows(compare.BEST, kl=1.2, train_seconds=0.0)
    assert list(compare.points(some, "kl")) == ["SFT", compare.BEST]
    assert compare.points(some, "kl")["SFT"][0] == 1.0
    assert compare.points(some, "train_seconds")[compare.BEST][0] is None
    assert str(compare.points(some, "kl")["SFT"][1].mean)[:4] == "52.0"


def test_the_picture_carries_the_digest_of_its_rows(tmp_path):
    compare.draw(rows(), tmp_path / "rows.png")
    picture = (tmp_path / "rows.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and compare.digest(rows()).encode() in picture
    assert compare.digest(rows(labels=7)) != compare.digest(rows())


def test_equal_budgets():
    """SFT on all sees as many sequences as GRPO samples."""
    grpo, sft = (compare.recipes.recipe(name, "cpu") for name in ("grpo", "sft"))
    assert grpo.steps * grpo.batch % sft.batch == 0


def test_the_run_of_an_arm_is_found_among_others(tmp_path, monkeypatch):
    """DPO after SFT is told from DPO after something else, and a run without an adapter from one with."""
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))

    def add(name, parent=None, adapter=True, **changes):
        recipe = compare.recipes.recipe(name, **changes)
        with compare.runs.start(recipe.method, model="abacus-3m", config=recipe, seed=0, parent=parent) as run:
            run.finish(strict={"k": 1, "n": 2})
            if adapter:
                run.adapter.mkdir()
        return run.id

    sft, other = add("sft"), add("sft", steps=3)
    assert compare.made("SFT, DPO") is None and compare.made(compare.BEST) is None
    mine = add("dpo", sft)
    add("dpo", other), add("dpo", sft, beta=0.7), add("dpo", sft, adapter=False), add("dpo", "gone")
    from_base = add("grpo")
    assert compare.made("SFT, DPO").id == mine and compare.made("SFT").id == sft
    assert compare.made("SFT, GRPO") is None
    assert compare.made("GRPO from base").id == from_base
    assert compare.made("SFT, DPO", seed=1) is None
