"""A batch of PPO's rollouts, and the figures that are logged of it.

Their names are those of TRL's GRPOTrainer where it logs the same. TRL's PPOTrainer, up to 1.12, had
other names for some:

    reward                  objective/scores
    kl/sequence             objective/kl, with kl_estimator="k1"
    kl                      the same per token
    entropy                 policy/entropy_avg (objective/entropy sums -log p of a completion's tokens)
    objective/rlhf_reward   the same: score less the KL penalty, summed over a completion
    policy/loss, policy/clipfrac, policy/ratio          loss/policy_avg, policy/clipfrac_avg, val/ratio
    policy/approx_kl        policy/approxkl_avg, there 0.5 (log r)^2 and here r - 1 - log r
    value/loss, value/clipfrac                          loss/value_avg, val/clipfrac_avg
    value/explained_variance                            1 - Var(return - V) / Var(return)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlnb.train.ppo.maths import kl_estimate
from rlnb.train.ppo.model import right_pad, spans


@dataclass
class Rollouts:
    """Completions and what is known of them before the first update. Shapes as in maths.py."""

    ids: Tensor  # (B, L): prompt and completion, padded on the right
    lengths: Tensor  # (B,): of prompt and completion
    predicts: Tensor  # (B, L): at these positions the next token is the completion's
    mask: Tensor  # (B, T): tokens of the completion, its end token included
    finished: Tensor  # (B,): ended before the limit
    judged: Tensor  # (B, rewards): what each reward says, NaN for None
    reward: Tensor  # (B,): their weighted sum
    log_probs: Tensor | None = None  # (B, T) from here on
    reference: Tensor | None = None  # log-probabilities
    entropies: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor | None = None  # of tokens: score at the end, KL penalty everywhere
    advantages: Tensor | None = None
    returns: Tensor | None = None


def rollouts(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    judged: Tensor,
    reward: Tensor,
    ends: set[int],
    pad: int,
) -> Rollouts:
    """Lay out a batch. Lengths come from the lists, so that the end token may well be the one that pads."""
    device = reward.device
    starts = torch.tensor([len(p) for p in prompt_ids], device=device)
    sizes = torch.tensor([len(c) for c in completion_ids], device=device)
    ids = right_pad(
        [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)], pad, device
    )
    return Rollouts(
        ids=ids,
        lengths=starts + sizes,
        predicts=spans(starts - 1, starts + sizes - 1, ids.shape[1]),
        mask=spans(torch.zeros_like(sizes), sizes, int(sizes.max())),
        finished=torch.tensor([c[-1] in ends for c in completion_ids], device=device),
        judged=judged,
        reward=reward,
    )


def put(target: Tensor, rows: Tensor, mask: Tensor, flat: Tensor) -> None:
    """Write (N,) numbers of some rows' tokens to their places in a (B, T) tensor."""
    part = torch.zeros_like(target[rows])
    part[mask[rows]] = flat.to(target.dtype)
    target[rows] = part


def table(
    batch: Rollouts, names: Sequence[str], estimator: str, gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Columns of float64, a row per completion, from which `summary` makes its figures.

    Sums over real tokens only. names: of the rewards. gather: joins the rows of all processes. The
    critic's columns are there once the returns are.
    """

    def total(x: Tensor) -> Tensor:
        return x.double().masked_fill(~batch.mask, 0).sum(1)

    found = {
        "tokens": batch.mask.sum(1), "read": batch.lengths, "finished": batch.finished,
        "reward": batch.reward, "entropy": total(batch.entropies),
    }  # fmt: skip
    found |= {f"rewards/{name}": batch.judged[:, i] for i, name in enumerate(names)}
    if batch.reference is not None:
        found["k1"] = total(batch.log_probs - batch.reference)
        found["kl"] = total(kl_estimate(batch.log_probs, batch.reference, estimator))
    if batch.returns is not None:
        found["objective"] = total(batch.rewards)
        error = batch.returns - batch.values
        found |= {"value": total(batch.values), "return": total(batch.returns)}
        found |= {"return2": total(batch.returns**2), "error": total(error)}
        found["error2"] = total(error**2)
    gathered = gather(torch.stack([column.double() for column in found.values()], 1)).cpu()
    return dict(zip(found, gathered.unbind(1), strict=True))


def summary(rows: dict[str, Tensor], critic: bool) -> dict[str, float]:
    """The figures of all the completions whose columns these are."""
    n = rows["tokens"].sum()
    found = {
        "completions/mean_length": rows["tokens"].mean(),
        "completions/min_length": rows["tokens"].min(),
        "completions/max_length": rows["tokens"].max(),
        "completions/clipped_ratio": 1 - rows["finished"].mean(),
        "reward": rows["reward"].mean(),
        "reward_std": _deviation(rows["reward"]),
        "entropy": rows["entropy"].sum() / n,
    }
    for name in (name for name in rows if name.startswith("rewards/")):
        values = rows[name][~rows[name].isnan()]
        if len(values):
            found |= {f"{name}/mean": values.mean(), f"{name}/std": _deviation(values)}
    if "kl" in rows:
        found |= {"kl": rows["kl"].sum() / n, "kl/sequence": rows["k1"].mean()}
    if "objective" in rows:
        found["objective/rlhf_reward"] = rows["objective"].mean()
    if "objective" in rows and critic:
        found["value/mean"] = rows["value"].sum() / n
        spread = rows["return2"].sum() / n - (rows["return"].sum() / n) ** 2
        missed = rows["error2"].sum() / n - (rows["error"].sum() / n) ** 2
        if spread > 1e-9:
            found["value/explained_variance"] = 1 - missed / spread
    return {name: float(value) for name, value in found.items()}


def _deviation(x: Tensor) -> Tensor | float:
    return x.std() if len(x) > 1 else 0.0
