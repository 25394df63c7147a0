"""One run of each method as a plain function: what the notebooks show in their cells, for the command
line, the benchmarks and every notebook that starts from an earlier result.

    python -m rlnb train sft --seed 1
    python -m rlnb train dpo
    python -m rlnb train grpo --from base

Every function returns its run, done, with the adapter saved and the held-out result in it. ``start``
is "base", "sft" (the latest SFT run of the same model and seed, or one made now), a run, or the
folder of a saved adapter.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.record import runs
from rlnb.measure import evaluate
from rlnb.train import recipes
from rlnb.model import load as models
from rlnb.data import annotators, shapes as datasets, preferences
from rlnb.task import problems, rewards

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

RESPONSES = problems.DATA.parent / "preferences" / "responses.jsonl"
REWARD_MODEL = problems.DATA.parent / "reward-model"
Start = str | Path | runs.Run


def held_out(recipe: recipes.Recipe) -> list[problems.Problem]:
    """The in-distribution test problems that every notebook reports on."""
    return problems.load("id")[: recipe.test_problems]


def collect_responses(seed: int = 0, n: int = 6) -> list[preferences.Row]:
    """n samples of the SFT model to each training and each validation problem, made now."""
    run = find_or_train_sft(seed)
    model, tokenizer = models.load_model(recipes.model_name(), lora=run.adapter)
    most = 24 if recipes.profile() == "smoke" else None
    tasks = [p for split in ("train", "validation") for p in problems.load(split)[:most]]
    return preferences.collect(
        model, tokenizer, tasks, n, seed=seed, system=recipes.system(),
        max_new_tokens=recipes.recipe("sft").max_new_tokens,
    )  # fmt: skip


def responses(seed: int = 0, held_out: bool = False) -> list[preferences.Row]:
    """What the annotators compare: responses of the SFT model, so that pairs are on-policy.

    held_out: those to validation problems, on which reward models are judged, and not those to
    training problems. The practice model's ship (data/preferences); another model's are sampled
    once and kept with its SFT run.
    """
    file = RESPONSES
    if recipes.model_name() != "abacus-3m":
        file = find_or_train_sft(seed).folder / "responses.jsonl"
        if not file.is_file():
            preferences.write(collect_responses(seed), file)
    rows = preferences.read(file)
    return [row for row in rows if row["id"].startswith("validation") == held_out]


def gold_pairs(held_out: bool = False, seed: int = 0, how: str = "random") -> "Dataset":
    """Pairs that the verifier has compared, of the training or the held-out prompts.

    how: "random" gives one pair of each prompt, "all" every pair (``preferences.pairs``).
    """
    rows = preferences.annotate(responses(seed, held_out), annotators.Verifier())
    return preferences.pairs(rows, how)[0]


def carry_out(run: runs.Run, trainer: Any, recipe: recipes.Recipe) -> evaluate.Report:
    """Trains, saves the adapter, measures on held-out problems and completes the run's record."""
    with run.timer("train"):
        trainer.train()
    models.save_adapter(trainer.model, run.adapter)
    report = evaluate.accuracy(
        trainer.model, trainer.processing_class, held_out(recipe),
        system=recipes.system(), max_new_tokens=recipe.max_new_tokens,
    )  # fmt: skip
    run.finish(**report.summary())
    return report


# --- methods -------------------------------------------------------------------------------------


def sft(
    seed: int = 0, recipe: recipes.SFT | None = None, data: "Dataset | None" = None
) -> runs.Run:
    """Supervised fine-tuning of the base (notebook 02) on prompts and completions, by default some
    of the demonstrations.
    """
    recipe = recipe or recipes.recipe("sft")
    if data is None:
        demos = datasets.subset(problems.load("demonstrations"), recipe.demonstrations, seed)
        data = datasets.prompt_completion(demos, recipes.system())
    model, tokenizer, _ = _policy(recipe, seed, "base")
    from trl import SFTConfig, SFTTrainer

    with _start(recipe, seed, labels=len(data)) as run:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**recipe.trl(run.folder, seed)),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def reward_model(
    seed: int = 0, recipe: recipes.RewardModel | None = None, pairs: "Dataset | None" = None
) -> runs.Run:
    """A reward model (notebook 03) from pairs, by default all of the verifier's; judged on held-out
    ones. On two cores the usual recipe takes some four minutes.
    """
    from rlnb.model import reward_model as reward_models

    recipe = recipe or recipes.recipe("reward_model")
    pairs = _some(pairs or gold_pairs(seed=seed, how="all"), recipe, seed)
    lora = models.LoRA(rank=recipe.rank, alpha=recipe.alpha)
    model, tokenizer = reward_models.load(recipes.model_name(), lora, seed=seed)
    from trl import RewardConfig, RewardTrainer

    with _start(recipe, seed, labels=len(pairs)) as run:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**recipe.trl(run.folder, seed)),
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        with run.timer("train"):
            trainer.train()
        models.save_adapter(model, run.adapter)
        unseen = reward_models.judge_pairs(model, tokenizer, gold_pairs(held_out=True, seed=seed))
        run.finish(pair_accuracy=unseen.accuracy, pair_loss=unseen.loss)
    return run


def dpo(
    seed: int = 0, recipe: recipes.DPO | None = None, start: Start = "sft",
    pairs: "Dataset | None" = None,
) -> runs.Run:  # fmt: skip
    """DPO (notebook 05) on pairs, by default the verifier's."""
    recipe = recipe or recipes.recipe("dpo")
    pairs = _some(pairs, recipe, seed)
    model, tokenizer, parent = _policy(recipe, seed, start)
    from trl import DPOConfig, DPOTrainer

    with _start(recipe, seed, labels=len(pairs), parent=parent) as run:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**recipe.trl(run.folder, seed)),
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def kto(
    seed: int = 0, recipe: recipes.KTO | None = None, start: Start = "sft",
    labels: "Dataset | None" = None,
) -> runs.Run:  # fmt: skip
    """KTO (notebook 06) on completions labelled good or bad, by default both sides of DPO's pairs."""
    recipe = recipe or recipes.recipe("kto")
    labels = labels or preferences.unpair(_some(None, recipe, seed), seed)
    model, tokenizer, parent = _policy(recipe, seed, start)
    from trl import KTOConfig, KTOTrainer

    with _start(recipe, seed, labels=len(labels), parent=parent) as run:
        trainer = KTOTrainer(
            model=model,
            args=KTOConfig(**recipe.trl(run.folder, seed)),
            train_dataset=labels,
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def orpo(
    seed: int = 0, recipe: recipes.ORPO | None = None, start: Start = "base",
    pairs: "Dataset | None" = None,
) -> runs.Run:  # fmt: skip
    """ORPO (notebook 07) on pairs, from the base: imitation and preference in one stage."""
    recipe = recipe or recipes.recipe("orpo")
    pairs = _some(pairs, recipe, seed)
    model, tokenizer, parent = _policy(recipe, seed, start)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    with _start(recipe, seed, labels=len(pairs), parent=parent) as run:
        trainer = ORPOTrainer(
            model=model,
            args=ORPOConfig(**recipe.trl(run.folder, seed)),
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def grpo(
    seed: int = 0, recipe: recipes.GRPO | None = None, start: Start = "sft",
    reward_weights: dict[Callable, float] | None = None,
) -> runs.Run:  # fmt: skip
    """GRPO (notebook 08) on prompts and a checker.

    reward_weights gives a weight to each reward function; default: the checker at 1 and the format
    at recipe.format_weight.
    """
    recipe = recipe or recipes.recipe("grpo_from_base" if start == "base" else "grpo")
    model, tokenizer, parent = _policy(recipe, seed, start)
    from trl import GRPOConfig, GRPOTrainer

    from rlnb.model import sampling

    weights = reward_weights or {rewards.correctness: 1.0, rewards.format_reward: recipe.format_weight}
    with _start(recipe, seed, parent=parent) as run:
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(**recipe.trl(run.folder, seed), reward_weights=list(weights.values())),
            reward_funcs=list(weights),
            train_dataset=datasets.prompts(problems.load("train"), recipes.system()),
            processing_class=tokenizer,
            rollout_func=sampling.rollout,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def ppo(
    seed: int = 0, recipe: recipes.PPO | None = None, start: Start = "sft",
    reward: Any = None, callbacks: "Sequence[TrainerCallback]" = (),
) -> runs.Run:  # fmt: skip
    """RLHF with PPO (notebook 04): a critic, and a reward model's scores.

    reward: what PPOTrainer takes as reward_funcs; default: the reward model that ``judge`` names.
    callbacks: further ones, after the run's own.
    """
    recipe = recipe or recipes.recipe("ppo")
    model, tokenizer, parent = _policy(recipe, seed, start)
    from rlnb.train.ppo import PPOConfig, PPOTrainer

    with _start(recipe, seed, parent=parent) as run:
        trainer = PPOTrainer(
            model=model,
            args=PPOConfig(**recipe.trl(run.folder, seed)),
            reward_funcs=reward or judge(seed),
            train_dataset=datasets.prompts(problems.load("train"), recipes.system()),
            processing_class=tokenizer,
            callbacks=[run.callback(), *callbacks],
        )
        carry_out(run, trainer, recipe)
    return run


def rloo(
    seed: int = 0, recipe: recipes.RLOO | None = None, start: Start = "sft",
    reward: Callable | None = None, callbacks: "Sequence[TrainerCallback]" = (),
) -> runs.Run:  # fmt: skip
    """The same without a critic: TRL's RLOO (notebook 04) on the same reward model."""
    from rlnb.model import reward_model as reward_models

    recipe = recipe or recipes.recipe("rloo")
    if reward is None:
        reward = reward_models.as_reward(*reward_models.load(recipes.model_name(), judge(seed)))
    model, tokenizer, parent = _policy(recipe, seed, start)
    from trl import RLOOConfig, RLOOTrainer

    with _start(recipe, seed, parent=parent) as run:
        trainer = RLOOTrainer(
            model=model,
            args=RLOOConfig(**recipe.trl(run.folder, seed)),
            reward_funcs=reward,
            train_dataset=datasets.prompts(problems.load("train"), recipes.system()),
            processing_class=tokenizer,
            callbacks=[run.callback(), *callbacks],
        )
        carry_out(run, trainer, recipe)
    return run


METHODS = {f.__name__: f for f in (sft, reward_model, ppo, rloo, dpo, kto, orpo, grpo)}
FROM_ANYWHERE = ("ppo", "rloo", "dpo", "kto", "orpo", "grpo")  # the others start from the base


def find_or_train_sft(seed: int = 0, rank: int | None = None) -> runs.Run:
    """The latest finished SFT run of this model, profile and seed with the usual settings, or with
    them and this rank, and with its adapter still there; trains one if there is none.
    """
    return find_sft(seed, rank) or sft(seed, _sft_recipe(rank))


def find_sft(seed: int = 0, rank: int | None = None) -> runs.Run | None:
    """The same without training: None if there is none."""
    return _find("sft", seed, _sft_recipe(rank))


def _sft_recipe(rank: int | None) -> recipes.SFT:
    usual = recipes.recipe("sft")
    if rank is None:
        return usual
    return replace(usual, rank=rank, max_lora_rank=max(rank, usual.max_lora_rank))


def judge(seed: int = 0) -> Path:
    """The folder of a reward model's adapter: the practice model's ships (data/reward-model), of
    another model it is the latest run's with the usual settings, or one trained now.
    """
    if recipes.model_name() == "abacus-3m":
        return REWARD_MODEL
    return (_find("reward_model", seed) or reward_model(seed)).adapter


def ship_reward_model() -> runs.Run:
    """Trains the reward model that ships, and puts its adapter into data/reward-model."""
    run = reward_model()
    shutil.copytree(run.adapter, REWARD_MODEL, dirs_exist_ok=True)
    return run


def main(arguments: argparse.Namespace) -> int:
    """``python -m rlnb train``: one run; prints its line of the registry."""
    options = {"start": arguments.start} if arguments.start else {}
    if options and arguments.method not in FROM_ANYWHERE:
        raise SystemExit(f"{arguments.method} starts from the base: leave --from out.")
    run = METHODS[arguments.method](arguments.seed, **options)
    if run.folder.parent == runs.root():  # else another process tells it
        print(runs.table([run]))
    return 0


# --- what they share -----------------------------------------------------------------------------


def _policy(recipe: recipes.Recipe, seed: int, start: Start) -> tuple[Any, Any, str | None]:
    """The model with its adapter, the tokenizer, and what the adapter came from (None: the base)."""
    if isinstance(start, str) and start == "sft":
        start = find_or_train_sft(seed, recipe.rank)  # a saved adapter keeps its rank
    adapter = None if start == "base" else getattr(start, "adapter", start)
    lora = adapter or models.LoRA(rank=recipe.rank, alpha=recipe.alpha)
    model, tokenizer = models.load_model(
        recipes.model_name(), lora=lora, max_lora_rank=recipe.max_lora_rank, seed=seed
    )
    return model, tokenizer, adapter and str(getattr(start, "id", start))


def _start(recipe: recipes.Recipe, seed: int, **asked: Any):
    return runs.start(recipe.method, model=recipes.model_name(), config=recipe, seed=seed, **asked)


def _some(pairs: "Dataset | None", recipe: recipes.Pairs, seed: int) -> "Dataset":
    """As many of the pairs (default: the verifier's) as the recipe has a budget for, or all there are."""
    pairs = pairs or gold_pairs(seed=seed)
    return datasets.subset(pairs, min(recipe.pairs, len(pairs)), seed)


def _find(method: str, seed: int, recipe: recipes.Recipe | None = None) -> runs.Run | None:
    usual = runs.jsonable(recipe or recipes.recipe(method))
    found = runs.find(
        method=method, model=recipes.model_name(), profile=recipes.profile(), seed=seed,
        status="done",
    )  # fmt: skip
    return next((run for run in found if run.config == usual and run.adapter.is_dir()), None)
