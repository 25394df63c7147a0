"""The mathematics of PPO for language models, as functions of tensors that know no model and no trainer.

Shapes: B completions of at most T tokens. A (B, T) tensor has one number per token, and `mask`, (B, T)
and boolean, says which tokens are there: each row is a run of True from the left, then padding. What
stands at padding is never read, so it may be anything. KL and log-probabilities are in nats.

Papers: Schulman et al. 2017, PPO, arXiv 1707.06347; Schulman et al. 2016, GAE, arXiv 1506.02438;
Ziegler et al. 2019, Fine-tuning from human preferences, arXiv 1909.08593; Stiennon et al. 2020,
arXiv 2009.01325; Ouyang et al. 2022, InstructGPT, arXiv 2203.02155.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # sums a tensor over all processes


def alone(x: Tensor) -> Tensor:
    """The `Total` of a single process."""
    return x


def masked_moments(x: Tensor, mask: Tensor, total: Total = alone) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n, not n - 1) of the tokens that are there, over all processes."""
    n = total(mask.sum().to(x.dtype))
    mean = total(x.masked_fill(~mask, 0).sum()) / n
    return mean, total((x - mean).masked_fill(~mask, 0).square().sum()) / n


def whiten(x: Tensor, mask: Tensor, shift: bool = True, total: Total = alone) -> Tensor:
    """x with variance 1 over the tokens that are there, and with mean 0 if `shift`; 0 at padding.

    Advantages are shifted, which makes the batch's mean the baseline. Rewards are not: their sign
    says what is better than nothing.
    """
    mean, variance = masked_moments(x, mask, total)
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return (white if shift else white + mean).masked_fill(~mask, 0)


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str = "k1") -> Tensor:
    """An estimate of KL(policy || reference) from each token that the policy has drawn.

    With d = log p - log q of the token: k1 = d, which is unbiased and may be negative, and
    k3 = exp(-d) - 1 + d, which is unbiased and never negative (J. Schulman, Approximating KL
    Divergence, 2020). As a penalty in the reward only k1 has the right expected gradient.
    """
    d = log_probs - reference
    if kind == "k1":
        return d
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"the KL estimator is {kind!r}: it must be 'k1' or 'k3'")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token: minus kl_coef times its KL, and on the last the score as well.

    Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2: R(x, y) = r(x, y) - beta log(pi / pi_ref).
    scores: (B,), of whole completions.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0)
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both (B, T), 0 at padding.

    GAE (2016), eq. 16: A_t = sum over l of (gamma lam)^l delta_{t+l}, where eq. 10 has
    delta_t = r_t + gamma V_{t+1} - V_t, and computed here from the back: A_t = delta_t + gamma lam A_{t+1}.
    lam = 0 gives delta itself (eq. 17: little variance, biased by V), lam = 1 the discounted sum of
    rewards less V_t (eq. 18: unbiased). The last token ends the episode, whether or not it is the end
    token: beyond it V = 0. The return, which V is fitted to, is A_t + V_t.
    """
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0)
        next_value = torch.where(mask[:, t], values[:, t], 0)
        advantages[:, t] = advantage
    return advantages, (advantages + values).masked_fill(~mask, 0)


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated, and whether the clip holds the token back: per token.

    PPO (2017), eq. 7: L = min(r A, clip(r, 1 - eps, 1 + eps) A) with r = p / p_old (eq. 6). Where the
    clip decides, the gradient is 0: the policy has moved far enough on this token for this batch.
    """
    ratio = (log_probs - old).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(free, clipped), clipped < free


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the value, and whether the clip holds it back: per token.

    As in OpenAI's baselines and in Stiennon et al. (2020) the larger of two errors counts, that of V
    and that of V kept within `cliprange` of what it was at the rollout; None: no clipping.
    """
    error = (values - returns).square()
    if cliprange is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    kept = (torch.clamp(values, old - cliprange, old + cliprange) - returns).square()
    return 0.5 * torch.maximum(error, kept), kept > error


def adapted_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next coefficient of the KL penalty, larger if `kl` (nats per sequence) is above target.

    Ziegler et al. (2019), 2.2: e = clip(kl / target - 1, -0.2, 0.2), beta <- beta (1 + K e), with
    K = episodes / horizon as in their code, and at most 1: after `horizon` episodes it has moved by a
    factor of e^0.2 or so at most, and a horizon shorter than a step never turns the penalty's sign.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(episodes / horizon, 1))


def plan_updates(
    lengths: Tensor, epochs: int, mini_batches: int, rows_at_once: int
) -> list[list[Tensor]]:
    """Which rows each update takes: epochs * mini_batches lists of micro-batches, each a tensor of rows.

    Every epoch cuts a new random order (torch's global generator) into mini-batches. A mini-batch is
    sorted by length, (B,), and cut into pieces of like length, which need little padding.
    """
    updates = []
    for _ in range(epochs):
        for rows in torch.randperm(len(lengths)).tensor_split(mini_batches):
            by_length = rows[lengths[rows].argsort(stable=True)]
            updates.append(list(by_length.split(rows_at_once)))
    return updates


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen so far (Chan et al. 1979), to normalise rewards with."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of the squared differences from the mean

    def update(self, x: Tensor) -> None:
        """Take in a batch of numbers, of any shape."""
        x = x.double()
        n, mean = x.numel(), x.mean().item()
        squares = (x - mean).square().sum().item()
        shift, count = mean - self.mean, self.count + n
        self.squares += squares + shift**2 * self.count * n / count
        self.mean += shift * n / count
        self.count = count

    def normalise(self, x: Tensor) -> Tensor:
        """x less the mean, over the standard deviation (1 where all numbers seen were equal)."""
        variance = self.squares / self.count
        return (x - self.mean) / (variance**0.5 if variance > 1e-12 else 1.0)
