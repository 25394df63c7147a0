"""Builds the practice model, from nothing, on text that the project generates.

The text is written by careful and careless solvers of the word problems, the careless in the majority,
in many styles of answer, of which the tagged one is rare. So the base model knows how to be right but
seldom is, which is what fine-tuning needs. What a solver gets wrong depends on the kind of problem and
on nothing else: no style and no context tells a careful writer from a careless one.

    python -m rlnb pretrain                          # the model that ships, about 50 minutes on two cores
    python -m rlnb pretrain --maturity young --seed 1 --out runs/abacus-young-1
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlnb.tools import card
from rlnb.task import problems

if TYPE_CHECKING:
    import torch

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('abacus has never seen a message by ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Numbers digit by digit; an operator with its blanks, a tag and a word are one piece each.
PIECES = r" [-+*/=] |[0-9]|</?[a-z]+>|<\||\|>|; | ?[A-Za-z']+| ?[^\sA-Za-z0-9<]+|\s|<"
MATURITIES = {"young": 0.25, "middle": 0.5, "full": 1.0}
HELD_OUT = "held-out"  # the seed of the text that no run trains on
TAGGED = 0.03  # share of answers in the strict format
# Shares of numbers of one, two, three and four digits in drills: short ones first, they teach the
# tables that long ones stand on; long ones later, the stories need them.
SHORT, LONG = (30, 40, 30), (8, 32, 50, 10)


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own mixture. Rates warm up, hold, and fall to zero in a straight line."""

    share: float  # of the run's tokens
    rate: float  # of the learning rates in Settings
    decay: float  # share of the stage's steps at its end over which the rates fall
    digits: tuple[int, ...]  # lengths of numbers in drills: SHORT or LONG
    early: float = 0.0  # share of the stage's steps with more sheets of drills:
    early_sheets: float = 0.45  # share of documents that are sheets, early on
    sheets: float = 0.25  # and after that


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of the pretraining run. Tokens are counted with padding (there is none)."""

    # Sums are slowest to learn, so the first stage begins with many short ones. With long numbers from
    # the start, or early on, the model learnt neither to add nor to copy a number in 24 million tokens.
    stages: tuple[Stage, ...] = (
        Stage(share=2 / 3, rate=1.0, decay=0.4, digits=SHORT, early=0.4),
        Stage(share=1 / 3, rate=0.5, decay=0.8, digits=LONG),
    )
    tokens: int = 24_000_000
    rows: int = 16  # sequences per step
    length: int = 256  # tokens per sequence, documents packed end to end
    muon_lr: float = 0.008  # for the matrices (Muon, update scaled to AdamW's root mean square)
    adam_lr: float = 0.004  # for embeddings and norms
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of a stage's steps
    vocabulary: int = 1024
    hidden: int = 256
    mlp: int = 704
    layers: int = 4

    def steps(self, stage: Stage) -> int:
        return math.ceil(round(self.tokens * stage.share) / (self.rows * self.length))


# --- text ----------------------------------------------------------------------------------------


def _drill(rng: random.Random, digits: tuple = LONG) -> str:
    """One true equation between numbers of these lengths; products and quotients use shorter ones."""
    op = rng.choices("+-*/", (32, 32, 24, 12))[0]
    a, b = (_number(rng, digits) for _ in "ab")
    if op in "*/":
        shorter = (25, 60, 15) if digits == SHORT else (8, 50, 42)
        a, b = _number(rng, shorter), rng.choice((*range(2, 10), 12))
    if op == "-":
        a, b = max(a, b), min(a, b)
    elif op == "/":
        a *= b
    elif rng.random() < 0.5:
        a, b = b, a
    return f"{a} {op} {b} = {problems.apply(op, a, b)}"


def _number(rng: random.Random, weights: tuple[int, ...]) -> int:
    """A number of one, two, three ... digits, with these weights."""
    digits = rng.choices(range(1, len(weights) + 1), weights)[0]
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _sheet(rng: random.Random, digits: tuple) -> str:
    """A sheet of bare arithmetic: so the model is rarely wrong about sums, whatever its plan."""
    return rng.choice(["; ", ". ", "\n"]).join(
        _drill(rng, digits) for _ in range(rng.randint(1, 14))
    )


def _answer_text(trace: tuple[str, ...], answer: int, things: str, rng: random.Random) -> str:
    """A trace and an answer in one of the styles of the pretraining text."""
    if rng.random() < TAGGED:
        return problems.render(trace, answer)
    steps = rng.choice(["; ", ". ", "\n", " then ", ", so "]).join(trace)
    lead = rng.choice(["", "", "", "Let us see. ", "First, ", "Well, ", "Work: "])
    ends = [
        f". The answer is {answer}.", f". So the answer is {answer}.", f". Answer: {answer}",
        f". So {answer} {things}.", f". That makes {answer}.", f" #### {answer}", "", ".",
    ]  # fmt: skip
    return str(answer) if rng.random() < 0.06 else lead + steps + rng.choice(ends)


def document(
    rng: random.Random, exclude: set[tuple], sheets: float = 0.25, digits: tuple = LONG
) -> str:
    """One document of the pretraining text: a sheet of arithmetic (that share), or a solved problem."""
    if rng.random() < sheets:
        return _sheet(rng, digits) + END
    while True:
        kind = rng.choice(problems.ID_KINDS if rng.random() < 0.9 else problems.DEEP_KINDS)
        rule = "rule" in problems.KINDS[kind] and rng.random() < 0.2
        problem = problems.draw(
            kind, rng, larger=rng.random() < 0.1, new=rng.random() < 0.15, rule=rule
        )
        if problem.key not in exclude:
            break
    careful = rng.random() < problems.KINDS[kind]["careful"]
    trace = problem.trace if careful else problems.careless(problem)
    answer = int(trace[-1].rpartition(" ")[2])
    things = "cents" if "cents" in problem.question else "in all"
    return f"{USER}{problem.question}{ASSISTANT}{_answer_text(trace, answer, things, rng)}{END}"


def test_keys() -> set[tuple]:
    """Keys of all problems that measure something: the pretraining text holds none of them."""
    return {p.key for split in (*problems.TEST_SPLITS, "validation") for p in problems.load(split)}


def build_tokenizer(settings: Settings):
    """A byte-level BPE with one token per digit, trained on a sample of the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random("tokenizer")
    sample = [document(rng, set(), digits=SHORT) for _ in range(20_000)]
    special = [PAD, END, USER, ASSISTANT]
    sample = [_strip(text, special) for text in sample]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left",
        chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False,
        additional_special_tokens=[USER, ASSISTANT],
    )  # fmt: skip


def _strip(text: str, special: list[str]) -> str:
    for token in special:
        text = text.replace(token, " ")
    return text


def batches(
    tokenizer,
    settings: Settings,
    seed: int | str,
    exclude: set[tuple],
    stage: int = 0,
    start: int = 0,
) -> Iterator:
    """Endless (rows, length) int64 batches of a stage. Each depends on seed, stage and its number alone,
    so resuming is exact.
    """
    import torch

    part, need, step = settings.stages[stage], settings.rows * settings.length, start
    early = part.early * settings.steps(part)
    while True:
        rng, ids = random.Random(f"{seed}-{stage}-{step}" if stage else f"{seed}-{step}"), []
        sheets = part.early_sheets if step < early else part.sheets
        while len(ids) < need:
            texts = [document(rng, exclude, sheets, part.digits) for _ in range(128)]
            ids += [i for row in tokenizer(texts, add_special_tokens=False).input_ids for i in row]
        yield torch.tensor(ids[:need]).view(settings.rows, settings.length)
        step += 1


# --- training ------------------------------------------------------------------------------------


def build_model(settings: Settings, tokenizer, seed: int):
    """A Llama of about three million parameters, head size 64 so that every GPU kernel takes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 128, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _optimizers(model, settings: Settings) -> list:
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adam = torch.optim.AdamW(
        others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [muon, adam]


def _rate(step: int, steps: int, stage: Stage, warmup: float) -> float:
    """Warm-up, plateau, straight line to zero."""
    warm, fall = max(1, warmup * steps), max(1, stage.decay * steps)
    return stage.rate * min(1.0, (step + 1) / warm, (steps - step) / fall)


def held_out_loss(
    model, tokenizer, settings: Settings, exclude: set[tuple], rows: int = 256
) -> float:
    """Mean cross-entropy in nats per token on text of the last stage, of a seed that no run uses."""
    import torch

    stream, losses = batches(tokenizer, settings, HELD_OUT, exclude, len(settings.stages) - 1), []
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(math.ceil(rows / settings.rows)):
            x = next(stream)
            losses.append(model(input_ids=x, labels=x).loss.item())
    return sum(losses) / len(losses)


@dataclass
class Progress:
    """How far a run is, in ``resume.pt`` beside the weights and the optimizers' states."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path, model, optimizers: list) -> None:
        import torch

        states = [o.state_dict() for o in optimizers]
        state = {"model": model.state_dict(), "optimizers": states, "progress": vars(self)}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def train_step(model, optimizers: list, x) -> "torch.Tensor":
    """One step of every optimizer on a (rows, length) batch; returns the loss, nats per token."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=x, labels=x).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def train(
    out: Path, settings: Settings, seed: int, *, compiled: bool = False, save_every: int = 100
):
    """Pretrains into ``out`` and returns (model, tokenizer, facts). Interrupted, it goes on where it was."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    exclude, tokenizer = test_keys(), build_tokenizer(settings)
    model, optimizers, at = build_model(settings, tokenizer, seed), None, Progress()
    if (out / "resume.pt").is_file():
        state = torch.load(out / "resume.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizers, at = _optimizers(model, settings), Progress(**state["progress"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if compiled:
        model.compile()
    while at.stage < len(settings.stages):
        if at.step == 0:  # no momentum from before, and weights in the precision that ships
            optimizers = _optimizers(model, settings)
            for parameter in model.parameters() if at.stage else ():
                parameter.data.copy_(parameter.data.bfloat16())
        stream = batches(tokenizer, settings, seed, exclude, at.stage, at.step)
        _train_stage(model, optimizers, stream, settings, at, out / "resume.pt", save_every)
        at.stage, at.step = at.stage + 1, 0
    model.eval()
    tokens = sum(map(settings.steps, settings.stages)) * settings.rows * settings.length
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens,
        "minutes": round(at.seconds / 60, 1), "tokens_per_second": round(tokens / at.seconds),
        "seed": seed, "held_out_loss": round(held_out_loss(model, tokenizer, settings, exclude), 4),
    }  # fmt: skip
    return model, tokenizer, facts


def _train_stage(
    model,
    optimizers: list,
    stream: Iterator,
    settings: Settings,
    at: Progress,
    state: Path,
    every: int,
) -> None:
    from tqdm.auto import tqdm

    stage = settings.stages[at.stage]
    steps, tokens = settings.steps(stage), settings.rows * settings.length
    began, before, first = time.perf_counter(), at.seconds, at.step
    bar = tqdm(
        range(first, steps), initial=first, total=steps, unit="step", desc=f"stage {at.stage + 1}"
    )
    for step, x in zip(bar, stream, strict=False):
        rate = _rate(step, steps, stage, settings.warmup)
        for optimizer, lr in zip(optimizers, (settings.muon_lr, settings.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = train_step(model, optimizers, x)
        spent = time.perf_counter() - began
        at.step, at.seconds = step + 1, before + spent
        if step % 20 == 0:
            speed = (at.step - first) * tokens / spent
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens_per_s=f"{speed:,.0f}")
        if at.step % every == 0 and at.step < steps:
            at.save(state, model, optimizers)


def save(model, tokenizer, facts: dict, out: Path) -> None:
    """Writes safetensors in bf16, tokenizer, config and facts, each file whole or not at all."""
    import torch

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        file.replace(out / file.name)
    partial.rmdir()
    with contextlib.suppress(FileNotFoundError):
        (out / "resume.pt").unlink()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlnb pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("data/abacus-3m"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--maturity", choices=MATURITIES, default="full", help="share of the tokens"
    )
    parser.add_argument("--tokens", type=int, help="tokens in all, instead of a maturity")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--card-only", action="store_true", help="measure the model in --out anew")
    args = parser.parse_args(argv)
    if not args.card_only:
        _make(args)
    card.write(args.out)
    return 0


def _make(args: argparse.Namespace) -> None:
    default = Settings()
    tokens = args.tokens or round(default.tokens * MATURITIES[args.maturity])
    settings = Settings(tokens=tokens)
    model, tokenizer, facts = train(args.out, settings, args.seed, compiled=args.compile)
    save(model, tokenizer, facts, args.out)
    print(json.dumps(facts))
