"""Bad input to rlnb.train: what the message must say, and that no run is left but failed ones."""

import math

import broken
import pytest
from clear import cases, check, environment, inside

from rlnb.model import LoRA, load_model, save_adapter
from rlnb.record import runs
from rlnb.task import rewards
from rlnb.train import fit, methods, recipe, train
from rlnb.train.ppo import PPOConfig, PPOTrainer

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

USER, SAID = [{"role": "user", "content": "1 and 2?"}], [{"role": "assistant", "content": "3"}]
DEMOS = Dataset.from_list([{"prompt": USER, "completion": SAID}] * 16)
PAIRS = Dataset.from_list([{"prompt": USER, "chosen": SAID, "rejected": USER}] * 16)
PROMPTS = Dataset.from_list([{"prompt": USER, "answer": 3, "question": "1 and 2?"}] * 16)
EMPTY = Dataset.from_list([])
TOO_LONG = Dataset.from_list([{"prompt": [{"role": "user", "content": "1 " * 600}], "completion": SAID}] * 16)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """good: an adapter on the practice model; bad/: broken ones; runs/: a registry."""
    folder = tmp_path_factory.mktemp("house")
    with environment(RLNB_RUNS=folder / "runs"):
        model, _ = load_model("abacus-3m", LoRA(rank=4, alpha=8))
        broken.move_b(model)
        save_adapter(model, folder / "good")
        broken.adapters(folder / "bad", folder / "good", "abacus-3m")
        with runs.start("dpo") as done:
            done.log(1, loss=1.0)
        with pytest.raises(ZeroDivisionError), runs.start("dpo"):
            _ = 1 / 0
        yield folder


def method(name, **given):
    """train(name), from the good adapter where the method starts from one."""
    def call(house):
        start = {} if name in methods.FROM_BASE else {"start": house / "good"}
        paths = {key: house / value[1:] for key, value in given.items() if isinstance(value, str) and value[:1] == "@"}
        return train(name, problems=(), **start | given | paths)

    return call


def says(*values):
    def mine(completions, **columns):
        return [values[i % len(values)] for i in range(len(completions))]

    return mine


def newest(status):
    return runs.find(status=status)[0]


def under(**environ):
    return lambda house: inside(environment(**environ), lambda: train("sft", problems=()))


SAMPLED = {"data": PROMPTS, "per_device_train_batch_size": 8}


@cases(
    (method("dqn"), ValueError, "method is 'dqn'", "one of sft, reward_model"),
    (method(None), ValueError, "method is None", "one of sft"),
    (method("dpo", bta=1.0), TypeError, "DPOConfig has no argument bta"),
    (method("sft", lr=1.0, epochs=2), TypeError, "SFTConfig has no argument epochs, lr"),
    (method("sft", start="sft"), ValueError, "sft starts from the base, and start is 'sft'", "leave it out"),
    (method("reward_model", start="@good"), ValueError, "reward_model starts from the base", "leave it out"),
    *((method(name, data=EMPTY), ValueError, f"data has no rows for {name}", "leave it out for the workbook's")
      for name in methods.METHODS),
    (method("sft", data=[]), ValueError, "data has no rows for sft"),
    (method("sft", data=PAIRS), ValueError, "the columns prompt, chosen, rejected, and sft reads prompt completion"),
    (method("dpo", data=DEMOS), ValueError, "the columns prompt, completion, and dpo reads chosen rejected"),
    (method("orpo", data=PROMPTS), ValueError,
     "the columns prompt, answer, question, and orpo reads chosen rejected"),
    (method("kto", data=DEMOS), ValueError,
     "the columns prompt, completion, and kto reads completion label, or chosen"),
    (method("reward_model", data=PROMPTS), ValueError, "and reward_model reads chosen rejected"),
    (method("grpo", data=Dataset.from_list([{"question": "1"}])), ValueError,
     "with the columns question, and grpo reads prompt"),
    (method("ppo", data=Dataset.from_list([{"question": "1"}])), ValueError,
     "with the columns question, and ppo reads prompt"),
    (method("rloo", data=Dataset.from_list([{"text": "1"}])), ValueError,
     "with the columns text, and rloo reads prompt"),
    (method("sft", data=[{"prompt": USER}]), ValueError, "data is a list with the columns none", "rlnb.data.shapes"),
    (method("sft", data="rows"), ValueError, "data is a str with the columns none", "rlnb.data.shapes"),
    (method("sft", data=TOO_LONG, max_length=None), ValueError, "before training", "positions", "max_length"),
    (method("grpo", reward=[], **SAMPLED), ValueError, "reward is []", "leave it out for the usual"),
    (method("rloo", reward=[], **SAMPLED), ValueError, "reward is []", "leave it out for the usual"),
    (method("ppo", reward=[], **SAMPLED), ValueError, "reward is []", "leave it out for the usual"),
    (method("ppo", reward=5, **SAMPLED), TypeError, "reward_funcs[0] is a int", "a function or the folder"),
    (method("ppo", reward="@nowhere", **SAMPLED), FileNotFoundError, "no adapter", "nowhere is no folder"),
    (method("ppo", reward="@good", **SAMPLED), ValueError, "good/adapter_config.json",
     "no reward model's, which is SEQ_CLS"),
    (method("ppo", reward="@bad/reward-nan", **SAMPLED), ValueError, ".reward.weight holds NaN"),
    (method("grpo", reward_weights={}, **SAMPLED), ValueError, "Number of reward weights (0) must match",
     "reward functions (2)"),
    (method("grpo", reward_weights=[], **SAMPLED), ValueError, "Number of reward weights (0) must match",
     "reward functions (2)"),
    (method("grpo", reward_weights=[1.0], **SAMPLED), ValueError, "reward weights (1)", "reward functions (2)"),
    (method("ppo", reward=says(1.0), reward_weights=[1.0, 2.0], **SAMPLED), ValueError,
     "reward_weights is [1.0, 2.0]", "['mine']"),
    (method("ppo", reward=says(1.0), reward_weights=[], **SAMPLED), ValueError, "reward_weights is []",
     "a number for each reward"),
    (method("grpo", reward_weights=[1.0, math.nan], **SAMPLED), ValueError, "reward_weights is [1.0, nan]",
     "finite numbers"),
    (method("grpo", reward=says(math.nan), **SAMPLED), rewards.RewardError, "'mine' returned nan for completion 0",
     "a finite number"),
    (method("grpo", reward=says(1.0, math.inf), **SAMPLED), rewards.RewardError,
     "'mine' returned inf for completion 1"),
    (method("rloo", reward=says("1"), **SAMPLED), rewards.RewardError, "'mine' returned '1' for completion 0"),
    (method("ppo", reward=says(math.nan), **SAMPLED), rewards.RewardError, "'mine' returned nan for completion 0"),
    (method("grpo", reward=lambda prompts, completions: [1.0], **SAMPLED), ValueError, "is passed",
     "give it **kwargs"),
    (method("grpo", reward=lambda completions, level, **_: [1.0], **SAMPLED), ValueError, "asks for level",
     "the data set has"),
    (method("sft", max_steps=0), ValueError, "max_steps is 0", "1 or more"),
    (method("sft", max_steps=-5), ValueError, "max_steps is -5", "1 or more"),
    (method("sft", learning_rate=0.0), ValueError, "learning_rate is 0.0", "at least 1e-12"),
    (method("sft", learning_rate=-1.0), ValueError, "learning_rate is -1.0", "at least"),
    (method("sft", learning_rate=math.nan), ValueError, "learning_rate is nan", "at least"),
    (method("sft", per_device_train_batch_size=0), ValueError, "per_device_train_batch_size is 0", "at least 1"),
    (method("sft", per_device_train_batch_size=-4), ValueError, "per_device_train_batch_size is -4", "at least 1"),
    (method("sft", gradient_accumulation_steps=0), ValueError, "gradient_accumulation_steps", "0"),
    (method("dpo", beta=-1.0), ValueError, "beta is -1.0", "at least 0"),
    (method("dpo", beta=math.nan), ValueError, "beta is nan", "at least 0"),
    (method("dpo", loss_type=["dqn"]), ValueError, "dqn", "loss"),
    (method("grpo", num_generations=1, **SAMPLED), ValueError, "at least 2 generations per prompt"),
    (method("grpo", num_generations=3, **SAMPLED), ValueError, "num_generations", "3"),
    (method("grpo", temperature=0.0, **SAMPLED), ValueError, "temperature is 0.0", "at least 1e-06"),
    (method("grpo", max_completion_length=0, **SAMPLED), ValueError,
     "`max_new_tokens` must be greater than 0, but is 0"),
    (method("grpo", max_completion_length=4000, **SAMPLED), ValueError, "tokens in a row",
     "lower max_completion_length"),
    (method("grpo", top_p=0.5, **SAMPLED), ValueError, "takes top_p=1.0 only", "leave rollout_func out"),
    (method("orpo", start="base", lora=LoRA(rank=128)), ValueError, "rank 128 is above max_lora_rank 64",
     "lower the rank"),
    (method("orpo", start="base", lora=LoRA(rank=16), max_lora_rank=8), ValueError,
     "rank 16 is above max_lora_rank 8"),
    (method("orpo", start="base", lora=LoRA(targets=("wq",))), ValueError, "no linear layer wq", "q_proj"),
    (method("dpo", start="@good", max_lora_rank=2), ValueError, "rank 4 is above max_lora_rank 2"),
    (method("dpo", start="@nowhere"), FileNotFoundError, "no adapter", "nowhere is no folder"),
    (method("dpo", start="@bad"), FileNotFoundError, "is not an adapter: there is no adapter_config.json"),
    (method("dpo", start=5), ValueError, "lora is 5", "an adapter's folder"),
    (method("dpo", start="@bad/reward"), ValueError, "task_type is 'SEQ_CLS'",
     "a reward model's: give it where rewards go"),
    (method("ppo", start="@bad/reward", reward=says(1.0), **SAMPLED), ValueError, "task_type is 'SEQ_CLS'"),
    (method("kto", start="@bad/nan"), ValueError, "the weight base_model", "holds NaN or infinity"),
    (method("grpo", start="@bad/alpha-zero"), ValueError, "alpha-zero/adapter_config.json: LoRA alpha is 0"),
    (method("dpo", start="@bad/narrowed"), ValueError, "narrowed/adapter_model.safetensors", "the file has no"),
    (method("dpo", start="@bad/pissa"), ValueError, "pissa/adapter_config.json", "rewrites the base's weights"),
    (method("dpo", start="@bad/cut"), ValueError, "cut/adapter_model.safetensors is not whole"),
    (lambda house: train("dpo", start=newest("failed")), FileNotFoundError, "adapter is no folder"),
    (lambda house: train("dpo", start=house / "good", resume="gone"), FileNotFoundError, "no run 'gone'",
     "the newest are"),
    (lambda house: train("dpo", start=house / "good", resume=newest("done")), ValueError,
     "has no checkpoint to go on from"),
    (lambda house: methods.resume("gone", "dpo"), FileNotFoundError, "no run 'gone'", "the newest are"),
    (lambda house: methods.resume(newest("done").id, "dpo"), ValueError, "is done, of dpo", "no dpo to go on with"),
    (lambda house: methods.resume(runs.find(status="failed")[-1].id, "grpo"), ValueError, "is failed, of dpo",
     "no grpo to go on with"),
    (lambda house: recipe("dqn"), ValueError, "no recipe for 'dqn'", "there are sft"),
    (under(RLNB_MODEL="no-such-model"), FileNotFoundError, "no model 'no-such-model'", "data/ has abacus-3m"),
    (under(RLNB_PROFILE="fast"), ValueError, "RLNB_PROFILE is 'fast'", "cpu, gpu, smoke"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_of_training(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)
    assert all(run.status in ("failed", "done") for run in runs.find()) and len(runs.find(status="done")) == 1


# --- trainers of one's own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return load_model("abacus-3m", LoRA(rank=4))


def config(**given):
    return lambda policy: PPOConfig(output_dir="ppo", **given)


def ppo(model=None, data=PROMPTS, reward=None, **given):
    def call(policy):
        args = PPOConfig(output_dir="ppo", report_to="none", use_cpu=True, **{"per_device_train_batch_size": 4} | given)
        reward_funcs = says(1.0) if reward is None else reward
        return PPOTrainer(model or policy[0], args, reward_funcs, data, policy[1])

    return call


def fitted(change=None, name="sft", **given):
    """fit() of an SFT trainer, once something was done to its model."""
    def call(policy):
        model, tokenizer = load_model("abacus-3m", LoRA(rank=4))
        args = SFTConfig(output_dir="sft", report_to="none", use_cpu=True, max_steps=1, learning_rate=1e-3, bf16=False)
        trainer = SFTTrainer(model=model, args=args, train_dataset=DEMOS, processing_class=tokenizer)
        if change:
            change(model)
        return fit(name, trainer, DEMOS, problems=(), **given)

    return call


@cases(
    (config(gamma=2), ValueError, "gamma is 2", "from 0 to 1"),
    (config(gamma=math.nan), ValueError, "gamma is nan", "from 0 to 1"),
    (config(lam=-0.1), ValueError, "lam is -0.1", "from 0 to 1"),
    (config(kl_coef=-1), ValueError, "kl_coef is -1", "from 0 to inf"),
    (config(vf_coef="0.1"), ValueError, "vf_coef is '0.1'", "a number from 0"),
    (config(cliprange=0), ValueError, "cliprange is 0", "from 1e-06"),
    (config(temperature=0), ValueError, "temperature is 0", "from 1e-06"),
    (config(max_completion_length=0), ValueError, "max_completion_length is 0", "at least 1"),
    (config(num_ppo_epochs=1.5), ValueError, "num_ppo_epochs is 1.5", "a whole number"),
    (config(num_mini_batches=3), ValueError, "num_mini_batches is 3, which does not divide the 8 rollouts",
     "change one"),
    (config(value_learning_rate=None), ValueError, "value_learning_rate is None", "a number from 0"),
    (ppo(data=PROMPTS.select(range(2))), ValueError, "train_dataset has", "2 rows", "a step takes 4 rows"),
    (ppo(data=DEMOS.remove_columns("prompt")), ValueError, "train_dataset has the columns ['completion']",
     "a column 'prompt'"),
    (ppo(reward=[]), ValueError, "reward_funcs has the names []", "at least one"),
    (ppo(reward=[says(1.0), says(2.0)]), ValueError, "reward_funcs has the names ['mine', 'mine']",
     "a name of its own"),
    (ppo(reward="no/folder"), FileNotFoundError, "no adapter 'no/folder'"),
    (ppo(reward=[5]), TypeError, "reward_funcs[0] is a int", "a function or the folder of a reward adapter"),
    (ppo(reward_weights=[1.0, 2.0]), ValueError, "reward_weights is [1.0, 2.0]",
     "a number for each reward, ['mine']"),
    (fitted(name="my sft"), ValueError, "method is 'my sft'", "letters, digits"),
    (fitted(lambda model: model.requires_grad_(False)), ValueError, "the adapter is frozen", "Load a saved one"),
    (fitted(lambda model: model.merge_adapter()), ValueError, "merged into the weights", "unmerge_adapter()"),
    (fitted(lambda model: next(model.parameters()).data.fill_(math.nan)), ValueError, "embed_tokens",
     "NaN or infinity"),
    (fitted(resume="gone"), FileNotFoundError, "no run 'gone'", "the newest are"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_of_a_trainer(call, kind, words, house, policy):
    check(lambda: call(policy), kind, words, folder=house)
