"""The formulas of PPO for language models, as functions of tensors that know no model and no trainer.

A name ends in its shape: B completions of at most T tokens, or N tokens in one row. `mask_BT` is boolean
and says which tokens are there: each row is a run of True from the left, then padding. What stands at
padding is never read, so it may be anything. KL and log-probabilities are in nats.

Papers: Schulman et al. 2017, PPO, arXiv 1707.06347; Schulman et al. 2016, GAE, arXiv 1506.02438;
Ziegler et al. 2019, Fine-tuning from human preferences, arXiv 1909.08593; Stiennon et al. 2020,
arXiv 2009.01325; Ouyang et al. 2022, InstructGPT, arXiv 2203.02155.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each token that the policy has drawn: log p - log q.

    It is unbiased and may be negative (k1 in J. Schulman, Approximating KL Divergence, 2020). As a
    penalty in the reward it is the estimate whose expected gradient is right.
    """
    return log_probs - reference


def token_rewards(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token: minus kl_coef times its KL, and on the last the completion's score too.

    Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2: R(x, y) = r(x, y) - beta log(pi / pi_ref).
    """
    rewards_BT = (-kl_coef * kl_BT).masked_fill(~mask_BT, 0)
    rewards_BT[torch.arange(len(score_B)), mask_BT.sum(1) - 1] += score_B
    return rewards_BT


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both (B, T), 0 at padding.

    GAE (2016), eq. 16: A_t = sum over l of (gamma lam)^l delta_{t+l}, where eq. 10 has
    delta_t = r_t + gamma V_{t+1} - V_t, and computed here from the back: A_t = delta_t + gamma lam A_{t+1}.
    lam = 0 gives delta itself (eq. 17: little variance, biased by V), lam = 1 the discounted sum of
    rewards less V_t (eq. 18: unbiased). The last token ends the episode, whether or not it is the end
    token: beyond it V = 0. The return, which V is fitted to, is A_t + V_t.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * advantage_B, 0)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], 0)
        advantages_BT[:, t] = advantage_B
    return advantages_BT, (advantages_BT + values_BT).masked_fill(~mask_BT, 0)


def whiten(x_BT: Tensor, mask_BT: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """x with mean 0 and variance 1 (over n, not n - 1) over the tokens that are there, and 0 at padding.

    total: sums a tensor over all processes; default: there is one.
    """
    n = total(mask_BT.sum().to(x_BT.dtype))
    mean = total(x_BT.masked_fill(~mask_BT, 0).sum()) / n
    variance = total((x_BT - mean).masked_fill(~mask_BT, 0).square().sum()) / n
    return ((x_BT - mean) * (variance + 1e-8).rsqrt()).masked_fill(~mask_BT, 0)


def policy_loss(
    log_probs_N: Tensor, old_N: Tensor, advantages_N: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated, and whether the clip holds the token back: per token.

    PPO (2017), eq. 7: L = min(r A, clip(r, 1 - eps, 1 + eps) A) with r = p / p_old (eq. 6). Where the
    clip decides, the gradient is 0: the policy has moved far enough on this token for this batch.
    """
    ratio_N = (log_probs_N - old_N).exp()
    free_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - cliprange, 1 + cliprange) * advantages_N
    return -torch.minimum(free_N, clipped_N), clipped_N < free_N


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, cliprange: float) -> Tensor:
    """Half the squared error of the value: per token.

    As in OpenAI's baselines and in Stiennon et al. (2020) the larger of two errors counts, that of V
    and that of V held within `cliprange` of what it was at the rollout.
    """
    error_N = (values_N - returns_N).square()
    clipped_N = (values_N.clamp(old_N - cliprange, old_N + cliprange) - returns_N).square()
    return 0.5 * torch.maximum(error_N, clipped_N)


def plan_updates(
    lengths_B: Tensor, epochs: int, mini_batches: int, rows_at_once: int
) -> list[list[Tensor]]:
    """Which rows each update takes: epochs * mini_batches lists of micro-batches, each a tensor of rows.

    Every epoch cuts a new random order (torch's global generator) into mini-batches. A mini-batch is
    sorted by length and cut into pieces of like length, which need little padding.
    """
    updates = []
    for _ in range(epochs):
        for rows in torch.randperm(len(lengths_B)).tensor_split(mini_batches):
            by_length = rows[lengths_B[rows].argsort(stable=True)]
            updates.append(list(by_length.split(rows_at_once)))
    return updates
