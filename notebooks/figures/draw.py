"""Draws the diagrams of the notebooks: `python notebooks/figures/draw.py` writes every SVG beside this file.

Blue is what trains, grey what is frozen, orange data and rewards. A figure has a light and a dark look.
In a text "_{w}" is a subscript, and the first line of a box is bold. Sizes and places are in pixels.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LINE, SIZE = 760, 18, 13  # of a figure, from line to line, of letters
LEGEND = {"trains": "trains", "frozen": "frozen", "data": "data and rewards"}
STYLE = """
.rlnb text { font: 13px system-ui, sans-serif; fill: #222222 } .rlnb .strong { font-weight: 600 }
.rlnb .faint { fill: #5A5A57 } .rlnb .sub { font-size: 10px } .rlnb .card { fill: #FCFCFA }
.rlnb .line { fill: none; stroke: #5A5A57; stroke-width: 1.4 } .rlnb .tip { fill: #5A5A57 }
.rlnb .plain { fill: #FFFFFF; stroke: #A5A5A0; stroke-width: 1.4 }
.rlnb .trains { fill: #DCEBF5; stroke: #0072B2; stroke-width: 1.6 }
.rlnb .frozen { fill: #EBEBE8; stroke: #85857F; stroke-width: 1.4 }
.rlnb .data { fill: #FBE8DA; stroke: #D55E00; stroke-width: 1.4 }
.rlnb .curve { fill: none; stroke-width: 2.6 }
@media (prefers-color-scheme: dark) {
.rlnb text { fill: #EDEDEA } .rlnb .faint { fill: #B5B5B0 } .rlnb .card { fill: #1A1B1D }
.rlnb .line { stroke: #B5B5B0 } .rlnb .tip { fill: #B5B5B0 }
.rlnb .plain { fill: #242528; stroke: #75757A } .rlnb .trains { fill: #123850; stroke: #56B4E9 }
.rlnb .frozen { fill: #36373B; stroke: #8E8E93 } .rlnb .data { fill: #4A2A12; stroke: #F0883E }
.rlnb .curve { fill: none } }"""
TIP = """<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>"""
FIGURES: dict[str, Callable[[], str]] = {}


def figure(height: int) -> Callable:
    """Registers a function that draws. Its docstring is the title and, below, the description."""

    def register(draw: Callable[["Picture"], None]) -> None:
        def svg() -> str:
            picture = Picture(height)
            draw(picture)
            return picture.svg(*draw.__doc__.split("\n\n"))

        FIGURES[draw.__name__] = svg

    return register


def text_width(text: str, bold: bool = False) -> float:
    """An estimate for a wide font, DejaVu Sans. A subscript counts as large."""
    text = re.sub(r"_\{(.*?)\}", r"\1", text)
    narrow = sum(letter in "iljtfrI.,:;'|!()[] -/" for letter in text)
    wide = sum(letter in "mwMWOQ%&+=<>−→…" for letter in text)
    return SIZE * (0.62 * len(text) - 0.25 * narrow + 0.22 * wide) * (1.12 if bold else 1)


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float


class Picture:
    def __init__(self, height: int):
        self.height, self.parts = height, []

    def label(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """Lines of text, the first with its base line at y."""
        sub = r'<tspan class="sub" dy="3">\1</tspan><tspan dy="-3">\2</tspan>'
        for i, line in enumerate(text.split("\n")):
            where = f'x="{x:g}" y="{y + LINE * i:g}" text-anchor="{anchor}"'
            line = re.sub(r"_\{(.*?)\}([^_]*)", sub, escape(line))
            self.parts.append(f'<text class="{kind}" {where}>{line}</text>')

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "plain") -> Box:
        first, *rest = text.split("\n")
        size = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"'
        self.parts.append(f'<g><rect class="{kind}" {size}/>')
        middle, top = x + w / 2, y + h / 2 + 4.5 - LINE / 2 * len(rest)
        if first:
            self.label(middle, top, first, "strong")
        if rest:
            self.label(middle, top + LINE, "\n".join(rest))
        self.parts.append("</g>")
        return Box(x, y, w, h)

    def line(self, path: str, kind: str = "line", tip: bool = True) -> None:
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')

    def arrow(self, a: Box, b: Box) -> None:
        """From one box to another: straight where they face each other, else with a bend half-way."""
        if a.x + a.w <= b.x or b.x + b.w <= a.x:
            start, end = (a.x + a.w + 2, b.x - 3) if a.x < b.x else (a.x - 2, b.x + b.w + 3)
            y, to = a.y + a.h / 2, b.y + b.h / 2
            if a.y < to < a.y + a.h:
                y = to
            elif b.y < y < b.y + b.h:
                to = y
            bend = "" if y == to else f"H{(start + end) / 2:g} V{to:g} "
            self.line(f"M{start:g} {y:g} {bend}H{end:g}")
        else:
            narrow = min(a, b, key=lambda box: box.w)
            start, end = (a.y + a.h + 2, b.y - 3) if a.y < b.y else (a.y - 2, b.y + b.h + 3)
            self.line(f"M{narrow.x + narrow.w / 2:g} {start:g} V{end:g}")

    def legend(self, note: str = "", **meanings: str) -> None:
        """At the bottom: a note, and below it what the colours mean, by default what LEGEND says."""
        self.label(24, self.height - 44, note, "faint", "start")
        x = 24
        for kind, text in (meanings or LEGEND).items():
            self.parts.append(
                f'<rect class="{kind}" x="{x}" y="{self.height - 27}" width="14" height="14" rx="3"/>'
            )
            self.label(x + 21, self.height - 15, text, "faint", "start")
            x += int(text_width(text)) + 48

    def svg(self, title: str, desc: str) -> str:
        size = f'width="{WIDTH}" height="{self.height}"'
        names = (escape(" ".join(text.split())) for text in (title, desc))
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" class="rlnb" {size} viewBox="0 0 {WIDTH} {self.height}">',
            "<title>{}</title>\n<desc>{}</desc>".format(*names),
            f"<style>{STYLE}\n</style>\n{TIP}",
            f'<rect class="card" {size} rx="8"/>',
            *self.parts,
            "</svg>\n",
        ])  # fmt: skip


@figure(474)
def methods(p: Picture) -> None:
    """Which method for which data

    Worked answers lead to SFT, comparisons to DPO, ORPO or a reward model and PPO, thumbs to KTO, a checker to GRPO.
    """
    for x, text in ((125, "What do you have?"), (390, "Method, notebook"), (640, "It starts from")):
        p.label(x, 32, text, "strong")
    right = p.box(20, 48, 210, 48, "right answers\nwritten out", "data")
    pairs = p.box(20, 108, 210, 168, "comparisons\nof two answers to a prompt:\nchosen and rejected", "data")
    thumbs = p.box(20, 288, 210, 48, "thumbs\nup or down, on one answer", "data")
    checker = p.box(20, 348, 210, 48, "a program that checks\nno answer written out", "data")
    for i, (data, method, start) in enumerate((
        (right, "SFT\n02_sft", "the base"),
        (pairs, "DPO\n05_dpo", "the SFT model"),
        (pairs, "ORPO\n07_orpo", "the base"),
        (pairs, "reward model, then PPO\n03_reward_model, 04_rlhf_ppo", "the SFT model\nreward model: the base"),
        (thumbs, "KTO\n06_kto", "the SFT model"),
        (checker, "GRPO, or RLOO\n08_grpo, 04_rlhf_ppo", "the SFT model\nor a base, right sometimes"),
    )):  # fmt: skip
        method = p.box(275, 48 + 60 * i, 230, 48, method, "trains")
        p.arrow(data, method)
        p.arrow(p.box(550, 48 + 60 * i, 190, 48, start, "frozen"), method)
    p.legend(
        "PPO, RLOO and GRPO learn from answers that the model writes while it trains.",
        data="what you bring", trains="a LoRA adapter trains", frozen="what lies below it",
    )  # fmt: skip


@figure(324)
def lora(p: Picture) -> None:
    """A linear layer with LoRA

    h = W x + (alpha / r) B A x. W, d_out by d_in, is frozen. B, d_out by r, and A, r by d_in, train.
    """
    for x, w, h, name, kind, above, below in (
        (38, 26, 170, "h", "plain", "d_{out}", ""),
        (115, 150, 170, "W", "frozen", "d_{out} × d_{in}", "frozen"),
        (285, 26, 150, "x", "plain", "d_{in}", ""),
        (411, 32, 170, "B", "trains", "d_{out} × r", "zero at first"),
        (494, 150, 32, "A", "trains", "r × d_{in}", "small and random at first"),
        (694, 26, 150, "x", "plain", "d_{in}", ""),
    ):
        p.box(x, 130 - h / 2, w, h, name, kind)
        p.label(x + w / 2, 130 - h / 2 - 10, above)
        p.label(x + w / 2, 130 + h / 2 + 20, below, "faint")
    for x, sign in ((88, "="), (275, "·"), (333, "+"), (376, "α / r"), (468, "·"), (669, "·")):
        p.label(x, 135, sign, "strong")
    p.legend(
        "The change B A has rank r. At the start B = 0, so h = W x: nothing has changed.",
        trains="trains: r (d_{in} + d_{out}) numbers", frozen="frozen: d_{in} d_{out} numbers",
    )  # fmt: skip


@figure(240)
def masking(p: Picture) -> None:
    """Which tokens count in the loss

    Prompt and padding are masked with the label -100. The completion counts, and its end token too.
    """
    prompt, completion, padding = "<|user|> … many ? <|assistant|>", "… 7 </answer> <|end|>", "<|pad|> <|pad|>"
    x = 24
    for tokens, kind, text in (
        (prompt, "frozen", "prompt\nlabel −100: we teach it to answer, not to ask"),
        (completion, "trains", "completion\nloss = mean of −log p"),
        (padding, "frozen", "padding\nlabel −100"),
    ):
        start = x
        for token in tokens.split():
            w = int(text_width(token, True)) + 12
            p.box(x, 62, w, 34, token, kind)
            x += w + 4
            if token == "<|end|>":
                p.label(x - w / 2 - 4, 28, "the end token counts: it learns to stop")
                p.line(f"M{x - w / 2 - 4:g} 36 V58")
        p.line(f"M{start} 104 v8 H{x - 4} v-8", tip=False)
        p.label((start + x - 4) / 2, 134, text)
    p.legend(
        "Padding makes the rows of a batch equally long. Prompts to be continued are padded on the left.",
        trains="counts in the loss", frozen="masked",
    )  # fmt: skip


@figure(304)
def reward_model(p: Picture) -> None:
    """How a reward model learns from a comparison

    Prompt and chosen, prompt and rejected go through the same model. A score head at the last token gives r_chosen and
    r_rejected. The loss is -log sigmoid(r_chosen - r_rejected).
    """
    chosen = p.box(20, 52, 130, 52, "prompt +\nchosen answer", "data")
    rejected = p.box(20, 152, 130, 52, "prompt +\nrejected answer", "data")
    model = p.box(200, 24, 210, 208)
    p.label(305, 48, "one model for both", "strong")
    p.box(216, 62, 178, 40, "base", "frozen")
    p.box(216, 112, 178, 40, "LoRA adapter", "trains")
    p.box(216, 162, 178, 54, "score head\nreads the last token", "trains")
    loss = p.box(590, 98, 150, 60, "loss\n−log σ(r_{c} − r_{r})")
    for pair, reward in ((chosen, "r_{c}: one number"), (rejected, "r_{r}: one number")):
        reward = p.box(455, pair.y + 6, 90, 40, reward.split(":")[0], "data")
        p.arrow(pair, model)
        p.arrow(model, reward)
        p.arrow(reward, loss)
    p.legend("Only the difference of the two counts. Where it is 0 the loss is ln 2 = 0.6931.")


@figure(452)
def ppo_loop(p: Picture) -> None:
    """The loop of RLHF with PPO

    The policy writes. The reward model scores, the reference gives the KL penalty, the critic's value head what was
    expected. Advantages by GAE, a clipped update, and again. Policy and critic train.
    """
    prompts = p.box(20, 130, 100, 50, "prompts", "data")
    policy = p.box(158, 118, 150, 74, "policy\nwrites completions\nand their log π", "trains")
    judge = p.box(352, 24, 170, 68, "reward model\none score for each\ncompletion", "frozen")
    reference = p.box(352, 121, 170, 68, "reference\nthe policy at the start:\nlog π_{ref}", "frozen")
    critic = p.box(352, 218, 170, 68, "critic\na value head: how much\nis still to come?", "trains")
    reward = p.box(566, 52, 174, 108, "reward of a token\n−β (log π − log π_{ref});\nthe last token gets\nthe score as well", "data")
    advantage = p.box(566, 205, 174, 94, "advantage, by GAE\nhow much better\nthan the critic\nexpected")
    update = p.box(158, 330, 364, 50, "clipped update\nstops pulling once a token has moved by 20 %")
    for a, b in (
        (prompts, policy), (policy, judge), (policy, reference), (policy, critic), (judge, reward),
        (reference, reward), (reward, advantage), (critic, advantage), (update, critic),
    ):  # fmt: skip
        p.arrow(a, b)
    p.line("M653 301 V355 H525")
    p.line("M233 328 V195")
    p.label(226, 265, "and again", anchor="end")
    p.legend("All four share one frozen base: adapters and heads of their own make the roles.")


@figure(344)
def dpo(p: Picture) -> None:
    """From a comparison to the loss of DPO

    Policy and reference give the log-probabilities of both answers. Beta times each difference is an implicit reward;
    the loss is -log sigmoid of the difference of the two. There is no sampling and no reward model.
    """
    rewards = []
    for y, name, y_ in ((24, "chosen", "y_{w}"), (154, "rejected", "y_{l}")):
        answer = p.box(20, y + 29, 130, 52, f"prompt +\n{name} {y_}", "data")
        policy = p.box(195, y, 150, 50, f"policy\nlog π({y_})", "trains")
        reference = p.box(195, y + 60, 150, 50, f"reference\nlog π_{{ref}}({y_})", "frozen")
        rewards.append(p.box(390, y + 21, 170, 68, f"reward of {y_}\nβ (log π({y_})\n− log π_{{ref}}({y_}))"))
        for model in (policy, reference):
            p.arrow(answer, model)
            p.arrow(model, rewards[-1])
    loss = p.box(605, 104, 135, 80, "loss\n−log σ(reward y_{w}\n− reward y_{l})")
    for reward in rewards:
        p.arrow(reward, loss)
    p.legend("No sampling, no reward model. At the start policy = reference, and the loss is ln 2 = 0.6931.")


@figure(336)
def kto(p: Picture) -> None:
    """What a thumb is worth in KTO

    Against r - z, where r = beta log(pi / pi_ref): the value of a good answer is sigmoid(r - z), that of a bad one
    sigmoid(z - r). The loss is 1 minus the value.
    """
    for x, sign, title, how in ((56, 1, "thumb up (desirable)", "r − z"), (430, -1, "thumb down (undesirable)", "z − r")):
        p.label(x + 140, 28, title, "strong")
        p.line(f"M{x} 230 H{x + 284}")
        p.line(f"M{x} 230 V44")
        for at, text in ((0, "−6"), (140, "0"), (280, "6")):
            p.label(x + at, 250, text, "faint")
        p.label(x + 210, 250, "r − z", "faint")
        for up, text in ((0, "0"), (80, "½"), (160, "1")):
            p.label(x - 8, 234 - up, text, "faint", "end")
        for kind, turn in (("data", -sign), ("trains", sign)):
            points = [(x + 280 * i / 60, 230 - 160 / (1 + math.exp(-turn * (i - 30) / 5))) for i in range(61)]
            p.line("M" + " ".join(f"{a:.1f} {b:.1f}" for a, b in points), f"{kind} curve", tip=False)
        for kind, turn in ():
            pass
    p.legend(
        "r = β log π/π_{ref}; z is the reference point. Where a curve is flat, an answer hardly teaches.",
        trains="value: σ(r − z), or σ(z − r) for a thumb down", data="loss = 1 − value",
    )  # fmt: skip


@figure(356)
def orpo(p: Picture) -> None:
    """The two terms of ORPO

    One model, no reference. The likelihood of the chosen answer is imitated, and its odds are held against those of the
    rejected one.
    """
    chosen = p.box(20, 52, 120, 52, "prompt +\nchosen y_{w}", "data")
    rejected = p.box(20, 192, 120, 52, "prompt +\nrejected y_{l}", "data")
    model = p.box(180, 52, 120, 192, "policy\nstarts from\nthe base;\nno reference", "trains")
    likely = p.box(340, 44, 140, 68, "p_{w}\nmean probability\nof its tokens")
    unlikely = p.box(340, 184, 140, 68, "p_{l}\nmean probability\nof its tokens")
    imitate = p.box(530, 44, 210, 68, "imitate the chosen\n−log p_{w}\nas in SFT")
    prefer = p.box(530, 164, 210, 88, "prefer it\n−λ log σ(log odds_{w} / odds_{l})\nodds = p / (1 − p)\nλ = 0.1")
    for a, b in ((chosen, model), (rejected, model), (model, likely), (model, unlikely), (likely, imitate), (unlikely, prefer)):
        p.arrow(a, b)
    p.arrow(likely, prefer)
    p.label(635, 143, "+", "strong")
    p.label(635, 280, "= loss", "strong")
    p.legend("p is the geometric mean over the tokens of an answer, so its length does not decide.", trains="trains", data="data")


@figure(440)
def grpo(p: Picture) -> None:
    """One step of GRPO on one prompt

    A prompt, G answers, a reward for each from a checker; less the group's mean, over its deviation, is the advantage.
    It weighs every token of the answer. A group with equal rewards teaches nothing.
    """
    prompt = p.box(20, 134, 90, 50, "prompt", "data")
    policy = p.box(150, 124, 110, 70, "policy\nwrites\nG answers", "trains")
    for x, text in ((350, "answers"), (452, "checker:\nreward r"), (556, "advantage:\n(r − mean) / std"), (682, "each of\nits tokens")):
        p.label(x, 28, text, "strong")
    p.arrow(prompt, policy)
    for i, (reward, advantage) in enumerate((("1", "+1.5"), ("0", "−0.5"), ("0", "−0.5"), ("0", "−0.5"))):
        y = 64 + 48 * i
        answer = p.box(300, y, 100, 36, f"answer {i + 1}")
        p.arrow(policy, answer)
        row = [answer, p.box(426, y, 52, 36, reward, "data"), p.box(520, y, 72, 36, advantage)]
        row.append(p.box(624, y, 116, 36, "less likely" if i else "more likely", "trains"))
        for a, b in zip(row, row[1:]):
            p.arrow(a, b)
    for y, what, value in ((284, "all right", "1"), (332, "all wrong", "0")):
        p.label(400, y + 23, f"a group that is {what}", anchor="end")
        row = [p.box(426, y, 72, 36, " ".join(value * 4), "data"), p.box(520, y, 72, 36, "0 0 0 0")]
        p.arrow(*row)
        p.arrow(row[1], p.box(624, y, 116, 36, "no change", "frozen"))
    p.legend("The group itself says what was to be expected, so there is no critic.", trains="trains", data="data and rewards")


@figure(420)
def ship(p: Picture) -> None:
    """What becomes of an adapter

    Base and adapter are merged into a folder for vLLM, transformers serve or GGUF. Or the adapter stays beside its base.
    """
    trained = p.box(20, 24, 150, 160)
    p.label(95, 48, "after training", "strong")
    p.box(34, 62, 122, 48, "base", "frozen")
    p.box(34, 120, 122, 48, "adapter", "trains")
    merge = p.box(210, 65, 140, 78, "merge\nW + s B A,\nchecked before\nit is saved")
    folder = p.box(390, 65, 140, 78, "merged folder\n16-bit weights,\ntokenizer, card")
    p.arrow(trained, merge)
    p.arrow(merge, folder)
    for y, text in ((20, "vLLM\nvllm serve FOLDER"), (80, "transformers\ntransformers serve"), (140, "GGUF\nllama.cpp, ollama")):
        p.arrow(folder, p.box(570, y, 170, 50, text))
    beside = p.box(210, 238, 320, 96, "adapter beside its base\nno merge; one base in memory,\nmany adapters, switched\nfrom request to request")
    p.line("M95 186 V286 H207")
    for y, text in ((230, "vLLM\n--enable-lora"), (292, "PEFT\nPeftModel")):
        p.arrow(beside, p.box(570, y, 170, 50, text))
    p.legend(trains="trained", frozen="as it was")


@figure(470)
def your_own(p: Picture) -> None:
    """The order of checks before money is spent

    The reward by hand, the base's pass@1 and pass@k, the preflight, a small run, the held-out measure.
    """
    p.label(130, 30, "Check", "strong")
    p.label(276, 30, "What to look at", "strong", "start")
    p.label(640, 30, "If not", "strong")
    last = None
    for i, (check, look, otherwise) in enumerate((
        ("1. the reward, by hand", "a right answer, a nearly right one,\nnonsense: is each number meant?", "mend it: its mistakes\nare what is learnt"),
        ("2. the base", "pass@1 (greedy), pass@k (samples):\nright sometimes, and not always?", "never: SFT first\nalways: stop here"),
        ("3. preflight", "fit looks at rows, rate, memory and\nend token before it trains", "change what\nit names"),
        ("4. a small run", "a small model, a few steps: does the\nreward vary? do answers end?", "other prompts,\nlonger answers"),
        ("5. the held-out measure", "not the reward, not the training\nprompts; with its interval", "no gain here:\nno long run"),
    )):  # fmt: skip
        y = 48 + 66 * i
        step = p.box(20, y, 220, 48, check, "trains" if i == 3 else "plain")
        p.label(276, y + 20, look, anchor="start")
        p.box(550, y, 190, 48, otherwise, "data")
        if last:
            p.arrow(last, step)
        last = step
    p.arrow(last, p.box(20, 378, 220, 40, "the long run", "trains"))
    p.legend(trains="trains", data="what stops you")


@figure(400)
def real_model(p: Picture) -> None:
    """A message becomes JSON, and where each method gets its signal

    A customer's message and a line of policy go in, one JSON object comes out. A program checks four fields, another
    marks the reply's tone. Below: what SFT, DPO, ORPO, KTO and GRPO learn from.
    """
    message = p.box(20, 34, 180, 72, "message, policy\nthe policy says what\nis urgent today", "data")
    model = p.box(240, 34, 150, 72, "SmolLM2-135M\nwith a LoRA\nadapter", "trains")
    p.arrow(message, model)
    for y, text, check in ((20, "intent, order,\nurgency, product", "checker\nright or wrong"), (80, "reply", "tone\nmarks, 0 to 1")):
        part = p.box(430, y, 140, 48, text)
        p.arrow(model, part)
        p.arrow(part, p.box(610, y, 130, 48, check, "data"))
    p.line("M675 130 V178")
    p.label(20, 164, "What each method learns from", "strong", "start")
    for i, (signal, method) in enumerate((
        ("answers\nas the agents\nwrote them", "SFT"),
        ("pairs\nrejected: a worse\nreply, or a wrong field", "DPO, ORPO,\nreward model"),
        ("the same, apart\neach answer\ngood or bad", "KTO"),
        ("own answers\nfields, and a\nquarter of tone", "GRPO"),
    )):  # fmt: skip
        x = 20 + 185 * i
        p.arrow(p.box(x, 182, 165, 70, signal, "data"), p.box(x, 284, 165, 48, method, "trains"))
    p.legend(data="data and rewards", trains="trains")


if __name__ == "__main__":
    for name, svg in FIGURES.items():
        path = Path(__file__).with_name(f"{name}.svg")
        path.write_text(svg(), encoding="utf-8", newline="\n")
