"""Draws the diagrams of the notebooks: `python notebooks/figures/draw.py` writes every SVG beside this file.

A function draws one figure. Its docstring describes the figure to readers who cannot see it.
"""

import math
from pathlib import Path

from picture import FIGURES, Picture, figure, text_width


@figure(478, "Which method for which data")
def methods(p: Picture) -> None:
    """Worked answers: SFT. Comparisons: DPO, ORPO, or a reward model and PPO. Thumbs: KTO. A checker: GRPO or RLOO."""
    for x, text in ((125, "What do you have?"), (390, "Method, notebook"), (645, "It starts from")):
        p.label(x, 32, text, "strong")
    written = p.box(20, 48, 210, 48, "right answers\nwritten out", "data")
    pairs = p.box(20, 108, 210, 168, "comparisons\nof two answers to a prompt:\nchosen and rejected", "data")
    thumbs = p.box(20, 288, 210, 48, "thumbs\nup or down, on one answer", "data")
    checker = p.box(20, 348, 210, 48, "a program that checks\nno answer written out", "data")
    rows = (
        (written, "SFT\n02_sft", "the base"),
        (pairs, "DPO\n05_dpo", "the SFT model"),
        (pairs, "ORPO\n07_orpo", "the base"),
        (pairs, "reward model, then PPO\n03_reward_model, 04_rlhf_ppo", "the base\nPPO: the SFT model"),
        (thumbs, "KTO\n06_kto", "the SFT model"),
        (checker, "GRPO, or RLOO\n08_grpo, 04_rlhf_ppo", "the SFT model\nor a base right sometimes"),
    )
    for i, (data, name, start) in enumerate(rows):
        method = p.box(275, 48 + 60 * i, 230, 48, name, "trains")
        p.arrows(data, method)
        p.arrows(p.box(550, 48 + 60 * i, 190, 48, start, "frozen"), method)
    meanings = dict(data="what you bring", trains="a LoRA adapter trains", frozen="what it starts from")
    p.legend("PPO, RLOO and GRPO learn from answers that the model writes while it trains.", **meanings)


@figure(322, "A linear layer with LoRA")
def lora(p: Picture) -> None:
    """h = W x + (alpha / r) B A x. W, d_out by d_in, is frozen. B, d_out by r, and A, r by d_in, train."""
    for x, w, h, name, kind, above, below in (
        (38, 26, 170, "h", "plain", "d_{out}", ""),
        (115, 150, 170, "W", "frozen", "d_{out} × d_{in}", "frozen"),
        (291, 26, 150, "x", "plain", "d_{in}", ""),
        (411, 32, 170, "B", "trains", "d_{out} × r", "zero at first"),
        (494, 150, 32, "A", "trains", "r × d_{in}", "small and random at first"),
        (694, 26, 150, "x", "plain", "d_{in}", ""),
    ):
        p.box(x, 130 - h / 2, w, h, name, kind)
        p.label(x + w / 2, 130 - h / 2 - 10, above)
        p.label(x + w / 2, 130 + h / 2 + 20, below, "faint")
    for x, sign in ((89, "="), (278, "·"), (339, "+"), (377, "α / r"), (468, "·"), (669, "·")):
        p.label(x, 135, sign, "strong")
    numbers = dict(trains="trains: r (d_{in} + d_{out}) numbers", frozen="frozen: d_{in} · d_{out} numbers")
    p.legend("The change B A has rank r. At the start B = 0, so h = W x: nothing has changed.", **numbers)


@figure(236, "Which tokens count in the loss of SFT")
def masking(p: Picture) -> None:
    """Prompt and padding are masked with the label -100. The completion counts, and the end token with it."""
    x = 26
    for tokens, kind, text in (
        ("<|user|> … many ? <|assistant|>", "frozen", "prompt\nlabel −100: we teach it to answer, not to ask"),
        ("… 7 </answer> <|end|>", "trains", "completion\nloss = mean of −log p"),
        ("<|pad|> <|pad|>", "frozen", "padding\nlabel −100"),
    ):
        start = x
        for token in tokens.split():
            w = int(text_width(token, True)) + 14
            p.box(x, 60, w, 34, token, kind)
            if token == "<|end|>":
                p.label(x + w / 2, 28, "the end token counts: it learns to stop")
                p.line(f"M{x + w / 2:g} 36 V56")
            x += w + 4
        p.line(f"M{start} 102 v8 H{x - 4} v-8", tip=False)
        p.label((start + x - 4) / 2, 130, text)
    note = "Padding makes the rows of a batch equally long. Prompts to be continued are padded on the left."
    p.legend(note, trains="counts in the loss", frozen="masked")


@figure(306, "How a reward model learns from a comparison")
def reward_model(p: Picture) -> None:
    """One model reads prompt and chosen answer, then prompt and rejected answer. Its score head gives r_c and r_r at
    the last token. The loss is -log sigmoid(r_c - r_r).
    """
    model = p.box(200, 20, 210, 214)
    p.label(305, 45, "the same model for both", "strong")
    p.box(216, 60, 178, 40, "base", "frozen")
    p.box(216, 110, 178, 40, "LoRA adapter", "trains")
    p.box(216, 160, 178, 58, "score head\nreads the last token", "trains")
    loss = p.box(590, 98, 150, 60, "loss\n−log σ(r_{c} − r_{r})")
    for y, name, r in ((52, "chosen", "r_{c}"), (152, "rejected", "r_{r}")):
        pair = p.box(20, y, 130, 52, f"{name}\nprompt + answer", "data")
        p.arrows(pair, model, p.box(455, y + 6, 90, 40, r, "data"), loss)
    note = "Only the difference of the two counts. Where it is 0, the loss is ln 2 = 0.6931."
    p.legend(note, trains="trains", frozen="frozen", data="data and rewards: each r is one number")


@figure(458, "The loop of RLHF with PPO")
def ppo_loop(p: Picture) -> None:
    """The policy writes. The reward model scores, the reference gives the KL penalty, the critic what is to come.
    Then advantages by GAE, a clipped update of policy and critic, and again. These two train, the others are frozen.
    """
    prompts = p.box(20, 130, 100, 50, "prompts", "data")
    policy = p.box(158, 118, 150, 74, "policy\nwrites completions\nand their log π", "trains")
    judge = p.box(352, 24, 170, 68, "reward model\none score for each\ncompletion", "frozen")
    reference = p.box(352, 121, 170, 68, "reference\nthe policy at the start:\nlog π_{ref}", "frozen")
    critic = p.box(352, 218, 170, 68, "critic\na value head: what\nis still to come?", "trains")
    parts = "−β (log π − log π_{ref});\nthe last token gets\nthe score as well"
    reward = p.box(566, 52, 174, 108, f"reward of a token\n{parts}", "data")
    advantage = p.box(566, 205, 174, 94, "advantage, by GAE\nhow much better\nthan the critic\nexpected")
    update = p.box(158, 330, 364, 50, "clipped update\nno pull beyond 20 % in the wanted direction")
    p.arrows(prompts, policy, judge, reward, advantage)
    p.arrows(policy, reference, reward)
    p.arrows(policy, critic, advantage)
    p.arrows(update, critic)
    p.line("M653 301 V355 H525")
    p.line("M233 328 V195")
    p.label(224, 265, "and again", anchor="end")
    p.legend("All four share one frozen base: adapters and heads of their own make the roles.")


@figure(346, "From a comparison to the loss of DPO")
def dpo(p: Picture) -> None:
    """Policy and reference give log-probabilities of both answers. Beta times the difference is an implicit reward. The
    loss is -log sigmoid of the chosen answer's less the rejected one's. There is no sampling and no reward model.
    """
    loss = p.box(605, 107, 135, 70, "loss\n−log σ(r_{w} − r_{l})")
    for y, name, i in ((24, "chosen", "_{w}"), (154, "rejected", "_{l}")):
        answer = p.box(20, y + 29, 130, 52, f"{name} y{i}\nprompt + answer", "data")
        policy = p.box(195, y, 150, 50, f"policy\nlog π(y{i})", "trains")
        reference = p.box(195, y + 60, 150, 50, f"reference\nlog π_{{ref}}(y{i})", "frozen")
        formula = f"β (log π(y{i})\n− log π_{{ref}}(y{i}))"
        reward = p.box(390, y + 14, 170, 82, f"implicit reward r{i}\n{formula}")
        p.arrows(answer, policy, reward, loss)
        p.arrows(answer, reference, reward)
    p.legend("No sampling, no reward model. At the start policy = reference, and the loss is ln 2 = 0.6931.")


@figure(354, "What a thumb is worth in KTO")
def kto(p: Picture) -> None:
    """Against r - z, with r = beta log(pi / pi_ref): the value of a good answer rises as sigmoid(r - z), that of a bad
    one falls as sigmoid(z - r). The loss is 1 minus the value. Training moves good answers right and bad ones left.
    """
    for x, sign, title in ((54, 1, "thumb up (desirable)"), (424, -1, "thumb down (undesirable)")):
        p.label(x + 140, 28, title, "strong")
        p.line(f"M{x} 46 V220 H{x + 300}", tip=False)
        for at, text in ((0, "−6"), (140, "0"), (280, "6")):
            p.label(x + at, 240, text, "faint")
            p.label(x - 10, 224 - at * 4 / 7, {0: "0", 140: "½", 280: "1"}[at], "faint", "end")
        for name, kind, turn, y in (("loss", "data", -sign, 196), ("value", "trains", sign, 90)):
            steps = [i / 5 for i in range(-30, 31)]  # of r - z
            points = [(x + 140 + 140 / 6 * s, 220 - 160 / (1 + math.exp(-turn * s))) for s in steps]
            p.line("M" + " ".join(f"{a:.1f} {b:.1f}" for a, b in points), f"{kind} curve", tip=False)
            p.label(x + 140 + 86 * sign, y, name, "strong")
        p.label(x + 292, 210, "r − z", "faint")
        p.label(x + 140, 268, "training: r − z goes " + ("up" if sign > 0 else "down"), "faint")
    note = "r = β log π/π_{ref}; z is the reference point. Where the curves are flat, an answer hardly teaches."
    p.legend(note, trains="value: σ(r − z); of a thumb down σ(z − r)", data="loss = 1 − value")


@figure(352, "The two terms of ORPO")
def orpo(p: Picture) -> None:
    """One model, no reference. The chosen answer is imitated, and its odds are held against the rejected one's."""
    model = p.box(190, 38, 110, 206, "policy\nstarts from\nthe base;\nno reference", "trains")
    imitate = p.box(530, 38, 210, 68, "imitate the chosen\n−log p_{w}, as in SFT")
    odds = "−λ log σ(log odds_{w} / odds_{l})\nodds = p / (1 − p)"
    prefer = p.box(530, 156, 210, 88, f"prefer it to the rejected\n{odds}")
    for y, name, i, terms in ((38, "chosen", "_{w}", (imitate, prefer)), (176, "rejected", "_{l}", (prefer,))):
        answer = p.box(20, y + 8, 130, 52, f"{name} y{i}\nprompt + answer", "data")
        likely = p.box(340, y, 140, 68, f"p{i}\nmean probability\nof its tokens")
        p.arrows(answer, model, likely)
        for term in terms:
            p.arrows(likely, term)
    p.label(635, 136, "+", "strong")
    p.label(635, 270, "= loss", "strong")
    note = "p is the geometric mean over an answer's tokens, so its length does not decide."
    p.legend(note, trains="trains", data="data")


@figure(436, "One prompt in a step of GRPO")
def grpo(p: Picture) -> None:
    """A prompt, G answers, a reward for each from a checker. Less the group's mean, over its std, it is the advantage.
    It weighs every token of the answer. A group with equal rewards teaches nothing.
    """
    policy = p.box(150, 62, 110, 180, "policy\nwrites a group\nof G answers", "trains")
    p.arrows(p.box(20, 127, 90, 50, "prompt", "data"), policy)
    heads = ("G answers", "checker:\nreward r", "advantage:\n(r − mean) / std", "each of\nits tokens")
    for x, text in zip((350, 452, 556, 682), heads, strict=True):
        p.label(x, 24, text, "strong")
    for i in range(4):
        reward, advantage, change = ("0", "−0.5", "less likely") if i else ("1", "+1.5", "more likely")
        p.arrows(
            policy,
            answer := p.box(300, 62 + 48 * i, 100, 36, f"answer {i + 1}"),
            p.box(426, answer.y, 52, 36, reward, "data"),
            p.box(520, answer.y, 72, 36, advantage),
            p.box(624, answer.y, 116, 36, change, "trains"),
        )
    for y, what, rewards in ((274, "all right", "1 1 1 1"), (322, "all wrong", "0 0 0 0")):
        p.label(400, y + 23, f"a group that is {what}", anchor="end")
        silent = p.box(520, y, 72, 36, "0 0 0 0")
        p.arrows(p.box(416, y, 72, 36, rewards, "data"), silent, p.box(624, y, 116, 36, "no change"))
    note = "Above: mean 0.25, std 0.5. The group itself says what was to be expected, so there is no critic."
    p.legend(note, trains="trains", data="data and rewards")


@figure(398, "What becomes of an adapter")
def ship(p: Picture) -> None:
    """Base and adapter are merged into a folder for vLLM, transformers or GGUF. Or they stay apart, side by side."""
    trained = p.box(20, 24, 150, 164)
    p.label(95, 49, "after training", "strong")
    p.box(34, 64, 122, 48, "base", "frozen")
    p.box(34, 124, 122, 48, "adapter", "trains")
    merge = p.box(210, 58, 140, 96, "merge\nW + s B A,\nchecked before\nit is saved")
    folder = p.box(390, 64, 140, 84, "merged folder\n16-bit weights,\ntokenizer, card")
    p.arrows(trained, merge, folder)
    why = "no merge; one base in memory,\nmany adapters, switched\nfrom request to request"
    beside = p.box(210, 222, 320, 96, f"adapter beside its base\n{why}")
    p.line("M95 190 V270 H207")
    for start, y, text in (
        (folder, 20, "vLLM\nvllm serve FOLDER"),
        (folder, 81, "transformers\ntransformers serve"),
        (folder, 142, "GGUF\nllama.cpp, ollama"),
        (beside, 212, "vLLM\n--enable-lora"),
        (beside, 278, "PEFT\nPeftModel"),
    ):
        p.arrows(start, p.box(570, y, 170, 50, text))
    note = "s = α / r. The check compares weights bit for bit, and logits."
    p.legend(note, trains="trained", frozen="as it was")


@figure(480, "The order of checks before money is spent")
def your_own(p: Picture) -> None:
    """The reward by hand, the base's greedy answers and pass@8, the preflight, a small run, the held-out measure."""
    for x, text in ((130, "Check"), (395, "What to look at"), (645, "If it fails")):
        p.label(x, 32, text, "strong")
    rows = (
        ("the reward, by hand", "a right answer, a nearly right one,\nnonsense: is each number meant?"),
        ("the base", "greedy answers, and pass@8:\nright sometimes, not always?"),
        ("preflight", "fit looks at rows, rate, memory\nand end token before it trains"),
        ("a small run", "a small model, a few steps: does\nthe reward vary, do answers end?"),
        ("the held-out measure", "not the reward, not the training\nprompts; with its interval"),
    )
    failed = (
        "\nmend it: its mistakes\nare what is learnt",
        "\nnever right: SFT first\nalways: nothing to learn",
        "\nchange what it names",
        "\nother prompts,\nlonger answers",
        "\nno long run",
    )
    steps = []
    for i, (check, look) in enumerate(rows):
        kind = "trains" if check == "a small run" else "plain"
        steps.append(p.box(20, 48 + 66 * i, 220, 48, f"{i + 1}. {check}", kind))
        p.label(395, 68 + 66 * i, look)
        p.box(550, 48 + 66 * i, 190, 48, failed[i], "data")
    p.arrows(*steps, p.box(20, 378, 220, 48, "the long run", "trains"))
    p.legend(trains="trains", data="what holds you back")


@figure(424, "A message becomes JSON, and what each method learns from")
def real_model(p: Picture) -> None:
    """A customer's message and a policy go in, one JSON object comes out. A program checks four fields, another marks
    the reply's tone. Below: what SFT, DPO, ORPO, the reward model, KTO and GRPO learn from.
    """
    message = p.box(20, 36, 180, 80, "message and policy\nthe policy says what\nis urgent today", "data")
    model = p.box(235, 36, 150, 80, "SmolLM2-135M\nand a LoRA\nadapter", "trains")
    p.arrows(message, model)
    judges = p.box(586, 10, 154, 132)
    for y, part, judge in (
        (22, "\nintent, order,\nurgency, product", "checker\nright or wrong"),
        (82, "reply", "tone\nmarks, 0 to 1"),
    ):
        p.arrows(model, p.box(420, y, 130, 48, part), p.box(600, y, 126, 48, judge, "data"))
    p.label(20, 174, "What each method learns from", "strong", "start")
    signals = (
        ("answers\nas the agents\nwrote them", "SFT"),
        ("pairs\nrejected: worse reply\nor one wrong field", "DPO, ORPO\nand the reward model"),
        ("labels\nthe same answers,\neach good or bad", "KTO"),
        ("rewards\nfields + tone / 4, for\nfour own answers", "GRPO"),
    )
    for i, (text, method) in enumerate(signals):
        signal = p.box(20 + 184.5 * i, 190, 166.5, 72, text, "data")
        p.arrows(signal, p.box(signal.x, 296, 166.5, 48, method, "trains"))
    p.arrows(judges, signal)
    note = "The model writes one JSON object. The same two programs measure it, on customers it has not seen."
    p.legend(note, trains="trains", data="data and rewards")


if __name__ == "__main__":
    for name, svg in FIGURES.items():
        path = Path(__file__).with_name(f"{name}.svg")
        path.write_text(svg(), encoding="utf-8", newline="\n")
