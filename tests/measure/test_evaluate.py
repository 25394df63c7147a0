"""Figures against closed forms, published values, exact enumeration and coverage by simulation."""

import copy
import itertools
import json
import math
import random

import pytest

from rlnb.measure import kl as divergence, evaluate
from rlnb.model import decode_cpu as decoding, load as models, sampling
from rlnb.task import problems
from tests import tiny

models.backend()  # Unsloth before transformers

import torch  # noqa: E402

# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(k, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17, p. 857, table I, method 3."""
    assert evaluate.wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = evaluate.wilson(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_solves_its_equation():
    """Its ends are where the mean is z standard errors away: (p - k/n)^2 = z^2 p (1 - p) / n."""
    for p in evaluate.wilson(37, 120, level=0.8):
        assert (p - 37 / 120) ** 2 == pytest.approx(1.2815515655446004**2 * p * (1 - p) / 120)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_no_proportion(k, n):
    with pytest.raises(ValueError, match="successes in"):
        evaluate.Proportion(k, n)


def test_proportion_as_text():
    assert str(evaluate.Proportion(262, 500)) == "52.4 % [48.0, 56.7]"


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (6, 2, 3), (7, 4, 4), (4, 0, 2), (4, 4, 2)])
def test_pass_at_k_counts_the_draws(n, c, k):
    draws = list(itertools.combinations(range(n), k))
    hits = sum(any(i < c for i in draw) for draw in draws)
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(hits / len(draws))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.15, 12, 5
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * evaluate.pass_at_k(n, c, k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_is_stable_for_many_samples():
    assert evaluate.pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_out_of_range(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        evaluate.pass_at_k(n, c, k)


# --- comparing -----------------------------------------------------------------------------------


def report(strict, first=0):
    """A report with nothing but `strict`."""
    return evaluate.Report([{"id": f"p{first + i}", "strict": x} for i, x in enumerate(strict)])


def test_compare_counts_pairs_in_any_order():
    before = report([True, True, False, False, False])
    after = evaluate.Report(report([True, False, True, True, False]).rows[::-1])
    found = evaluate.compare(before, after)
    assert (found.gained, found.lost, found.n, found.mean) == (2, 1, 5, pytest.approx(0.2))
    # Agresti and Min: (2 - 1) / 7 -+ 1.96 / 7 * sqrt(2 + 1 + 1 - 1 / 7)
    assert found.low == pytest.approx(-0.407, abs=1e-3)
    assert found.high == pytest.approx(0.693, abs=1e-3)
    back = evaluate.compare(after, before)
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    assert str(found) == "+20.0 points [-40.7, +69.3]; 2 gained, 1 lost of 5"


@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.05), (0.1, 0.1), (0.02, 0.01)])
def test_compare_covers_the_difference(gain, loss):
    """By enumerating all outcomes of 30 pairs; the plain Wald interval covers 0.59 in the last."""
    n, covered = 30, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            rest = n - gained - lost
            chance = math.comb(n, gained) * math.comb(n - gained, lost)
            chance *= gain**gained * loss**lost * (1 - gain - loss) ** rest
            before = report([False] * gained + [True] * lost + [True] * rest)
            after = report([True] * gained + [False] * lost + [True] * rest)
            found = evaluate.compare(before, after)
            covered += chance * (found.low <= gain - loss <= found.high)
    assert covered > 0.94


def test_compare_wants_the_same_problems():
    with pytest.raises(ValueError, match="in one only are: p0, p2"):
        evaluate.compare(report([True, True]), report([True, True], first=1))
    twice = evaluate.Report(report([True]).rows * 2)
    with pytest.raises(ValueError, match="each once"):
        evaluate.compare(twice, twice)


# --- pass@k over problems ------------------------------------------------------------------------


def test_the_bootstrap_covers_the_mean_over_problems():
    """40 problems of all difficulties, 8 samples each: 95 % of the intervals hold the truth."""
    rng, ks, rounds = random.Random(0), (1, 4), 200
    chances = [rng.betavariate(0.5, 1.0) for _ in range(20_000)]
    truth = {k: sum(1 - (1 - p) ** k for p in chances) / len(chances) for k in ks}
    covered = dict.fromkeys(ks, 0)
    for _ in range(rounds):
        drawn = (rng.betavariate(0.5, 1.0) for _ in range(40))
        counts = [sum(rng.random() < p for _ in range(8)) for p in drawn]
        rows = [{"id": str(i), "n": 8, "strict": c} for i, c in enumerate(counts)]
        found = evaluate.Passes(rows, ks).at("strict", resamples=400)
        for k in ks:
            covered[k] += found[k].low <= truth[k] <= found[k].high
    for k in ks:  # three standard errors below 0.93, what 40 problems can give
        assert covered[k] / rounds > 0.93 - 3 * math.sqrt(0.93 * 0.07 / rounds)
        assert covered[k] / rounds < 0.995


def test_the_bootstrap_of_equal_problems_has_no_width():
    rows = [{"id": str(i), "kind": "a", "n": 4, "strict": 4, "correct": 4} for i in range(7)]
    assert evaluate.Passes(rows, (2,)).by("kind") == {"a": {2: evaluate.Estimate(1.0, 1.0, 1.0)}}
    with pytest.raises(ValueError, match="'loose' is none of strict, correct"):
        evaluate.Passes(rows, (2,)).at("loose")


# --- on the practice model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def practice():
    return models.load_model("abacus-3m")


SOME = problems.load("validation")[:12]


def test_accuracy_grades_each_problem_by_its_own_completion(practice):
    model, tokens = practice
    found = evaluate.accuracy(model, tokens, SOME, batch_size=5, progress=False)
    assert [row["id"] for row in found.rows] == [problem.id for problem in SOME]
    for problem, row in zip(SOME, found.rows, strict=True):
        grade = problems.grade(row["completion"], problem.question, problem.answer)
        assert [row[what] for what in ("format", "correct", "trace", "strict")] == [
            grade.format, grade.correct, grade.trace, grade.strict
        ]  # fmt: skip
    alone = sampling.sample(model, tokens, [problems.prompt(SOME[7])], temperature=0)
    assert found.rows[7]["completion"] == alone.texts[0][0]
    assert found.rows[7]["tokens"] == len(alone.ids[0][0])


def test_a_report_adds_up(practice):
    rows = [
        {"kind": kind, "steps": steps, "strict": s, "correct": c, "format": f, "tokens": t}
        for kind, steps, s, c, f, t in [
            ("b", 1, True, True, True, 10),
            ("a", 2, False, True, False, 20),
            ("b", 2, False, False, True, 60),
        ]
    ]
    found = evaluate.Report(rows)
    assert (found.strict.k, found.correct.k, found.format.k, found.mean_tokens) == (1, 2, 2, 30)
    assert list(found.by("kind")) == ["a", "b"]
    assert found.by("kind")["b"] == evaluate.Proportion(1, 2)
    assert found.by("steps", "correct") == {
        1: evaluate.Proportion(1, 1), 2: evaluate.Proportion(1, 2)
    }  # fmt: skip
    assert json.loads(json.dumps(found.summary())) == {
        "strict": {"k": 1, "n": 3},
        "correct": {"k": 2, "n": 3},
        "format": {"k": 2, "n": 3},
        "mean_tokens": 30.0,
    }
    assert str(found).startswith("strict 33.3 % [6.1, 79.2], correct 66.7 %")


def test_passes_counts_right_samples(practice):
    model, tokens = practice
    settings = {"seed": 4, "temperature": 0.8, "progress": False}
    found = evaluate.passes(model, tokens, SOME, 8, (1, 4, 8), **settings)
    texts = sampling.sample(model, tokens, [problems.prompt(p) for p in SOME], 8, **settings).texts
    for problem, row, group in zip(SOME, found.rows, texts, strict=True):
        grades = [problems.grade(text, problem.question, problem.answer) for text in group]
        assert row["strict"] == sum(grade.strict for grade in grades)
        assert row["correct"] == sum(grade.correct for grade in grades)
    rates = [found.correct[k].mean for k in (1, 4, 8)]
    assert rates == sorted(rates) and rates[-1] > rates[0]
    assert rates[0] == pytest.approx(sum(row["correct"] for row in found.rows) / (8 * len(SOME)))
    assert all(e.low <= e.mean <= e.high for e in found.correct.values())
    assert found.correct == found.at("correct")  # the bootstrap has a seed
    kinds = found.by("kind", "correct")
    assert set(kinds) == {problem.kind for problem in SOME}
    assert json.loads(json.dumps(found.summary()))["pass_correct"]["8"]["mean"] == rates[-1]


def test_nothing_to_evaluate(practice):
    for function in (evaluate.accuracy, evaluate.passes):
        with pytest.raises(ValueError, match="no problems"):
            function(*practice, [])
    with pytest.raises(ValueError, match="n=4, c=0, k=8"):
        evaluate.passes(*practice, SOME, 4, (1, 8))


# --- distance from a reference -------------------------------------------------------------------

PROMPTS = [[{"role": "user", "content": text}] for text in tiny.CORPUS]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A random model with opinions, and an adapter that changes them."""
    folder = tiny.make(tmp_path_factory.mktemp("model"))
    model, tokens = models.load_model(folder, lora=models.LoRA(rank=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            size = 0.06 if "lora" in name else 0.12
            parameter.data.normal_(0, size, generator=generator)
    return model.eval(), tokens


@torch.no_grad()
def exact_kl_of_two_tokens(model, prompt, end):
    """By the chain rule, over every first token; after the end token there is no second one."""

    def log_probs():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(len(first))])
        return first, model(input_ids=rows).logits[:, -1].log_softmax(-1)

    p1, p2 = log_probs()
    with model.disable_adapter():
        q1, q2 = log_probs()
    second = (p2.exp() * (p2 - q2)).sum(-1)
    second[end] = 0
    return ((p1.exp() * (p1 - q1)).sum() + (p1.exp() * second).sum()).item()


def test_kl_agrees_with_all_sequences_of_two_tokens(adapted):
    model, tokens = adapted
    prompt_ids = sampling.tokenize(tokens, PROMPTS)
    exact = [exact_kl_of_two_tokens(model, prompt, tokens.eos_token_id) for prompt in prompt_ids]
    found = [
        evaluate.kl(model, tokens, [prompt] * 2, n=400, max_new_tokens=2, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]
    for truth, estimate in zip(exact, found, strict=True):
        assert truth > 0.1
        assert estimate.mean == pytest.approx(truth, rel=0.05)
        assert estimate.k1 == pytest.approx(truth, rel=0.35)
        assert estimate.k3 == pytest.approx(truth, rel=0.35)


def test_the_exact_sum_has_the_smaller_error(adapted):
    model, tokens = adapted
    prompts = [[{"role": "user", "content": PROMPTS[0][0]["content"]}]] * 64
    found = evaluate.kl(model, tokens, prompts, max_new_tokens=12)
    assert 0 < found.error < found.k1_error / 2
    assert abs(found.k1 - found.mean) < 4 * found.k1_error
    assert found.sequences == 64
    assert str(found).endswith("nats per sequence (64 sequences)")


def test_rows_of_different_length_are_scored_as_alone(adapted):
    model, _ = adapted
    pairs = [([5, 6, 7, 8, 9], [10]), ([11], [12, 13, 14]), ([15, 16], [17, 18])]

    def score(pairs):
        policy = divergence._log_probs(model, pairs)
        with model.disable_adapter():
            return divergence._divergences(policy, divergence._log_probs(model, pairs), pairs)

    for together, pair in zip(score(pairs), pairs, strict=True):
        assert together == pytest.approx(score([pair])[0], rel=1e-4)


def test_kl_to_itself_is_zero_and_a_reference_can_be_given(adapted):
    model, tokens = adapted
    itself = evaluate.kl(model, tokens, PROMPTS, reference=model, max_new_tokens=8)
    assert (itself.mean, itself.k1, itself.k3) == pytest.approx((0, 0, 0), abs=1e-6)
    disabled = evaluate.kl(model, tokens, PROMPTS, n=2, max_new_tokens=8)
    base = copy.deepcopy(model)
    for layer in decoding.lora_layers(base):
        layer.lora_B["default"].weight.data.zero_()
    given = evaluate.kl(model, tokens, PROMPTS, n=2, max_new_tokens=8, reference=base)
    assert given.mean == pytest.approx(disabled.mean, rel=1e-4)


def test_kl_refuses_what_is_no_reference(adapted, practice):
    model, tokens = adapted
    with pytest.raises(ValueError, match="no adapter to disable"):
        evaluate.kl(*practice, PROMPTS)
    with pytest.raises(ValueError, match="1 prompt"):
        evaluate.kl(model, tokens, PROMPTS[:1])
    config = model.peft_config["default"]
    config.init_lora_weights = "pissa_niter_4"
    try:
        with pytest.raises(ValueError, match=r"'pissa_niter_4', which changes the base"):
            evaluate.kl(model, tokens, PROMPTS)
    finally:
        config.init_lora_weights = True
