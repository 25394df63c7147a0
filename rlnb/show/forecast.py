"""What a run will cost, before it starts: memory from the model's shape (rlnb.model.memory), seconds from
short timings of this machine.

A timing is a finished run of the same method, model and profile on this machine: an earlier one of
the registry, or a `trial` of a few steps. Trials have a registry of their own, in `.trials` of the
other. Step times grow with the batch and, a little, with the rank; a change of more than FAR calls
for a new trial.
"""

import functools
import gc
import inspect
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlnb.show import live
from rlnb import machine
from rlnb.record import runs
from rlnb.train import recipes
from rlnb.model import memory, load as models
from rlnb.task import problems
from rlnb.model.lora import LoRA, skeleton, smallest_width, target_layers

STEPS, PROBLEMS = 4, 256  # of a trial: one whole batch of held-out problems
SIDES = {"dpo": 2, "orpo": 2, "reward_model": 2}  # sequences per row of a batch
SAMPLING = ("grpo", "ppo", "rloo")
ADAPTER = 0.6  # the time that an adapter's parameter takes where one of the base takes 1: measured
LATER = 1.45  # what a run that samples grows by, over its first steps, which see few lengths: measured on CPU
HELD = 2.0  # bytes that glibc holds for one in use; each process measures its own (`note`)
SIZES = ("batch", "accumulate", "max_new_tokens", "rank", "group", "epochs", "beta")  # of a step
FAR = math.log(1.6)


@dataclass(frozen=True)
class Forecast:
    """trainable: parameters. memory: bytes that training takes; peak: bytes of this process at its
    highest, or on a GPU of torch's allocator. step, seconds: of a step and of the whole run, None
    without a timing. exact: whether a timing is of these sizes, or near them.
    """

    trainable: int
    memory: int
    peak: int
    step: float | None = None
    seconds: float | None = None
    exact: bool = False

    def __str__(self) -> str:
        spent = "time unknown" if self.seconds is None else f"about {self.seconds:.0f} s"
        return f"{self.trainable:,} parameters train, {spent}, {self.peak / memory.MB:,.0f} MB at the peak"


def forecast(recipe: recipes.Recipe) -> Forecast:
    """What a run with these settings will cost here. Takes milliseconds; starts nothing."""
    predicted = _memory(*_shape(recipe))
    grows = int(need(recipe) * _RATIO.get(recipe.method, 1.0 if recipes._has_cuda() else HELD))
    found = timings(recipe.method)
    step, seconds, near = _time(recipe, found) if found else (None, None, False)
    return Forecast(predicted.trainable, grows, held() + grows, step, seconds, near)


def ranks(model: str | None = None) -> list[int]:
    """The ranks worth a choice: powers of two, up to the narrowest layer that an adapter is on."""
    width = narrowest(model or recipes.model_name())
    return [2**k for k in range(width.bit_length()) if 2**k <= width]


@functools.cache
def narrowest(model: str) -> int:
    """The smallest width of a layer that an adapter goes on."""
    return smallest_width(target_layers(_bones(model)))


@functools.cache
def _bones(model: str) -> Any:
    from transformers import AutoConfig

    return skeleton(AutoConfig.from_pretrained(models.resolve(model)))


# --- memory --------------------------------------------------------------------------------------

_RATIO: dict[str, float] = {}  # method -> what this process grew by, over what was needed


def need(recipe: recipes.Recipe) -> int:
    """Bytes: of training, or of measuring afterwards, whose largest part is the cache of a batch."""
    model, config = recipes.model_name(), _bones(recipes.model_name()).config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", heads)
    token = 2 * 4 * config.num_hidden_layers * heads * head  # keys and values
    rows, tokens = min(256, recipe.test_problems), lengths(model)[0] + recipe.max_new_tokens
    return max(_memory(*_shape(recipe)).peak, rows * tokens * token)


def note(recipe: recipes.Recipe, before: int, run: runs.Run, later: float = 1.0) -> None:
    """Learn from a run how much this process grows. before: `held` when it began. later: how much
    more a whole run grows.
    """
    peak = run.peak_gpu_memory_mb if recipes._has_cuda() else run.peak_memory_mb
    if peak:
        _RATIO[recipe.method] = later * max(0.0, peak * memory.MB - before) / need(recipe)


def held() -> int:
    """Bytes that this process holds now, or on a GPU torch's allocator."""
    if recipes._has_cuda():
        import torch

        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def _shape(recipe: recipes.Recipe) -> tuple[str, str, int, int, int]:
    rows = recipe.batch // recipe.accumulate
    return recipes.model_name(), recipe.method, recipe.rank, rows, recipe.max_new_tokens


@functools.lru_cache(4096)
def _memory(model: str, method: str, rank: int, rows: int, new: int) -> memory.Prediction:
    """Of sequences as long as the longest of some. A reward model and fused losses hold no logits."""
    prompt, whole = lengths(model)
    predicted = memory.predict(
        model, LoRA(rank=rank), batch=max(1, rows) * SIDES.get(method, 1),
        length=prompt + new if method in SAMPLING else whole,
        checkpointing=recipes._has_cuda() and model != "abacus-3m",
    )  # fmt: skip
    return predicted if method == "orpo" else replace(predicted, logits=0)


@functools.cache
def lengths(model: str) -> tuple[int, int]:
    """Tokens of the longest prompt of some training problems, and with a model solution behind it."""
    from transformers import AutoTokenizer

    from rlnb.model import sampling

    tokenizer = AutoTokenizer.from_pretrained(models.resolve(model))
    some = problems.load("train")[:128]
    prompts = sampling.tokenize(tokenizer, [problems.prompt(p, recipes.system()) for p in some])
    answers = tokenizer([problems.solution(p) for p in some])["input_ids"]
    pairs = zip(prompts, answers, strict=True)
    return max(map(len, prompts)), max(len(p) + len(a) + 1 for p, a in pairs)


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What one run took, in seconds: until the first step began, for each step, and after the last,
    which is 0 for a run that was not measured on held-out problems before it ended.
    """

    config: Mapping[str, Any]
    before: float
    step: float
    after: float


def timings(method: str | None) -> list[Timing]:
    """Of the runs of a method (None: of all) with this model and profile here, newest first."""
    folders = [runs.root(), runs.root() / ".trials"]
    files = tuple(file for folder in folders for file in folder.glob("[!.]*/run.json"))
    stamp = tuple((str(file), file.stat().st_mtime_ns) for file in files)
    here = (recipes.model_name(), recipes.profile(), machine.describe()["platform"])
    known = _known(stamp)
    return [t for at, t in known if at[:3] == here and method in (None, at[3])]


@functools.lru_cache(2)
def _known(stamp: tuple) -> list[tuple[tuple, Timing]]:
    found = []
    for folder in (runs.root(), runs.root() / ".trials"):
        for run in runs.all(folder):
            timing = timing_of(run)
            if timing:
                place = (run.model, run.profile, run.machine.get("platform"), run.method)
                found.append((run.started, place, timing))
    found.sort(key=lambda item: item[0], reverse=True)
    return [(place, timing) for _, place, timing in found]


def timing_of(run: runs.Run) -> Timing | None:
    """None for a run that did not end well, or made but one step."""
    if run.status != "done" or run.seconds is None:
        return None
    at = [row["seconds"] for row in run.curve() if "seconds" in row and live.metrics(row)]
    if len(at) < 2:
        return None
    step = (at[-1] - at[0]) / (len(at) - 1)
    after = run.seconds - at[-1] if run.result else 0.0
    return Timing(run.config, max(0.0, at[0] - step), step, after)


def _time(recipe: recipes.Recipe, found: list[Timing]) -> tuple[float, float, bool]:
    """Seconds of a step and of the whole, from the nearest timings, and whether they are near."""
    distance = {id(t): _distance(recipe, t.config) for t in found}
    least = min(distance.values())
    nearest = [t for t in found if distance[id(t)] <= least + 1e-9][:3]
    step = statistics.median(t.step * _work(vars(recipe)) / _work(t.config) for t in nearest)
    before = statistics.median(t.before for t in nearest)
    each = [t.after / t.config["test_problems"] for t in found if t.after > 0.2]
    after = recipe.test_problems * statistics.median(each[:3]) if each else 0.0
    return step, before + recipe.steps * step + after, least <= FAR


def _work(config: Mapping[str, Any]) -> float:
    """What a step's time is about proportional to."""
    predicted = _memory(recipes.model_name(), "sft", config["rank"], 1, 1)
    base = predicted.parameters - predicted.trainable
    return config["batch"] * (base + ADAPTER * predicted.trainable)


def _distance(recipe: recipes.Recipe, config: Mapping[str, Any]) -> float:
    """How far apart the sizes of a step are. Whether a KL is computed is a matter of yes or no."""
    total = 0.0
    for name in SIZES:
        mine, other = getattr(recipe, name, None), config.get(name)
        if mine is None or other is None or mine == other:
            continue
        if name == "beta" or not mine or not other:
            total += bool(mine) != bool(other)
        else:
            total += abs(math.log(mine / other)) * (0.25 if name == "rank" else 1)
    return total


def trial(
    train: Callable[..., runs.Run], recipe: recipes.Recipe, seed: int = 0, **given: Any
) -> runs.Run:
    """Time a few steps of the real thing at these sizes, apart from the registry.

    train: as rlnb.train.methods.dpo. given: what else it takes. It starts from runs that are there: where
    one would have to be made first, the base serves, which costs the same.
    """
    from rlnb.train import methods as training
    from rlnb.task import rewards

    takes = inspect.signature(train).parameters
    if "start" in takes and given.get("start", takes["start"].default) == "sft":
        given["start"] = training.find_sft(seed, recipe.rank) or "base"
    shipped = recipes.model_name() == "abacus-3m" or training._find("reward_model", seed)
    if "reward" in takes and given.get("reward") is None and not shipped:
        given["reward"] = rewards.correctness
    small = replace(recipe, steps=STEPS, test_problems=min(PROBLEMS, recipe.test_problems))
    before = held()
    with runs.apart(runs.root() / ".trials"):
        run = train(seed=seed, recipe=small, **given)
    changing = recipe.method in SAMPLING and not recipes._has_cuda()
    note(small, before, run, LATER if changing else 1.0)
    shutil.rmtree(run.adapter, ignore_errors=True)
    return run


def tidy() -> None:
    """Give back what a run has left: objects in circles, and freed memory that glibc holds."""
    gc.collect()
    machine.trim()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
