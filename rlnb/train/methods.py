"""Every method from one table: what the command line, the panel, the experiments and other notebooks run.

    train("dpo", seed=1)
    train("dpo", start=sft_run, data=pairs, beta=1.0, max_steps=20)

The notebooks make the same trainers in their cells, with the same settings, and hand them to the same ``fit``.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlnb.data import annotators, preferences, shapes
from rlnb.measure import evaluate
from rlnb.model import LoRA, load_model, sampling
from rlnb.model.folders import base_name, resolve, weights
from rlnb.profiles import PRACTICE, by, model_name, profile
from rlnb.record import runs
from rlnb.record.values import jsonable
from rlnb.task import problems as task
from rlnb.task import rewards
from rlnb.train.loop import fingerprint, fit
from rlnb.train.recipes import adapter, common, recipe

from datasets import Dataset

RESPONSES = task.DATA.parent / "preferences" / "responses.jsonl"
REWARD_MODEL = task.DATA.parent / "reward-model"
Start = str | Path | runs.Run


@dataclass(frozen=True)
class Method:
    """Where the classes are, and what a run starts and learns from unless it is told otherwise."""

    module: str
    name: str  # of the classes, without Config and Trainer
    start: str  # "base", or "sft": the usual SFT run of the same seed
    data: str  # a key of DATA

    def classes(self) -> tuple[type, type]:
        """The config's and the trainer's."""
        module = importlib.import_module(self.module)
        return getattr(module, f"{self.name}Config"), getattr(module, f"{self.name}Trainer")


METHODS = {
    "sft": Method("trl", "SFT", "base", "demonstrations"),
    "reward_model": Method("trl", "Reward", "base", "all pairs"),
    "ppo": Method("rlnb.train.ppo", "PPO", "sft", "prompts"),
    "rloo": Method("trl", "RLOO", "sft", "prompts"),
    "dpo": Method("trl", "DPO", "sft", "pairs"),
    "kto": Method("trl", "KTO", "sft", "labels"),
    "orpo": Method("trl.experimental.orpo", "ORPO", "base", "pairs"),
    "grpo": Method("trl", "GRPO", "sft", "prompts"),
}
COLUMNS = {"demonstrations": ("prompt completion", "messages", "text"), "pairs": ("chosen rejected",),
           "all pairs": ("chosen rejected",), "labels": ("completion label", "chosen rejected"), "prompts": ("prompt",)}
FROM_BASE = ("sft", "reward_model")  # always


def train(
    method: str, seed: int = 0, *, start: Start | None = None, data: Dataset | None = None, reward: Any = None,
    lora: LoRA | None = None, problems: Sequence[task.Problem] | None = None, max_lora_rank: int = 64,
    callbacks: Sequence[Any] = (), check: bool = True, resume: runs.Run | str | bool = False, **settings: Any,
) -> runs.Run:  # fmt: skip
    """One run of a method, done, with its adapter saved and its held-out result in it.

    start: "base", "sft" (the usual SFT run of this seed, or one made now), a run, or an adapter's folder.
    data: what to learn from. reward: for PPO, RLOO and GRPO, what their trainers take as reward_funcs.
    lora: of a new adapter; a saved one keeps its own. problems, check, resume: see ``fit``.
    settings: arguments of the method's config class in place of the recipe's, as beta=1.0.

    Raises ValueError for an unknown method or empty data, TypeError for a setting that there is not.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    spec = METHODS[method]
    if start not in (None, "base") and method in FROM_BASE:
        raise ValueError(f"{method} starts from the base, and start is {start!r}: leave it out")
    if data is not None:
        _check_data(method, data)
    if isinstance(reward, list | tuple) and not reward:
        raise ValueError(f"reward is {reward!r}: give at least one, or leave it out for the usual")
    start = spec.start if start is None else start
    args = _config(method, start, seed, reward, settings)
    lora = lora or adapter(method)
    data = default_data(method, seed) if data is None else data
    model, tokenizer, start = _policy(method, start, lora, seed, max_lora_rank)
    more = _rewards(method, seed, reward)
    trainer = spec.classes()[1](
        model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks), **more
    )
    if method != "reward_model":
        return fit(method, trainer, data, start=start, problems=problems, check=check, resume=resume)
    run = fit(method, trainer, data, problems=(), check=check, resume=resume)
    if problems is not None and not len(problems):  # then its measure is no pair of the workbook's either
        return run
    from rlnb.measure.judge import judge_pairs

    unseen = judge_pairs(model, tokenizer, gold_pairs(held_out=True, seed=seed))
    run.finish(pair_accuracy=unseen.accuracy, pair_loss=unseen.loss)
    return run


def _check_data(method: str, data: Any) -> None:
    """Raise ValueError for data without rows, or without the columns that the method reads."""
    if not len(data):
        raise ValueError(f"data has no rows for {method}: leave it out for the workbook's, or give some")
    needed, there = COLUMNS[METHODS[method].data], getattr(data, "column_names", ())
    if not any(set(columns.split()) <= set(there) for columns in needed):
        says = f"and {method} reads {', or '.join(needed)} of a Dataset, as rlnb.data.shapes makes it"
        raise ValueError(f"data is a {type(data).__name__} with the columns {', '.join(there) or 'none'}, {says}")


def _config(method: str, start: Start, seed: int, reward: Any, settings: dict[str, Any]) -> Any:
    config, _ = METHODS[method].classes()
    if unknown := set(settings) - {field.name for field in fields(config)}:
        raise TypeError(f"{config.__name__} has no argument {', '.join(sorted(unknown))}")
    usual = recipe("grpo_from_base" if method == "grpo" and start == "base" else method)
    if text := [f"{k}={v!r}" for k, v in settings.items() if isinstance(v, str) and type(usual.get(k)) in (int, float)]:
        raise TypeError(f"{config.__name__}: {', '.join(text)} is no number")
    if reward is not None:
        usual.pop("reward_weights", None)  # they were for the usual rewards
    return config(**common(config, seed) | usual | settings)


def _policy(method: str, start: Start, lora: LoRA, seed: int, max_lora_rank: int) -> tuple[Any, Any, Start | None]:
    """The model with its adapter, the tokenizer, and what the adapter came from (None: the base)."""
    if method == "reward_model":
        from rlnb.model import reward_model

        return *reward_model.load(model_name(), lora, seed=seed), None
    if start == "base":
        return *load_model(model_name(), lora, max_lora_rank=max_lora_rank, seed=seed), None
    if start == "sft":
        start = find_or_train_sft(seed, lora.rank)  # a saved adapter keeps its rank
    saved = start.adapter if isinstance(start, runs.Run) else start
    return *load_model(model_name(), saved, max_lora_rank=max_lora_rank, seed=seed), start


def _rewards(method: str, seed: int, reward: Any) -> dict[str, Any]:
    """What a trainer that samples takes beside the others' arguments."""
    if METHODS[method].data != "prompts":
        return {}
    if reward is None and method == "grpo":
        reward = [rewards.correctness, rewards.format_reward]
    elif reward is None and method == "ppo":
        reward = judge(seed)
    elif reward is None:
        from rlnb.model import reward_model

        reward = reward_model.as_reward(*reward_model.load(model_name(), judge(seed)))
    return {"reward_funcs": reward} | ({"rollout_func": sampling.rollout} if method == "grpo" else {})


# --- data ----------------------------------------------------------------------------------------


def default_data(method: str, seed: int) -> Dataset:
    """What a method learns from: as much as the profile has a budget for."""
    kind = METHODS[method].data
    if kind == "demonstrations":
        return demonstrations(seed)
    if kind == "prompts":
        return shapes.prompts(task.load("train"))
    if kind == "all pairs":
        return _some(gold_pairs(seed=seed, how="all"), by(cpu=4096, smoke=32), seed)
    pairs = _some(gold_pairs(seed=seed), by(cpu=512, smoke=32), seed)
    return preferences.unpair(pairs, seed) if kind == "labels" else pairs


def demonstrations(seed: int = 0) -> Dataset:
    """Some of the worked examples, as prompts and completions."""
    some = shapes.subset(task.load("demonstrations"), by(cpu=128, gpu=256, smoke=16), seed)
    return shapes.prompt_completion(some)


def gold_pairs(held_out: bool = False, seed: int = 0, how: str = "random") -> Dataset:
    """Pairs that the verifier has compared, of the training or the held-out prompts.

    how: "random" gives one pair of each prompt, "all" every pair (``preferences.pairs``).
    """
    ranked = preferences.annotate(responses(seed, held_out), annotators.Verifier())
    return preferences.pairs(ranked, how)[0]


def responses(seed: int = 0, held_out: bool = False) -> list[preferences.Row]:
    """What the annotators compare: responses of the SFT model, so that pairs are on-policy.

    held_out: those to validation problems, on which reward models are judged, and not those to
    training problems. The practice model's ship (data/preferences); another model's are sampled once and kept with
    its SFT run. In the smoke profile, where nothing is right after two steps, it gets some of those that ship.
    """
    file, some = RESPONSES, by(cpu=None, smoke=None if model_name() == PRACTICE else 24)
    if model_name() != PRACTICE and profile() != "smoke":
        file = find_or_train_sft(seed).folder / "responses.jsonl"
        if not file.is_file():
            preferences.write(sample_responses(seed), file)
    return [row for row in preferences.read(file) if row["id"].startswith("validation") == held_out][:some]


def sample_responses(seed: int = 0, n: int = 6) -> list[preferences.Row]:
    """n samples of the SFT model to each training and each validation problem, made now."""
    model, tokenizer = load_model(model_name(), find_or_train_sft(seed).adapter)
    asked = [p for split in ("train", "validation") for p in task.load(split)[: by(cpu=None, smoke=24)]]
    found = sampling.sample(
        model, tokenizer, [task.prompt(p) for p in asked], n, seed=seed, max_new_tokens=evaluate.max_new_tokens()
    )
    return preferences.rows(asked, found.texts)


def _some(rows: Dataset, n: int, seed: int) -> Dataset:
    return shapes.subset(rows, min(n, len(rows)), seed)


# --- earlier runs --------------------------------------------------------------------------------


def find(method: str, seed: int = 0, **wanted: Any) -> runs.Run | None:
    """The latest of ``find_all``, None if there is none."""
    return next(iter(find_all(method, seed, **wanted)), None)


def find_all(
    method: str, seed: int = 0, *, lora: LoRA | None = None, data: Dataset | None = None,
    start: runs.Run | None = None, **settings: Any,
) -> list[runs.Run]:  # fmt: skip
    """The finished runs of this model and profile with the usual settings, or with these in their place, that
    learnt from the usual rewards and data, or from these, to the row, and whose adapter is still there. The
    newest is first. start: the run that they have to have started from.
    """
    method, usual = method.removesuffix("_from_base"), recipe(method)
    lora = lora or adapter(method)
    wanted = usual | settings | {"rank": lora.rank, "alpha": lora.alpha, "rewards": _reward_names(method)}
    wanted |= {"data": fingerprint(default_data(method, seed) if data is None else data)}
    wanted |= {"weights": weights(model_name())}
    wanted |= {} if isinstance(lora.targets, str) else {"targets": sorted(lora.targets)}
    found = runs.find(
        method=method, model=base_name(resolve(model_name())), profile=profile(), seed=seed, status="done",
        **({"parent": start.id} if start else {}),
    )  # fmt: skip
    same = [run for run in found if jsonable(wanted) == {key: run.config.get(key) for key in wanted}]
    return [run for run in same if run.adapter.is_dir()]


def _reward_names(method: str) -> list[str] | None:
    """Under which a run has the usual rewards in its record."""
    shipped = REWARD_MODEL.name if model_name() == PRACTICE else "adapter"
    names = {"grpo": ["correctness", "format_reward"], "rloo": ["reward_model"], "ppo": [shipped]}
    return names.get(method)


def resume(id: str, method: str) -> runs.Run:
    """Goes on with a run of the registry that ended early, in the same settings, from its newest checkpoint.

    Raises ValueError for a run of another method, that is done or has no checkpoint, and for one with another
    model, profile, reward or data set than the usual: that goes on where it began, with ``fit(..., resume=id)``.
    """
    run = runs.load(id)
    if run.status == "done" or run.method != method:
        raise ValueError(f"run {id} is {run.status}, of {run.method}: there is no {method} to go on with")
    if (run.model, run.profile) != (here := (base_name(resolve(model_name())), profile())):
        raise ValueError(f"run {id} is of {run.model} in profile {run.profile}, and here are {here[0]} and {here[1]}: "
                         "set RLNB_MODEL and RLNB_PROFILE")  # fmt: skip
    start = run.parent if run.parent is None or "/" in run.parent else runs.load(run.parent)
    start = None if run.method in FROM_BASE else start or "base"
    usual = _config(run.method, start or "base", run.seed, None, {})
    changed = {field.name: run.config[field.name] for field in fields(usual) if field.name in run.config
               and run.config[field.name] != jsonable(getattr(usual, field.name))}  # fmt: skip
    lora = replace(adapter(run.method), **{key: run.config[key] for key in ("rank", "alpha") if key in run.config})
    return train(run.method, run.seed, start=start, lora=lora, resume=run, **changed)


def find_or_train_sft(seed: int = 0, rank: int | None = None) -> runs.Run:
    """The usual SFT run of this seed, with this rank if one is given; trained now if there is none."""
    lora = adapter("sft")
    lora = lora if rank is None else replace(lora, rank=rank)
    found = find("sft", seed, lora=lora, data=demonstrations(seed))
    return found or train("sft", seed, lora=lora, max_lora_rank=max(64, lora.rank))


def judge(seed: int = 0) -> Path:
    """The folder of a reward model's adapter: the practice model's ships (data/reward-model), of another
    model it is the latest run's with the usual settings, or one trained now.
    """
    if model_name() == PRACTICE:
        return REWARD_MODEL
    return (find("reward_model", seed) or train("reward_model", seed)).adapter
