"""What goes wrong in a training run, read from what it has logged: the rules behind `doctor.run`.

A rule is named like what it finds, and returns what it saw, or None; SYMPTOMS has what that means and
what to change. Thresholds were held against runs that were broken on purpose and healthy ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlnb.record.doctor import Finding
from rlnb.record.runs import Run

MIN_LOGS = 6  # fewer show no trend
SILENT = 0.9  # of the groups without variance: healthy runs of this workbook end with 0.2 to 0.75
SOLVED = 0.95  # of the best reward ever logged, at the end: then silence is no fault
CUT = 0.5  # of the completions cut at the limit, at the end: a third, for a while, was healthy
KL_LIMIT = 0.4  # nats per token: healthy runs reach 0.07 from SFT, 0.2 from the base; broken 0.48
NOISIER = 2.0  # times the entropy per token at the start: healthy runs have ended with 1.8
NOISIER_BY = 0.05  # and so much more
FIXED = 0.2  # nats per completion: exp(-0.2) = 0.8, so eight samples in ten are the same text
CLIMB = 1.5  # times the first loss: the untrained model does better
CLIFF = 0.5  # of what the reward had gained (or of half its height) is lost again
LOST = 0.5  # of what a part of the reward once gave is left; healthy: 0.8 and more, hacked: 0.44
LESS_LIKELY = 1.5  # times the reference's -log p of the chosen; up to there DPO lowers both sides
ROUGHLY = 2  # times more, where the reference is known from the first batch only
STUCK = 0.002  # of the loss at the start: eight healthy steps of DPO have moved it by 0.005
COOLER = "Divide the learning rate by three; a longer warm-up helps too."


class Curve:
    """Logged rows: `curve["loss"]` is every finite value of that name, in order."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows
        self.samples = any("reward" in row for row in rows)  # GRPO, RLOO, PPO
        self.kto = not self.samples and any("kl" in row for row in rows)
        rates = self["learning_rate"]
        self.rate = f"; learning rate up to {max(rates):.0e}" if rates else ""

    def __getitem__(self, name: str) -> list[float]:
        values = (row.get(name) for row in self.rows)
        return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]

    def ends(self, name: str) -> tuple[float, float]:
        """Means of the first eighth and of the last quarter; NaN if there are too few logs, and any
        comparison with NaN is false.
        """
        values = self[name]
        if len(values) < MIN_LOGS:
            return math.nan, math.nan
        return fmean(values[: max(2, len(values) // 8)]), fmean(values[-max(3, len(values) // 4) :])

    def smooth(self, name: str) -> list[float]:
        """Moving means over an eighth of the logs, at least three; [0] if there are too few."""
        values = self[name]
        width = max(3, len(values) // 8)
        return [fmean(values[i : i + width]) for i in range(len(values) - width + 1)] or [0.0]

    def noise(self, name: str) -> float:
        """Standard deviation of the differences of those means, were there only noise."""
        values = self[name]
        if len(values) < MIN_LOGS:
            return 0.0
        return stdev(b - a for a, b in pairwise(values)) / math.sqrt(max(3, len(values) // 8))


def look(rows: Sequence[Mapping[str, Any]], run: Run | None = None) -> list[Finding]:
    """What all rules find; [] for a healthy run."""
    curve, found = Curve(rows), []
    for rule, (means, do, *level) in SYMPTOMS.items():
        if saw := rule(curve, run):
            name = rule.__name__.replace("_", " ")
            found.append(Finding(name, saw, *(level or ["problem"]), means=means, do=do))
    return found


def ended_early(curve: Curve, run: Run | None) -> str | None:
    if run is None or run.status not in ("lost", "failed", "interrupted"):
        return None
    saved = "an" if run.adapter.is_dir() else "no"
    steps = f"{max(curve['step'], default=0):.0f} of {run.get('steps') or '?'} steps logged"
    return f"{run.status}, {steps}, {saved} adapter saved" + (f"; {run.error}" if run.error else "")


def not_a_number(curve: Curve, run: Run | None) -> str | None:
    for row in curve.rows:
        watched = ("loss", "grad_norm", "reward", "kl", "nll_loss")
        if bad := [name for name in watched if not math.isfinite(row.get(name, 0))]:
            return f"{', '.join(bad)} at step {row.get('step', '?')}"
    return None


def nothing_moved(curve: Curve, run: Run | None) -> str | None:
    norms, silent = curve["grad_norm"], curve["frac_reward_zero_std"]
    if len(norms) > 1 and max(norms) < 1e-7 and min(silent, default=0.0) < 1:
        return f"grad_norm at most {max(norms):.0e} in {len(norms)} logs"
    if run is not None and _b_is_zero(run.adapter / "adapter_model.safetensors"):
        return "every lora_B of the saved adapter is 0"
    return None


def _b_is_zero(file: Path) -> bool:
    """Whether every lora_B of a safetensors file is 0, by its bytes: of any type, without torch."""
    data = file.read_bytes() if file.is_file() else bytes(8)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start] or "{}")
    spans = [header[name]["data_offsets"] for name in header if ".lora_B." in name]
    return bool(spans) and not any(any(data[start + a : start + b]) for a, b in spans)


def worse_than_before(curve: Curve, run: Run | None) -> str | None:
    """The checked accuracy against the start's, which is in the result, or else in the parent's."""
    before = run.result.get("start") if run is not None else {}
    if before is None and run.parent:
        with suppress(OSError, ValueError, KeyError):
            parent = run.folder.parent / run.parent / "run.json"
            before = json.loads(parent.read_text(encoding="utf-8"))["result"]
    for name in ("strict", "correct"):
        if name not in (before or {}) or name not in run.result:
            continue
        (k0, n0), (k1, n1) = before[name].values(), run.result[name].values()
        pooled = (k0 + k1) / (n0 + n1)
        if k0 / n0 - k1 / n1 > 2 * math.sqrt(pooled * (1 - pooled) * (1 / n0 + 1 / n1)):
            first, last = curve.ends("reward")  # two standard errors of the difference
            paid = f", while the reward rose from {first:.2f} to {last:.2f}" if last > first else ""
            return f"held out, {name}: {k0 / n0:.0%} -> {k1 / n1:.0%} of {n1}{paid}"
    return None


def silent_groups(curve: Curve, run: Run | None) -> str | None:
    share, spread = curve.ends("frac_reward_zero_std")[1], curve.ends("reward_std")[1]
    first, last = curve.ends("reward")
    solved = last > first and last >= SOLVED * max(curve["reward"])
    if solved or not (share >= SILENT or spread < 1e-6):
        return None
    what = "reward_std 0" if math.isnan(share) else f"{share:.0%} of the groups without variance"
    return f"{what} at the end; reward {first:.2f} -> {last:.2f}"


def cut_at_the_limit(curve: Curve, run: Run | None) -> str | None:
    share = curve.ends("completions/clipped_ratio")[1]
    length = curve.ends("completions/mean_length")[1]
    return f"{share:.0%} of the completions, at {length:.0f} tokens" if share >= CUT else None


def kl_runs_away(curve: Curve, run: Run | None) -> str | None:
    first, last = curve.ends("kl")
    if curve.kto or not last >= KL_LIMIT:  # KTO's is per completion, and cut at 0
        return None
    return f"kl {first:.2g} -> {last:.2g} nats per token{curve.rate}"


def entropy_collapsed(curve: Curve, run: Run | None) -> str | None:
    (first, last), length = curve.ends("entropy"), curve.ends("completions/mean_length")[1]
    if not last * length <= FIXED < first * length:
        return None
    return f"{first:.2g} -> {last:.2g} nats per token, for {length:.0f} tokens"


def reward_fell(curve: Curve, run: Run | None) -> str | None:
    values, means = curve["reward"], curve.smooth("reward")
    if len(values) < 3 * MIN_LOGS:
        return None
    first, best, last = means[0], max(means), means[-1]
    cliff = CLIFF * max(best - first, abs(best) / 2)
    if best - last < max(cliff, 2 * curve.noise("reward"), 1e-3):
        return None
    return f"{first:.2f} at first, {best:.2f} at best, {last:.2f} now{curve.rate}"


def reward_hacking(curve: Curve, run: Run | None) -> str | None:
    """The reward has risen, and half of what one of its parts once gave is lost, beyond noise."""
    first, last = curve.ends("reward")
    parts = {name for row in curve.rows for name in row if name.startswith("rewards/")}
    for name in sorted(name for name in parts if name.endswith("/mean")):
        best, now = max(curve.smooth(name)), curve.ends(name)[1]
        lost = best - now > 2 * curve.noise(name) and now < LOST * best
        if last > first and min(curve[name]) >= 0 and lost:
            what = name.split("/")[1]
            return f"reward {first:.2f} -> {last:.2f}, but {what} {best:.2f} at best, {now:.2f} now"
    return None


def loss_jumped(curve: Curve, run: Run | None) -> str | None:
    loss, last = curve["loss"], curve.ends("loss")[1]
    if not loss or curve.samples or curve.kto or not last >= CLIMB * loss[0]:
        return None
    return f"{loss[0]:.2g} at first, {min(loss):.2g} at best, {last:.2g} now{curve.rate}"


def more_random(curve: Curve, run: Run | None) -> str | None:
    first, last = curve.ends("entropy")
    if not last >= max(NOISIER * first, first + NOISIER_BY):
        return None
    return f"entropy {first:.2g} -> {last:.2g} nats per token{curve.rate}"


def hardly_moved(curve: Curve, run: Run | None) -> str | None:
    first, last = curve.ends("loss")
    still = max(curve["grad_norm"], default=0) < 1e-7  # that is nothing_moved
    if curve.samples or curve.kto or still or not abs(last - first) <= STUCK * first:
        return None
    return f"loss {first:.4g} -> {last:.4g} in {len(curve['loss'])} logs{curve.rate}"


def chosen_falls(curve: Curve, run: Run | None) -> str | None:
    """How much less likely the chosen side is than under the reference, in parts of its own -log p.

    DPO and KTO log rewards/chosen = beta (log p - log p_ref), which gives log p_ref of the very same
    rows. Without beta, and for ORPO, the first log stands for the reference.
    """
    now, margin = curve.ends("logps/chosen")[1], curve.ends("rewards/margins")[1]
    if not margin > 0:
        return None
    before, times = curve["logps/chosen"][0], LESS_LIKELY * ROUGHLY
    if run is not None and run.get("beta") and not curve["nll_loss"]:
        before, times = now - curve.ends("rewards/chosen")[1] / run.get("beta"), LESS_LIKELY
    if not now < times * before < 0:
        return None
    return f"log p of the chosen {before:.1f} -> {now:.1f}, margin {margin:.2f}{curve.rate}"


def one_class(curve: Curve, run: Run | None) -> str | None:
    """KTO logs a side where a batch has it."""
    logs = len(curve["loss"])
    good, bad = len(curve["rewards/chosen"]), len(curve["rewards/rejected"])
    if not curve.kto or logs < 2 or (good and bad):
        return None
    return f"of {logs} logs, {good} have desirable rows and {bad} undesirable ones"


SYMPTOMS = {  # rule: what it means, what to do, and the level where that is not "problem"
    ended_early: ("It is no finished run. Lost means that its kernel ended, or memory did.",
        "Do not compare it with finished ones. Use checkpoints if it is long.", "advice"),
    not_a_number: ("From there on steps are skipped, or the weights are no numbers any more.",
        "Look for rows without a token of completion (max_length), and for fp16 that overflows. " + COOLER),
    nothing_moved: ("The model is what it was before.",
        "See that the adapter trains (models.trainable), that rewards or sides differ, that max_length "
        "leaves completions, and that the learning rate is above 0."),
    worse_than_before: ("It has unlearnt more than it has learnt, or it is paid for something else.",
        f"Read completions. {COOLER} Or fewer steps, a higher beta, pairs that the model itself wrote."),
    silent_groups: ("All completions of a prompt get the same reward: every advantage is 0.",
        "Let the reward tell more cases apart, take prompts that are solved now and then, more "
        "completions of each (num_generations), or a higher temperature."),
    cut_at_the_limit: ("Rewards judge half an answer, and the model does not learn to end one.",
        "Raise max_completion_length. Or teach it to end: demonstrations with the end token, padding "
        "with another one, a reward for ending."),
    kl_runs_away: ("The policy has left its reference, and with it what the base knew.",
        f"A higher beta (kl_coef), fewer steps. {COOLER}"),
    entropy_collapsed: ("Nearly all samples of a prompt are the same text: nothing new is tried.",
        f"Fine if all is solved. Else sample hotter, or hold it to a reference (beta). {COOLER}", "advice"),
    reward_fell: ("Steps were so large that what was learnt is lost again.",
        f"Take an earlier checkpoint. {COOLER} Larger batches make steps less wild."),
    reward_hacking: ("It has found a way to be paid without that.",
        f"Read completions. Pay for the rest only where that is earned, or weigh it higher. {COOLER}"),
    loss_jumped: ("It fits its own training data worse than before.", f"Start again. {COOLER}"),
    more_random: ("Training makes a model surer. This one comes apart.",
        f"{COOLER} A higher beta keeps a policy near its reference."),
    hardly_moved: ("There are gradients, but the steps are too small or too few.",
        "Raise the learning rate by three to ten: LoRA takes ten times that of a whole model.", "advice"),
    chosen_falls: ("The margin grows because the rejected side falls faster. A little of that is normal "
        "for DPO; here it unlearns what you prefer.",
        f"{COOLER} Or a higher beta, fewer steps, pairs that the model itself wrote."),
    one_class: ("Desirable rows alone make KTO an imitation; undesirable ones alone unlearn everything.",
        "Collect labels of both kinds.", "advice"),
}  # fmt: skip
