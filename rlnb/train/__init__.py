"""The methods: settings, one loop for all of them, checks before it, and PPO."""

from rlnb.profiles import by
from rlnb.train.loop import fit
from rlnb.train.methods import demonstrations, find_or_train_sft, gold_pairs, judge, responses, train
from rlnb.train.recipes import adapter, common, recipe

__all__ = [
    "adapter", "by", "common", "demonstrations", "find_or_train_sft", "fit", "gold_pairs", "judge", "recipe",
    "responses", "train",
]  # fmt: skip
