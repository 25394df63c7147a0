"""What the README says is what the files of the repository say."""

import csv
import re

import pytest

from rlnb import compare
from rlnb.bootstrap import ROOT
from tests.benchmarks import learning, ppo_trl, preferences, rlhf

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_results_follows_from_the_rows():
    rows = compare.read(learning.OUT)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert learning.table(rows) in README


@pytest.mark.parametrize("table", [preferences, rlhf], ids=["preferences", "rlhf"])
def test_the_other_tables_follow_too(table):
    rows = compare.read(table.OUT)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    for part in table.tables(rows).split("\n\n"):
        assert part in README


def test_the_cost_of_ppo_is_that_of_its_rows():
    assert ppo_trl.sentence(compare.read(ppo_trl.OUT)) in README


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert missing == []


def test_every_notebook_is_in_the_table():
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert names == set(re.findall(r"\| \[(\w+)\]\(notebooks/\1\.ipynb\)", README))


def test_results_say_which_command_made_them():
    explained = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "data" / "results").glob("*.csv"):
        assert path.name in explained
        with path.open(newline="", encoding="utf-8") as file:
            assert all(None not in row and None not in row.values() for row in csv.DictReader(file))


def test_accuracy_at_a_kl_lies_on_the_line_between_two_points():
    run = [{"kl": 1.0, "strict": 60, "n": 100}, {"kl": 0.0, "strict": 50, "n": 100}]
    assert rlhf.at_kl(run, 0.25) == 52.5 and rlhf.at_kl(run, 1.0) == 60
    with pytest.raises(ValueError, match="outside of what was measured"):
        rlhf.at_kl(run, 1.5)
