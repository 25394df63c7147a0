"""One run of each method as a plain function: what the notebooks show in their cells, for the command
line, the benchmarks and every notebook that starts from an earlier result.

    python -m rlnb train sft --seed 1
    python -m rlnb train grpo --from base
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from rlnb import datasets, evaluate, models, problems, recipes, rewards, runs


def held_out(recipe: recipes.Recipe) -> list[problems.Problem]:
    """The in-distribution test problems that every notebook reports on."""
    return problems.load("id")[: recipe.test_problems]


def carry_out(run: runs.Run, trainer, recipe: recipes.Recipe) -> evaluate.Report:
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


def sft(seed: int = 0, recipe: recipes.SFT | None = None) -> runs.Run:
    """Supervised fine-tuning of the base on a few demonstrations (notebook 02)."""
    recipe = recipe or recipes.recipe("sft")
    lora = models.LoRA(rank=recipe.rank, alpha=recipe.alpha)
    model, tokenizer = models.load_model(recipes.model_name(), lora=lora, seed=seed)
    from trl import SFTConfig, SFTTrainer

    demos = datasets.subset(problems.load("demonstrations"), recipe.demonstrations, seed)
    with runs.start(
        "sft", model=recipes.model_name(), config=recipe, seed=seed, labels=len(demos)
    ) as run:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**recipe.trl(run.folder, seed)),
            train_dataset=datasets.prompt_completion(demos, recipes.system()),
            processing_class=tokenizer,
            callbacks=[run.callback()],
        )
        carry_out(run, trainer, recipe)
    return run


def grpo(
    seed: int = 0,
    recipe: recipes.GRPO | None = None,
    start: str | Path | runs.Run = "sft",
    reward_weights: dict[Callable, float] | None = None,
) -> runs.Run:
    """GRPO (notebook 08) from "base", from "sft", from a run or from a saved adapter's folder.

    "sft" is the latest SFT run of the same model and seed, or one made now. reward_weights gives a
    weight to each reward function; default: the checker at 1 and the format at recipe.format_weight.
    """
    recipe = recipe or recipes.recipe("grpo_from_base" if start == "base" else "grpo")
    parent = find_or_train_sft(seed) if start == "sft" else start
    parent = None if start == "base" else parent
    adapter = getattr(parent, "adapter", parent)
    lora = adapter or models.LoRA(rank=recipe.rank, alpha=recipe.alpha)
    model, tokenizer = models.load_model(recipes.model_name(), lora=lora, seed=seed)
    from trl import GRPOConfig, GRPOTrainer

    from rlnb import sampling

    weights = reward_weights or {rewards.correctness: 1.0, rewards.format: recipe.format_weight}
    with runs.start(
        "grpo", model=recipes.model_name(), config=recipe, seed=seed,
        parent=parent and str(getattr(parent, "id", parent)),
    ) as run:  # fmt: skip
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


def find_or_train_sft(seed: int = 0) -> runs.Run:
    """The latest finished SFT run of this model, profile and seed with the usual settings and with
    its adapter still there; trains one if there is none.
    """
    usual = runs.jsonable(recipes.recipe("sft"))
    found = runs.find(
        method="sft",
        model=recipes.model_name(),
        profile=recipes.profile(),
        seed=seed,
        status="done",
    )
    fit = (run for run in found if run.config == usual and run.adapter.is_dir())
    return next(fit, None) or sft(seed)


def main(arguments: argparse.Namespace) -> int:
    """``python -m rlnb train``: one run; prints its line of the registry."""
    sft_only = arguments.method == "sft"
    run = sft(arguments.seed) if sft_only else grpo(arguments.seed, start=arguments.start)
    print(runs.table([run]))
    return 0
