"""What is wrong with a training run, read from what it has logged.

    print(diagnose.run(run))        or: python -m rlnb doctor 20261120-125239-dpo

Each rule yields the name of a symptom and what it saw; SYMPTOMS has what that means and what to change. The
thresholds were held against runs that were broken on purpose and healthy ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlnb.record import runs

MIN_LOGS = 6  # fewer show no trend
APART = 0.02  # nats: at step 1 the policy is its reference, and what differs is rounding
Saw = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A symptom: its name, the figures, the level (advice or problem), what it means, what to do."""

    name: str
    saw: str
    level: str
    means: str
    do: str

    def __str__(self) -> str:
        level = self.level.upper() if self.level == "problem" else self.level
        return f"{level:8}{self.name}: {self.saw}\n{'':8}{self.means}\n{'':8}{self.do}"


class Report(list[Finding]):
    """Findings, shown one below the other."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "nothing wrong"


class Curve:
    """Logged rows: `curve["loss"]` is every finite value of that name, in order."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.rows = list(rows)
        self.samples = any("reward" in row for row in self.rows)  # GRPO, RLOO, PPO
        self.gradient = max(self["grad_norm"], default=math.nan)  # the largest
        rates = self["learning_rate"]
        self.rate = f"; learning rate up to {max(rates):.0e}" if rates else ""

    def __getitem__(self, name: str) -> list[float]:
        values = (row.get(name) for row in self.rows)
        return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]

    def ends(self, name: str) -> tuple[float, float]:
        """Means of the first eighth and the last quarter; with few logs NaN, for which no comparison holds."""
        values = self[name]
        if len(values) < MIN_LOGS:
            return math.nan, math.nan
        return fmean(values[: max(2, len(values) // 8)]), fmean(values[-max(3, len(values) // 4) :])


def run(run: runs.Run | Iterable[Mapping[str, Any]]) -> Report:
    """What is wrong with a run: for each symptom the numbers, their meaning, a way out.

    run: a run, or rows as in `trainer.state.log_history`. One that is still going is judged by its logs so far; it
    takes six to see a trend.
    """
    known = run if isinstance(run, runs.Run) else None
    curve = Curve(run if known is None else run.curve())
    saw = dict(_outcome(curve, known)) if known else {}
    saw |= dict(_policy(curve)) | dict(_rewards(curve)) | dict(_losses(curve))
    return Report(Finding(name, saw[name], *SYMPTOMS[name]) for name in SYMPTOMS if name in saw)


def _outcome(curve: Curve, run: runs.Run) -> Saw:
    """How it ended, and its held-out accuracy against the start's, of its own result or the parent's."""
    if run.status in ("lost", "failed", "interrupted"):
        steps = f"{max(curve['step'], default=0):.0f} of {run.get('max_steps') or '?'} steps logged"
        saved = f"{'an' if run.adapter.is_dir() else 'no'} adapter saved"
        yield "ended early", f"{run.status}, {steps}, {saved}" + (f"; {run.error}" if run.error else "")
    start = run.result.get("start")
    if start is None and run.parent:
        with suppress(OSError, ValueError):
            start = runs.load(run.parent).result
    before, after = (start or {}).get("strict"), run.result.get("strict")
    if not (runs.is_proportion(before) and runs.is_proportion(after)):
        return
    (k0, n0), (k1, n1) = ((share["k"], share["n"]) for share in (before, after))
    pooled = (k0 + k1) / (n0 + n1)
    if k0 / n0 - k1 / n1 > 2 * math.sqrt(pooled * (1 - pooled) * (1 / n0 + 1 / n1)):  # two standard errors
        first, last = curve.ends("reward")
        paid = f", while the reward rose from {first:.2f} to {last:.2f}" if last > first else ""
        yield "worse than before", f"held out, strict: {k0 / n0:.0%} -> {k1 / n1:.0%} of {n1}{paid}"


def _policy(curve: Curve) -> Saw:
    """Numbers that are none and gradients of 0, of any run; of those that sample groups, length, KL, entropy."""
    for row in curve.rows:
        watched = {name: row.get(name) for name in ("loss", "grad_norm", "reward", "kl", "nll_loss")}
        if bad := [name for name, v in watched.items() if isinstance(v, float) and not math.isfinite(v)]:
            yield "not a number", f"{', '.join(bad)} at step {row.get('step', '?')}"
            break
    first = next((row for row in curve.rows if row.get("step") == 1 and "nll_loss" not in row), {})  # ORPO has none
    apart = {name: first[name] for name in ("kl", "rewards/chosen", "rewards/rejected") if first.get(name)}
    if off := [f"{name} {v:.2g}" for name, v in apart.items() if isinstance(v, float) and abs(v) > APART]:
        yield "another reference", f"{', '.join(off)} at step 1, before anything was learnt"
    (start, reward), (before, entropy) = curve.ends("reward"), curve.ends("entropy")
    silent, spread = curve.ends("frac_reward_zero_std")[1], curve.ends("reward_std")[1]
    cut, length = curve.ends("completions/clipped_ratio")[1], curve.ends("completions/mean_length")[1]
    first_kl, kl = curve.ends("kl")
    logs, least = len(curve["grad_norm"]), min(curve["frac_reward_zero_std"], default=0.0)
    if logs > 1 and curve.gradient < 1e-7 and least < 1:
        yield "nothing moved", f"grad_norm at most {curve.gradient:.0e} in {logs} logs"
    solved = reward > start and reward >= 0.95 * max(curve["reward"])  # then silence is no fault
    if not solved and (silent >= 0.9 or spread < 1e-6):  # healthy runs end with 0.2 to 0.75
        what = "reward_std 0" if math.isnan(silent) else f"{silent:.0%} of the groups without variance"
        yield "silent groups", f"{what} at the end; reward {start:.2f} -> {reward:.2f}"
    if cut >= 0.5:  # a third, for a while, was healthy
        yield "cut at the limit", f"{cut:.0%} of the completions, at {length:.0f} tokens"
    # Healthy runs reach 0.07 nats per token from SFT, 0.2 from the base; broken 0.48.
    if kl >= 0.4 and curve.samples:  # KTO's is per completion, and cut at 0
        yield "kl runs away", f"kl {first_kl:.2g} -> {kl:.2g} nats per token{curve.rate}"
    if entropy * length <= 0.2 < before * length:  # exp(-0.2) = 0.8: eight samples in ten are the same text
        yield "entropy collapsed", f"{before:.2g} -> {entropy:.2g} nats per token, for {length:.0f} tokens"
    # Healthy runs have ended with 1.8 times the entropy. A model that stays as it is has met other prompts.
    if entropy >= max(2 * before, before + 0.05) and not curve.gradient < 1e-7:
        yield "more random", f"entropy {before:.2g} -> {entropy:.2g} nats per token{curve.rate}"


def _rewards(curve: Curve) -> Saw:
    """The reward rises, while one of its parts falls to less than half of its best mean over an eighth of the logs."""
    first, last = curve.ends("reward")
    names = sorted({name for row in curve.rows for name in row})
    for name in (name for name in names if name.startswith("rewards/") and name.endswith("/mean")):
        values, (_, now) = curve[name], curve.ends(name)
        width = max(3, len(values) // 8)
        best = max((fmean(values[i : i + width]) for i in range(len(values) - width + 1)), default=0.0)
        if last > first and now < 0.5 * best and min(values) >= 0:  # healthy: 0.8 of the best and more, hacked: 0.44
            part = f"{name.split('/')[1]} {best:.2f} at best, {now:.2f} now"
            yield "reward hacking", f"reward {first:.2f} -> {last:.2f}, but {part}"
            return


def _losses(curve: Curve) -> Saw:
    """Of runs that read: the loss, and the two sides of preferences."""
    loss, last = curve["loss"], curve.ends("loss")[1]
    if loss and last >= 1.5 * loss[0] > 0 and not curve.samples:  # the untrained model does better
        yield "loss jumped", f"{loss[0]:.2g} at first, {min(loss):.2g} at best, {last:.2g} now{curve.rate}"
    now, margin = curve.ends("logps/chosen")[1], curve.ends("rewards/margins")[1]
    before = next(iter(curve["logps/chosen"]), math.nan)
    if margin > 0 and now < 3 * before < 0:  # DPO lowers both sides, up to 1.5 times
        yield "chosen falls", f"log p of the chosen {before:.1f} -> {now:.1f}, margin {margin:.2f}{curve.rate}"


COOLER = "Divide the learning rate by three; a longer warm-up helps too."
SYMPTOMS = {  # name: level, what it means, what to do
    "ended early": ("advice", "It is no finished run. Lost means that its kernel ended, or memory did.",
        "Do not compare it with finished ones."),
    "not a number": ("problem", "From there on steps are skipped, or the weights are no numbers any more.",
        f"Look for rows without a token of completion (max_length), and for fp16 that overflows. {COOLER}"),
    "nothing moved": ("problem", "The model is what it was before.", "See that the adapter trains (trainable), that "
        "rewards or sides differ, that max_length leaves completions, and that the learning rate is above 0."),
    "another reference": ("problem", "The policy was not what it is measured from when training began.",
        "Start from the adapter that the reference has, and leave adapters alone once the trainer is made."),
    "worse than before": ("problem", "It has unlearnt more than it has learnt, or it is paid for something else.",
        f"Read completions. {COOLER} Or fewer steps, a higher beta, pairs that the model itself wrote."),
    "silent groups": ("problem", "All completions of a prompt get the same reward: every advantage is 0.",
        "Let the reward tell more cases apart, take prompts that are solved now and then, more completions of each "
        "(num_generations), or a higher temperature."),
    "cut at the limit": ("problem", "Rewards judge half an answer, and the model does not learn to end one.",
        "Raise max_completion_length, or teach it to end: demonstrations with the end token, a reward for ending."),
    "kl runs away": ("problem", "The policy has left its reference, and with it what the base knew.",
        f"A higher beta (kl_coef), fewer steps. {COOLER}"),
    "entropy collapsed": ("advice", "Nearly all samples of a prompt are the same text: nothing new is tried.",
        f"Fine if all is solved. Else sample hotter, or hold it to a reference (beta). {COOLER}"),
    "reward hacking": ("problem", "It has found a way to be paid without that.",
        f"Read completions. Pay for the rest only where that is earned, or weigh it higher. {COOLER}"),
    "loss jumped": ("problem", "It fits its own training data worse than before.", f"Start again. {COOLER}"),
    "more random": ("problem", "Training makes a model surer. This one comes apart.",
        f"{COOLER} A higher beta keeps a policy near its reference."),
    "chosen falls": ("problem", "The margin grows because the rejected side falls faster. A little of that is normal "
        "for DPO; here it unlearns what you prefer.",
        f"{COOLER} Or a higher beta, fewer steps, pairs that the model itself wrote."),
}  # fmt: skip
