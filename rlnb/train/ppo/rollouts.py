"""A batch of PPO's rollouts, and the figures that are logged of it.

Their names are those of TRL's GRPOTrainer where it logs the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlnb.train.ppo.formulas import kl_estimate

import torch
from torch import Tensor


@dataclass
class Rollouts:
    """B completions and what is known of them before the first update. T: tokens of the longest."""

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    ids_BL: Tensor  # prompt and completion, padded on the right
    length_B: Tensor  # of prompt and completion
    predicts_BL: Tensor  # at these positions the next token is the completion's
    mask_BT: Tensor  # tokens of the completion, its end token included
    finished_B: Tensor  # ended before the limit
    scores_BR: Tensor | None = None  # what each of R rewards says, NaN for None
    score_B: Tensor | None = None  # their weighted sum
    log_probs_BT: Tensor | None = None
    reference_BT: Tensor | None = None  # log-probabilities
    entropy_BT: Tensor | None = None
    values_BT: Tensor | None = None
    rewards_BT: Tensor | None = None  # score at the end, KL penalty everywhere
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None


def lay_out(found: Mapping[str, list], ends: set[int], pad: int, device: Any = None) -> Rollouts:
    """A batch of what `sampling.rollout` has returned, a row for each prompt.

    Lengths come from the lists, so that the end token may well be the one that pads.
    """
    start_B, size_B = (
        torch.tensor([len(ids) for ids in found[key]], device=device)
        for key in ("prompt_ids", "completion_ids")
    )
    pairs = zip(found["prompt_ids"], found["completion_ids"], strict=True)
    ids_BL = right_pad([[*p, *c] for p, c in pairs], pad, device)
    position, end_B1 = torch.arange(ids_BL.shape[1], device=device), (start_B + size_B)[:, None]
    return Rollouts(
        found["prompt_ids"], found["completion_ids"], ids_BL, length_B=start_B + size_B,
        predicts_BL=(position >= start_B[:, None] - 1) & (position < end_B1 - 1),
        mask_BT=position[: int(size_B.max())] < size_B[:, None],
        finished_B=torch.tensor([c[-1] in ends for c in found["completion_ids"]], device=device),
    )  # fmt: skip


def right_pad(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> Tensor:
    """(rows, longest) ids."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)


def put(target_BT: Tensor, rows: Tensor, mask_BT: Tensor, flat_N: Tensor) -> None:
    """Write the numbers of some rows' tokens to their places."""
    part = torch.zeros_like(target_BT[rows])
    part[mask_BT[rows]] = flat_N.to(target_BT.dtype)
    target_BT[rows] = part


def summary(
    batch: Rollouts, names: Sequence[str], gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The figures of the completions of all processes. names: of the rewards. gather: joins their rows.

    value/explained_variance is 1 - Var(return - V) / Var(return): 1 for a perfect critic, 0 for a constant.
    """

    def rows(x_B: Tensor) -> Tensor:
        return gather(x_B.double()).cpu()

    def total(x_BT: Tensor) -> Tensor:
        return rows(x_BT.double().masked_fill(~batch.mask_BT, 0).sum(1)).sum()

    def variance(x_BT: Tensor) -> Tensor:
        return total(x_BT**2) / n - (total(x_BT) / n) ** 2

    length_B, score_B = rows(batch.mask_BT.sum(1)), rows(batch.score_B)
    n, episodes = length_B.sum(), len(length_B)
    found = {
        "completions/mean_length": length_B.mean(), "completions/clipped_ratio": 1 - rows(batch.finished_B).mean(),
        "reward": score_B.mean(), "reward_std": score_B.std() if episodes > 1 else 0.0,
        "entropy": total(batch.entropy_BT) / n,
    }  # fmt: skip
    for name, column_B in zip(names, rows(batch.scores_BR).unbind(1), strict=True):
        if not column_B.isnan().all():
            found[f"rewards/{name}/mean"] = column_B.nanmean()
    kl = total(kl_estimate(batch.log_probs_BT, batch.reference_BT))
    found |= {"kl": kl / n, "kl/sequence": kl / episodes}
    if (spread := variance(batch.returns_BT)) > 1e-9:
        missed = variance(batch.returns_BT - batch.values_BT)
        found["value/explained_variance"] = 1 - missed / spread
    return {name: float(value) for name, value in found.items()}
