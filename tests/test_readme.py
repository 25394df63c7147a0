"""What the README says is what the files of the repository say."""

import csv
import re
from types import SimpleNamespace

import pytest

from rlnb.__main__ import _parser
from rlnb.model import decode_cpu, lora
from rlnb.tools import compare, experiments
from rlnb.tools.setup import ROOT
from rlnb.train import methods
from tests.benchmarks import judge, ppo_trl, rlhf

import torch

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [compare.table, compare.by_split])
def test_the_tables_of_results_follow_from_the_rows(table):
    rows = compare.read()
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in compare.METHODS for s in range(5)}
    assert table(rows) in README


@pytest.mark.parametrize("table", [judge, rlhf], ids=["judge", "rlhf"])
def test_the_other_tables_follow_too(table):
    rows = experiments.read(table.OUT)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    for part in table.tables(rows).split("\n\n"):
        assert part in README


def test_the_cost_of_ppo_is_that_of_its_rows():
    assert ppo_trl.sentence(experiments.read(ppo_trl.OUT)) in README


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


def test_the_commands_are_there():
    commands = re.findall(r"python -m rlnb ([^`\n#]+)", README)
    assert len(commands) > 5
    for command in commands:
        words = command.replace("RUN", "some-id").split()
        if words[-1] != "--help":
            _parser().parse_known_args(words)  # exits for what it does not know
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|\n|=\S+ )make (\w+)", README):
        assert re.search(rf"^[\w ]*\b{target}\b[\w ]*:", targets, re.MULTILINE), target
    for module in re.findall(r"python -m (tests\.[\w.]+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_the_messages_are_those_that_are_raised(monkeypatch):
    """Of the table of troubles: each message that an error has is raised here."""
    monkeypatch.setenv("RLNB_PROFILE", "cpu")
    said = []
    for call in (
        lambda: lora.check_rank(128, 64),
        lambda: methods.train("grpo", per_device_train_batch_size=60, start="base"),
        lambda: decode_cpu.pick(torch.tensor([[float("nan")]]), torch.zeros(1), SimpleNamespace()),
    ):
        with pytest.raises((ValueError, FloatingPointError)) as error:
            call()
        said.append(str(error.value))
    told = README[README.index("## When something goes wrong") :].split("\n## ")[0]
    for message in said:
        assert any(quote in message for quote in re.findall(r"^\| `([^`]+)` \|", told, re.MULTILINE))
