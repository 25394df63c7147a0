"""What the README says is what the files of the repository say."""

import csv
import json
import re
from statistics import median
from types import SimpleNamespace

import pytest

from rlnb.__main__ import _parser
from rlnb.model import decode_cpu, lora, memory
from rlnb.tools import compare, experiments
from rlnb.tools.setup import ROOT
from rlnb.train import methods, preflight, recipes
from tests.benchmarks import judge, ppo_trl, real, rlhf

import pandas as pd
import torch
from transformers import LlamaConfig, Qwen2Config

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


def test_the_table_of_the_real_model_follows():
    assert real.table(experiments.read(real.OUT)) in README


def test_the_cost_of_ppo_is_that_of_its_rows():
    assert ppo_trl.sentence(experiments.read(ppo_trl.OUT)) in README


def sources(kind):
    """The cells of the notebook on GPUs, code or markdown."""
    cells = json.loads((ROOT / "notebooks" / "15_your_own.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def formulas():
    """What the notebook's two cells on GPUs calculate."""
    names = dict(memory=memory, preflight=preflight, LoRA=lora.LoRA, pd=pd)
    names |= dict(LlamaConfig=LlamaConfig, Qwen2Config=Qwen2Config)
    for start in ("# From here to a GPU", "def choose"):
        (source,) = (source for source in sources("code") if source.startswith(start))
        exec(source, names)
    return names


def cells_of(label):
    """The row of the README's table on GPUs: of the cpu, and of the three cards."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \| (.+) \|$", README, re.MULTILINE)
    cpu, *cards = row.split(" | ")
    return cpu, cards


def test_the_figures_for_gpus_are_what_the_formula_gives(formulas):
    sides = pd.DataFrame(formulas["sides"])
    quoted = [label for label in sides.index if f"\n| {label} |" in README]
    assert len(quoted) == 11
    for label in quoted:
        assert cells_of(label)[1] == [str(value) for value in sides.loc[label]]
    batches = [rows.split(" x ") for rows in sides.loc["rows x accumulation"]]
    for i, setting in enumerate(("per_device_train_batch_size", "gradient_accumulation_steps")):
        values = [batch[i] for batch in batches]
        assert re.search(rf"\| `{setting}` .* \| {' [|] '.join(values)} \|\n", "".join(sources("markdown")))
    table = pd.DataFrame(formulas["table"], index=list(formulas["SHAPES"])).loc["Qwen2.5-3B"]
    assert cells_of("the same for Qwen2.5-3B, 16 bits")[1] == [v for way, v in table.items() if "16 bits" in way]


def test_the_figures_for_the_cpu_are_those_of_the_results_and_recipes(monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "cpu")

    def measured(method, column):
        return median(float(row[column]) for row in compare.read() if row["method"] == method)

    runs, settings = ("SFT", "SFT, GRPO"), [recipes.recipe(name) for name in ("sft", "grpo")]
    gigabytes = [f"{measured(run, 'peak_memory_mb') * memory.MB / 1e9:.1f}" for run in runs]
    assert cells_of("training, GB")[0] == ", ".join(gigabytes)
    (sft, grpo), (short, long) = gigabytes, [f"{measured(run, 'train_seconds'):.0f}" for run in runs]
    assert f"SFT took {short} s and {sft} GB, GRPO {long} s and {grpo} GB" in "".join(sources("markdown"))
    assert cells_of("seconds of a whole run")[0] == f"{short}, {long}"
    rows = [f"{s['per_device_train_batch_size']} x {s.get('gradient_accumulation_steps', 1)}" for s in settings]
    assert [cells_of(label)[0] for label in ("rows x accumulation", "for GRPO")] == rows
    for label, names in (("SFT", ["sft"]), ("DPO and KTO", ["dpo", "kto"]), ("GRPO and PPO", ["grpo", "ppo"])):
        rates = [float(rate) for rate in cells_of(f"rate, {label}")[0].split(", ")]
        assert rates == [recipes.recipe(name)["learning_rate"] for name in names]


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


def test_what_is_said_of_adding_names_files_and_names_that_are_there():
    told = README[README.index("## Adding to it") :].split("\n## ")[0]
    paths = re.findall(r"`((?:notebooks|rlnb|data|tests)/[\w./]*)`", told)
    assert len(paths) > 15 and [path for path in paths if not (ROOT / path).exists()] == []
    names = {name for name in re.findall(r"`([A-Z]{3,})` of|, `([A-Z]{3,})`", told) for name in name if name}
    code = "".join(path.read_text(encoding="utf-8") for path in map(ROOT.joinpath, paths) if path.suffix == ".py")
    assert names and [name for name in names if not re.search(rf"^{name}\b", code, re.MULTILINE)] == []


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
