"""PPO's formulas against naive sums, hand-made numbers, closed forms and finite differences."""

import math

import pytest

from rlnb.train.ppo import formulas

import torch

LENGTHS = (5, 1, 3, 8)
WIDTH = max(LENGTHS)
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padded(x):
    """The same with NaN where there is no token: padding is never read."""
    return x.masked_fill(~MASK, math.nan)


# --- advantages ----------------------------------------------------------------------------------


def naive_gae(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), for one row."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    steps = range(len(deltas))
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in steps[t:]) for t in steps]


@pytest.mark.parametrize("gamma", (1.0, 0.9))
@pytest.mark.parametrize("lam", (0.0, 0.5, 0.95, 1.0))
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values = noise(4, WIDTH), noise(4, WIDTH, seed=1)
    advantages, returns = formulas.gae(padded(rewards), padded(values), MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        expected = naive_gae(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(returns[MASK], (advantages + values)[MASK])
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_with_lambda_1_returns_are_rewards_to_go_whatever_the_critic_says():
    rewards, values = noise(4, WIDTH), noise(4, WIDTH, seed=1)
    _, returns = formulas.gae(padded(rewards), padded(values), MASK, gamma=1.0, lam=1.0)
    for row, length in enumerate(LENGTHS):
        to_go = rewards[row, :length].flip(0).cumsum(0).flip(0)
        assert torch.allclose(returns[row, :length], to_go)


def test_whitening_counts_real_tokens_only():
    white = formulas.whiten(padded(3 + 7 * noise(4, WIDTH)), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not white[~MASK].any()


def test_equal_advantages_whiten_to_zero_and_not_to_nan():
    assert formulas.whiten(torch.full((4, WIDTH), 0.7), MASK).abs().max() < 1e-2  # rounding


# --- rewards -------------------------------------------------------------------------------------


def test_the_kl_estimate_averages_to_the_kl():
    p, q = noise(9).softmax(0), noise(9, seed=1).softmax(0)
    exact = (p * (p / q).log()).sum().item()
    assert (p * formulas.kl_estimate(p.log(), q.log())).sum().item() == pytest.approx(exact)


def test_the_score_comes_with_the_last_token_and_kl_with_each():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 2.0, -1.0], [0.5, math.nan, math.nan]])
    rewards = formulas.token_rewards(torch.tensor([10.0, -4.0]), kl, mask, kl_coef=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, -0.2, 10.1], [-4.05, 0.0, 0.0]]))


# --- losses --------------------------------------------------------------------------------------

# ratio, advantage, loss, whether the clip decides: eq. 7 and figure 1 of the paper, eps = 0.2
CLIPPING = (
    (1.0, 2.0, -2.0, False),
    (1.1, 2.0, -2.2, False),
    (1.5, 2.0, -2.4, True),  # good, and already more likely: held at 1.2
    (0.5, 2.0, -1.0, False),  # good, and less likely: free to come back
    (1.0, -2.0, 2.0, False),
    (0.9, -2.0, 1.8, False),
    (0.5, -2.0, 1.6, True),  # bad, and already less likely: held at 0.8
    (1.5, -2.0, 3.0, False),  # bad, and more likely: free to come back
)


@pytest.mark.parametrize("ratio, advantage, expected, held", CLIPPING)
def test_the_policy_loss_clips_as_in_the_paper(ratio, advantage, expected, held):
    log_prob = torch.tensor([math.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-3.0], dtype=torch.float64)
    loss, found = formulas.policy_loss(log_prob, old, torch.tensor([advantage]), cliprange=0.2)
    assert loss.item() == pytest.approx(expected)
    assert found.item() is held
    loss.sum().backward()
    assert log_prob.grad.item() == pytest.approx(0.0 if held else -ratio * advantage)


@pytest.mark.parametrize(
    "value, old, target, cliprange, expected, held",
    (
        (1.0, 1.0, 3.0, 0.2, 2.0, False),
        (2.0, 1.0, 3.0, 0.2, 0.5 * 1.8**2, True),  # towards the target, but past 1.2
        (0.0, 1.0, 3.0, 0.2, 4.5, False),  # away from it: the larger error is its own
        (2.0, 1.0, 3.0, 10.0, 0.5, False),
    ),
)
def test_the_value_loss_takes_the_larger_error(value, old, target, cliprange, expected, held):
    value = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, target = torch.tensor([old]), torch.tensor([target])
    loss = formulas.value_loss(value, old, target, cliprange)
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    assert value.grad.item() == pytest.approx(0.0 if held else (value - target).item())


@pytest.mark.parametrize("cliprange", (0.2, 10.0))
def test_gradients_of_the_losses_are_finite_differences(cliprange):
    logits, old = noise(6, 5).requires_grad_(), noise(6, seed=1) - 2
    values, targets = noise(6, seed=2).requires_grad_(), torch.arange(6) % 5
    advantages, returns, before = noise(6, seed=3), noise(6, seed=4), noise(6, seed=5)

    def loss(logits, values):
        log_probs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
        policy, _ = formulas.policy_loss(log_probs, old, advantages, cliprange)
        value = formulas.value_loss(values, before, returns, cliprange)
        return (policy + 0.1 * value).mean()

    assert torch.autograd.gradcheck(loss, (logits, values))


# --- batches -------------------------------------------------------------------------------------


def test_each_epoch_takes_every_row_once_in_pieces_of_like_length():
    lengths = torch.tensor([9, 2, 7, 4, 8, 1, 3, 6])
    updates = formulas.plan_updates(lengths, epochs=3, mini_batches=2, rows_at_once=3)
    assert len(updates) == 6
    orders = []
    for epoch in range(3):
        halves = updates[2 * epoch : 2 * epoch + 2]
        assert [[len(piece) for piece in half] for half in halves] == [[3, 1], [3, 1]]
        rows = torch.cat([torch.cat(half) for half in halves])
        assert sorted(rows.tolist()) == list(range(8))
        for half in halves:
            assert torch.cat([lengths[piece] for piece in half]).diff().min() >= 0
        orders.append(sorted(torch.cat(halves[0]).tolist()))
    assert orders[0] != orders[1] or orders[1] != orders[2]  # chance of failing: 1 in 4,900
