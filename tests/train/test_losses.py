"""TRL's preference losses are those of the notebooks' formulas, term by term, on the same batch.

Each loss is computed here from log-probabilities that a plain forward pass gives, one completion at
a time, and compared with what TRL's own trainer makes of the whole batch.
"""

import math
from statistics import fmean

import pytest
import torch

from rlnb.data import shapes
from rlnb.measure.judge import judge_pairs
from rlnb.model import LoRA, load_model, reward_model
from tests import tiny

PROMPTS = ("1 + 2?", "What is 12 + 5?", "Anna has 7 pens and buys 3 more. How many now?", "9 - 4?")
CHOSEN = ("3", "12 + 5 = 17", "<reasoning>7 + 3 = 10</reasoning><answer>10</answer>", "It is 5.")
REJECTED = ("12", "17", "7 - 3 = 4", "9 - 4 = 6; so 6")
WHERE = {"per_device_train_batch_size": 4, "max_steps": 1, "bf16": False, "use_cpu": True,
         "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
         "max_length": 512, "learning_rate": 1e-3, "logging_steps": 1}  # fmt: skip
BETA = 0.3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(base):
    return load_model(base, lora=LoRA(rank=4, alpha=8))


def pairs():
    return shapes.preference(
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    )


def labels():
    texts = zip(PROMPTS * 2, CHOSEN + REJECTED, [True] * 4 + [False] * 4, strict=True)
    rows = [{"prompt": p, "completion": c, "label": good} for p, c, good in texts]
    return shapes.unpaired(rows[i] for i in (0, 5, 2, 7, 4, 1, 6, 3))


def move(model, seed=0):
    """Put the trained adapter somewhere, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)


def log_probs(model, tokenizer, prompt, completion=(), adapter="default"):
    """Log-probability of each token but the first of the whole, and how many are the completion's."""
    model.set_adapter(adapter)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
    ids = whole["input_ids"]
    head = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert ids[: len(head)] == head
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    model.set_adapter("default")
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist(), len(ids) - len(head)


def completion_log_probs(*arguments):
    found, length = log_probs(*arguments)
    return found[-length:]


def ratio(model, tokenizer, prompt, completion):
    """log pi(y|x) - log pi_ref(y|x), with the reference in TRL's adapter."""
    policy, reference = (
        sum(completion_log_probs(model, tokenizer, prompt, completion, adapter))
        for adapter in ("default", "ref")
    )
    return policy - reference


def loss_of(trainer):
    """TRL's loss of the first batch, which here holds all rows."""
    trainer.model.train()
    (batch,) = trainer.get_train_dataloader()
    return trainer.compute_loss(trainer.model, batch).item()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dpo_trainer(model, tokenizer, folder):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(str(folder), **WHERE, beta=BETA, loss_type=["sigmoid"])
    return DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)


def test_dpo(policy, tmp_path):
    model, tokenizer = policy
    trainer = dpo_trainer(model, tokenizer, tmp_path)
    assert loss_of(trainer) == pytest.approx(math.log(2), abs=1e-6)  # policy = reference
    move(model)
    margins = [
        BETA * (ratio(model, tokenizer, row["prompt"], row["chosen"])
                - ratio(model, tokenizer, row["prompt"], row["rejected"]))
        for row in pairs()
    ]  # fmt: skip
    assert max(map(abs, margins)) > 0.1  # there is something to compare
    wanted = fmean(-math.log(sigmoid(margin)) for margin in margins)
    assert loss_of(trainer) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_kto(policy, tmp_path, seed):
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = policy
    args = KTOConfig(str(tmp_path), **WHERE | {"per_device_train_batch_size": 8}, beta=BETA,
                     desirable_weight=1.5, train_sampling_strategy="sequential")  # fmt: skip
    trainer = KTOTrainer(model, args=args, train_dataset=labels(), processing_class=tokenizer)
    assert loss_of(trainer) == pytest.approx((1.5 + 1) / 2 / 2, abs=1e-6)
    move(model, seed)
    rows = list(labels())
    before = [rows[-1], *rows[:-1]]  # each prompt gets the completion of the row before it
    strangers = [
        ratio(model, tokenizer, row["prompt"], other["completion"])
        for row, other in zip(rows, before, strict=True)
    ]
    z = max(0.0, fmean(strangers))
    wanted = []
    for row in rows:
        moved = ratio(model, tokenizer, row["prompt"], row["completion"])
        if row["label"]:
            wanted.append(1.5 * (1 - sigmoid(BETA * (moved - z))))
        else:
            wanted.append(1 - sigmoid(BETA * (z - moved)))
    assert (z > 0.05) == (seed == 0)  # one seed on each side of the cut
    assert loss_of(trainer) == pytest.approx(fmean(wanted), abs=1e-4)


def test_orpo(policy, tmp_path):
    """TRL imitates the prompt too: the first term is over all tokens, unlike the paper's eq. 6."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = policy
    move(model)
    args = ORPOConfig(str(tmp_path), **WHERE, beta=BETA)
    trainer = ORPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    imitated, odds = [], []
    for row in pairs():
        imitated += log_probs(model, tokenizer, row["prompt"], row["chosen"])[0]
        sides = (completion_log_probs(model, tokenizer, row["prompt"], row[side])
                 for side in ("chosen", "rejected"))  # fmt: skip
        chosen, rejected = (fmean(x) - math.log1p(-math.exp(fmean(x))) for x in sides)
        odds.append(chosen - rejected)
    wanted = -fmean(imitated) - BETA * fmean(math.log(sigmoid(x)) for x in odds)
    assert loss_of(trainer) == pytest.approx(wanted, abs=1e-4)


def test_reward_model(base, tmp_path):
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = reward_model.load(base, LoRA(rank=4, alpha=8))
    trainer = RewardTrainer(
        model, args=RewardConfig(str(tmp_path), **WHERE), train_dataset=pairs(),
        processing_class=tokenizer,
    )  # fmt: skip
    report = judge_pairs(model, tokenizer, pairs())
    assert len(set(report.margins)) == 4
    assert loss_of(trainer) == pytest.approx(report.loss, abs=1e-4)


def test_a_second_preference_trainer_on_one_model(policy, tmp_path):
    """TRL leaves the reference on the model; taking it away makes room for the next one."""
    model, tokenizer = policy
    dpo_trainer(model, tokenizer, tmp_path)
    move(model)
    with pytest.raises(ValueError, match="Adapter with name 'ref' already exists"):
        dpo_trainer(model, tokenizer, tmp_path)
    model.delete_adapter("ref")
    trainer = dpo_trainer(model, tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)  # it starts from what there was
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".default." in name for name in changed)
