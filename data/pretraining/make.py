"""Builds the practice model, from nothing, on text that the project generates.

The text is written by careful and careless solvers of the word problems, the careless in the majority, in
many styles of answer, of which the tagged one is rare. So the base model knows how to be right but seldom is,
which is what fine-tuning needs. What a solver gets wrong depends on the kind of problem and on nothing else:
no style and no context tells a careful writer from a careless one.

    python -m rlnb pretrain                          # the model that ships, about 50 minutes on two cores
    python -m rlnb pretrain --maturity young --seed 1 --out runs/abacus-young-1
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlnb.task import problems
from data.pretraining import card

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def _answer_text(trace: tuple[str, ...], answer: int, things: str, rng: random.Random) -> str:
    """A trace and an answer in one of the styles of the pretraining text."""
    if rng.random() < TAGGED:
        return problems.render(trace, answer)
    steps = rng.choice(["; ", ". ", "\n", " then ", ", so "]).join(trace)
    lead = rng.choice(["", "", "", "Let us see. ", "First, ", "Well, ", "Work: "])
    ends = [f". The answer is {answer}.", f". So the answer is {answer}.", f". Answer: {answer}",
            f". So {answer} {things}.", f". That makes {answer}.", f" #### {answer}", "", "."]  # fmt: skip
    return str(answer) if rng.random() < 0.06 else lead + steps + rng.choice(ends)


def document(rng: random.Random, exclude: set[tuple], sheets: float = 0.25, digits: tuple = LONG) -> str:
    """One document of the pretraining text: a sheet of bare arithmetic (that share), which makes the model
    rarely wrong about sums, whatever its plan; or a solved problem.
    """
    if rng.random() < sheets:
        mark = rng.choice(["; ", ". ", "\n"])
        return mark.join(_drill(rng, digits) for _ in range(rng.randint(1, 14))) + END
    while True:
        kind = rng.choice(problems.ID_KINDS if rng.random() < 0.9 else problems.DEEP_KINDS)
        rule = "rule" in problems.KINDS[kind] and rng.random() < 0.2
        problem = problems.draw(kind, rng, larger=rng.random() < 0.1, new=rng.random() < 0.15, rule=rule)
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


def build_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one token per digit, trained on a sample of the text."""
    rng, special = random.Random("tokenizer"), [PAD, END, USER, ASSISTANT]
    sample = [document(rng, set(), digits=SHORT) for _ in range(20_000)]
    for token in special:
        sample = [text.replace(token, " ") for text in sample]
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


def batches(
    tokenizer: Any, settings: Settings, seed: int | str, exclude: set[tuple], stage: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Endless (rows, length) int64 batches of a stage. Each depends on seed, stage and its number alone,
    so resuming is exact.
    """
    part, size, step = settings.stages[stage], settings.rows * settings.length, start
    early = part.early * settings.steps(part)
    while True:
        rng, ids = random.Random(f"{seed}-{stage}-{step}" if stage else f"{seed}-{step}"), []
        sheets = part.early_sheets if step < early else part.sheets
        while len(ids) < size:
            texts = [document(rng, exclude, sheets, part.digits) for _ in range(128)]
            ids += [i for row in tokenizer(texts, add_special_tokens=False).input_ids for i in row]
        yield torch.tensor(ids[:size]).view(settings.rows, settings.length)
        step += 1


# --- training ------------------------------------------------------------------------------------


def build_model(settings: Settings, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama of about three million parameters, head size 64 so that every GPU kernel takes it."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 128, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def _optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, settings.muon_lr, settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def held_out_loss(model: LlamaForCausalLM, tokenizer: Any, settings: Settings, exclude: set[tuple]) -> float:
    """Mean cross-entropy in nats per token on 256 rows of the last stage, of a seed that no run uses."""
    stream, losses = batches(tokenizer, settings, "held-out", exclude, len(settings.stages) - 1), []
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(math.ceil(256 / settings.rows)):
            x = next(stream)
            losses.append(model(input_ids=x, labels=x).loss.item())
    return sum(losses) / len(losses)


def train_step(model: LlamaForCausalLM, optimizers: list, x: torch.Tensor) -> torch.Tensor:
    """One step of every optimizer on a (rows, length) batch; returns the loss, nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=x, labels=x).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def train(out: Path, settings: Settings, seed: int, save_every: int = 100) -> tuple[Any, Any, dict]:
    """Pretrains into ``out`` and returns (model, tokenizer, facts). Interrupted, it goes on where it was."""
    out.mkdir(parents=True, exist_ok=True)
    exclude, tokenizer = test_keys(), build_tokenizer(settings)
    model = build_model(settings, tokenizer, seed)
    at = {"stage": 0, "step": 0, "seconds": 0.0}  # how far the run is
    if (out / "resume.pt").is_file():
        state = torch.load(out / "resume.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizers, at = _optimizers(model, settings), state["progress"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    while at["stage"] < len(settings.stages):
        if at["step"] == 0:  # no momentum from before, and weights in the precision that ships
            optimizers = _optimizers(model, settings)
            for parameter in model.parameters() if at["stage"] else ():
                parameter.data.copy_(parameter.data.bfloat16())
        stream = batches(tokenizer, settings, seed, exclude, at["stage"], at["step"])
        for _ in _stage_steps(model, optimizers, stream, settings, at):
            if at["step"] % save_every == 0:
                states = [optimizer.state_dict() for optimizer in optimizers]
                weights = model.state_dict()
                torch.save({"model": weights, "optimizers": states, "progress": at}, out / "resume.tmp")
                (out / "resume.tmp").replace(out / "resume.pt")
        at |= {"stage": at["stage"] + 1, "step": 0}
    tokens = sum(map(settings.steps, settings.stages)) * settings.rows * settings.length
    facts = {
        "parameters": model.num_parameters(), "tokens": tokens,
        "minutes": round(at["seconds"] / 60, 1), "tokens_per_second": round(tokens / at["seconds"]),
        "seed": seed, "held_out_loss": round(held_out_loss(model, tokenizer, settings, exclude), 4),
    }  # fmt: skip
    return model.eval(), tokenizer, facts


def _stage_steps(
    model: LlamaForCausalLM, optimizers: list, stream: Iterator[torch.Tensor], settings: Settings, at: dict
) -> Iterator[None]:
    """Trains one stage; comes back after every step but the last one."""
    stage = settings.stages[at["stage"]]
    steps, first, began = settings.steps(stage), at["step"], time.perf_counter() - at["seconds"]
    warm, fall = max(1, settings.warmup * steps), max(1, stage.decay * steps)
    bar = tqdm(range(first, steps), f"stage {at['stage'] + 1}", steps, initial=first, unit="step")
    for step, x in zip(bar, stream, strict=False):
        rate = stage.rate * min(1.0, (step + 1) / warm, (steps - step) / fall)
        for optimizer, lr in zip(optimizers, (settings.muon_lr, settings.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = train_step(model, optimizers, x)
        at |= {"step": step + 1, "seconds": time.perf_counter() - began}
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step + 1 < steps:
            yield


def main(arguments: Any, rest: list[str]) -> int:
    """python -m rlnb pretrain"""
    if not arguments.card_only:
        settings = Settings(tokens=round(Settings.tokens * MATURITIES[arguments.maturity]))
        card.save(*train(arguments.out, settings, arguments.seed), arguments.out)
    card.write(arguments.out)
    return 0
