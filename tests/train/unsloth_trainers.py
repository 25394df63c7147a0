"""Has Unsloth write the trainer classes that a GPU would get, on a CPU, and prints what they do with our settings.

    UNSLOTH_ALLOW_CPU=1 PYTHONPATH=.:tests python tests/train/unsloth_trainers.py     # prints a line of JSON

UNSLOTH_ALLOW_CPU is Unsloth's own switch for such tests: its modules for GPUs load without one. It has to have a
process of its own, because it changes TRL's classes for good. test_unsloth_generated.py starts it.
"""

import inspect
import json
import os
import re
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlnb.data import shapes
from rlnb.model import sampling
from rlnb.model.backends import backend
from rlnb.profiles import PROFILES
from rlnb.task import problems
from rlnb.train import methods
from rlnb.train.recipes import common, recipe

import tiny
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.orpo import orpo_trainer
from unsloth.models import rl

METHODS = [name for name, method in methods.METHODS.items() if method.module.startswith("trl")]
LENGTH = 512  # what load_model gives Unsloth as the model's max_seq_length


def text(value: Any) -> str:
    return repr(getattr(value, "value", value))  # an enum is what it stands for


def values(config: Any) -> dict[str, str]:
    """A config's fields as text, but for what two of them never share."""
    return {f.name: text(getattr(config, f.name)) for f in fields(config) if f.name not in ("output_dir", "run_name")}


def settings(method: str, config: type, **changes: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By profile: what a lesson passes to the config of a method. And the names that the config does not have."""
    found, takes = {}, {f.name for f in fields(config)}
    for profile in PROFILES:
        os.environ["RLNB_PROFILE"] = profile
        found[profile] = common(config, 0) | recipe(method) | changes
    known = {profile: {k: v for k, v in given.items() if k in takes} for profile, given in found.items()}
    return known, sorted(set(found["cpu"]) - takes)


def trainer(method: str, folder: Path) -> Any:
    """A generated trainer on a tiny model with a LoRA adapter, as a lesson makes it."""
    kind = AutoModelForSequenceClassification if method == "reward_model" else AutoModelForCausalLM
    more = {"num_labels": 1} if method == "reward_model" else {}
    model = kind.from_pretrained(folder, **more)
    task = "SEQ_CLS" if method == "reward_model" else "CAUSAL_LM"
    model = get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules="all-linear"))
    if method != "reward_model":
        model.max_seq_length = LENGTH
    config, made = methods.METHODS[method].classes()
    changes = {"beta": 0.1} if method == "grpo" else {}  # so that it needs a reference
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    more = {"reward_funcs": rewards * 2 if method == "grpo" else rewards} if method in ("rloo", "grpo") else {}
    more |= {"rollout_func": sampling.rollout} if method == "grpo" else {}
    data = shapes.prompts(problems.load("train")[:32]) if more else methods.default_data(method, 0)
    args = config(**settings(method, config, **changes)[0]["smoke"])
    return made(model=model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder),
                **more)  # fmt: skip


def logged(made: type) -> list[str]:
    """What a trainer's methods log, in Unsloth's own text of them, but for a loss that nothing calls."""
    owners = [owner for owner in made.__mro__ if owner.__module__.startswith("Unsloth")]
    methods = [f for owner in owners for f in vars(owner).values() if inspect.isfunction(f)]
    sources = {f.__qualname__: inspect.getsource(f) for f in methods if f.__module__.startswith("Unsloth")}
    if not any("self._compute_loss(" in source for source in sources.values()):
        sources = {name: source for name, source in sources.items() if not name.endswith("._compute_loss")}
    found = re.findall(r'metrics(?:\[\w+\])?\[f?"(?:\{prefix\})?([\w/]+)"\]', "".join(sources.values()))
    return sorted(set(found))


def main() -> None:
    assert backend() == "unsloth-gpu"
    before = {}
    for method in METHODS:
        config, _ = methods.METHODS[method].classes()
        ours, _ = settings(method, config)
        before[method] = {p: values(config(**given)) for p, given in ours.items()}
    for name in ("sft", "reward", "dpo", "kto", "grpo", "rloo"):
        rl._patch_trl_rl_trainers_impl(f"{name}_trainer")
    rl._patch_trl_experimental_trainer("orpo", orpo_trainer)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny.make(Path(folder))
        for method in METHODS:
            config, made = methods.METHODS[method].classes()
            ours, unknown = settings(method, config)
            live = trainer(method, Path(folder))
            found[method] = {
                "trainer": made.__name__,
                "unknown": unknown,
                "passed": {p: {k: text(v) for k, v in given.items()} for p, given in ours.items()},
                "trl": before[method],
                "unsloth": {p: values(config(**given)) for p, given in ours.items()},
                "after": values(live.args),
                "adapters": list(live.model.peft_config),
                "rollout": getattr(live, "rollout_func", None) is sampling.rollout,
                "rewards": "self._calculate_rewards(" in inspect.getsource(sys.modules[made.__module__]),
                "logged": logged(made),
            }
    print(json.dumps({"trl": trl.__version__, "methods": found}))


if __name__ == "__main__":
    main()
