"""Bad input to what uses a model (sampling, export, serving) and to rlnb.measure: what the message must say."""

import math

import pytest
import tiny
from clear import cases, check

from rlnb.measure import agreement, evaluate, judge
from rlnb.measure.intervals import Proportion
from rlnb.measure.kl import kl
from rlnb.model import LoRA, export, load_model, reward_model, sampling, serving
from rlnb.task import problems

import torch  # after rlnb.model, which brings in Unsloth

CHAT = [[{"role": "user", "content": "How many?"}]]
ROW = {"id": "a", "question": "1 and 2", "answer": 3, "responses": ["3", "4"], "comparisons": [[0, 1, 1]]}


class House:
    """A folder, a model with an adapter, its base alone, a broken one, a reward model, and the tokenizer."""

    def __init__(self, folder):
        self.folder, base = folder, tiny.make(folder / "base")
        self.model, self.tokenizer = load_model(base, LoRA(rank=4, alpha=8))
        self.plain = load_model(base)[0]
        self.broken = load_model(base, LoRA(rank=4))[0]
        with torch.no_grad():
            next(self.broken.parameters()).fill_(float("nan"))
        self.rewards = reward_model.load(base, LoRA(rank=4))[0]

    def sample(self, prompts=CHAT, *given, model=None, **more):
        return sampling.sample(model or self.model, self.tokenizer, prompts, *given, **{"max_new_tokens": 4} | more)

    def accuracy(self, tasks, **more):
        return evaluate.accuracy(self.model, self.tokenizer, tasks, **more)

    def export(self, model=None, prompts=CHAT, folder="new", **more):
        return export.export_merged(model or self.model, self.tokenizer, self.folder / folder, prompts, **more)

    def kl(self, prompts=CHAT * 2, model=None, **more):
        return kl(model or self.model, self.tokenizer, prompts, **{"max_new_tokens": 4} | more)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


def report(*ids):
    return evaluate.Report([{"id": i, "strict": True, "tokens": 3} for i in ids])


@cases(
    (lambda h: h.sample(n=0), ValueError, "n is 0", "at least 1"),
    (lambda h: h.sample(n=1.5), ValueError, "n is 1.5", "a whole number"),
    (lambda h: h.sample(max_new_tokens=0), ValueError, "max_new_tokens is 0", "at least 1"),
    (lambda h: h.sample(max_new_tokens="64"), ValueError, "max_new_tokens is '64'", "a whole number"),
    (lambda h: h.sample(max_new_tokens=5000), ValueError, "max_new_tokens is 5000", "the model has 512 positions",
     "lower"),
    (lambda h: h.sample(batch_size=-1), ValueError, "batch_size is -1", "at least 1"),
    (lambda h: h.sample(temperature=-1), ValueError, "temperature is -1", "0 (greedy) or a positive"),
    (lambda h: h.sample(temperature=math.nan), ValueError, "temperature is nan", "0 (greedy)"),
    (lambda h: h.sample(temperature=math.inf), ValueError, "temperature is inf", "0 (greedy)"),
    (lambda h: h.sample(temperature="1"), ValueError, "temperature is '1'", "0 (greedy)"),
    (lambda h: h.sample(temperature=None), ValueError, "temperature is None", "0 (greedy)"),
    (lambda h: h.sample("How many?"), TypeError, "a list of strings or a list of conversations", "How many?"),
    (lambda h: h.sample([5]), TypeError, "a list of strings or a list of conversations", "[5]"),
    (lambda h: h.sample([{"role": "user", "content": "a"}]), TypeError, "a list of conversations, not"),
    (lambda h: h.sample(["a", CHAT[0]]), TypeError, "a list of conversations, not"),
    (lambda h: h.sample([None]), TypeError, "a list of conversations, not [None]"),
    (lambda h: h.sample(None), TypeError, "a list of conversations, not None"),
    (lambda h: h.sample([""]), ValueError, "prompt 0 has no tokens"),
    (lambda h: h.sample(["a", ""]), ValueError, "prompt 1 has no tokens"),
    (lambda h: h.sample([[]]), TypeError, "the prompt [] is no conversation", "role and content"),
    (lambda h: h.sample([["a"]]), TypeError, "the prompt ['a'] is no conversation", "role and content"),
    (lambda h: h.sample([[{"role": "user"}]]), TypeError, "the prompt [{'role': 'user'}] is no conversation",
     "role and content"),
    (lambda h: h.sample(["a " * 600]), ValueError, "a prompt has", "the model has 512 positions", "shorten"),
    (lambda h: h.sample(model=h.broken), FloatingPointError, "logits", "finite"),
    (lambda h: reward_model.score(h.model, h.tokenizer, CHAT), TypeError,
     "PeftModelForCausalLM is no reward model", "reward_model.load"),
    (lambda h: h.export(dtype="int8"), ValueError, "dtype is 'int8'", "one of float32"),
    (lambda h: h.export(model=h.plain), ValueError, "no adapter is in use", "nothing to merge"),
    (lambda h: h.export(prompts=[]), ValueError, "prompts is []", "compare"),
    (lambda h: h.export(prompts=["a", ""]), ValueError, "prompt 1 has no tokens"),
    (lambda h: h.export(folder="base"), FileExistsError, "base holds a model that is no export",
     "name another folder"),
    (lambda h: h.export(folder="base/config.json"), FileExistsError, "config.json is a file", "name a folder"),
    (lambda h: export.check_merge(h.plain, h.tokenizer, CHAT), ValueError, "no adapter is in use"),
    (lambda h: export.check_merge(h.model, h.tokenizer, CHAT, dtype="fp32"), ValueError, "dtype is 'fp32'",
     "float32"),
    (lambda h: serving.serve("gone").__enter__(), FileNotFoundError, "no model 'gone'"),
    (lambda h: serving.serve(h.folder).__enter__(), FileNotFoundError, "is not a model: there is no config.json"),
    (lambda h: serving.serve(h.folder / "base", timeout=-1).__enter__(), TimeoutError,
     "the server was not ready within -1 s", "its log"),
)  # fmt: skip
def test_of_a_model_at_work(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house.folder)


ANNOTATED = {"one": [ROW], "two": [ROW]}


@cases(
    (lambda h: evaluate.held_out("gone"), FileNotFoundError, "no split 'gone'", "there are id"),
    (lambda h: evaluate.held_out(n=-1), ValueError, "n is -1", "at least 1"),
    (lambda h: h.accuracy([]), ValueError, "no problems to evaluate on"),
    (lambda h: h.accuracy(["How many?"]), TypeError, "'How many?' is a str, not a Problem"),
    (lambda h: h.accuracy(problems.load("id")[:1], max_new_tokens=-1), ValueError, "max_new_tokens is -1"),
    (lambda h: evaluate.passes(h.model, h.tokenizer, [], 2, (1,)), ValueError, "no problems to evaluate on"),
    (lambda h: evaluate.passes(h.model, h.tokenizer, problems.load("id")[:1], 4, (8,)), ValueError,
     "n=4, c=0, k=8", "1 <= k <= n"),
    (lambda h: evaluate.pass_at_k(4, 5, 1), ValueError, "n=4, c=5, k=1", "0 <= c <= n"),
    (lambda h: evaluate.pass_at_k(4, 1, 0), ValueError, "n=4, c=1, k=0", "1 <= k <= n"),
    (lambda h: evaluate.compare(report("a"), report("b")), ValueError, "1 and 1 problems are not the same", "a, b"),
    (lambda h: evaluate.Report([]).strict, ValueError, "0 successes in 0 trials", "n >= 1"),
    (lambda h: Proportion(5, 4), ValueError, "5 successes in 4 trials", "0 <= k <= n"),
    (lambda h: Proportion(-1, 4), ValueError, "-1 successes in 4 trials"),
    (lambda h: Proportion(0, 0), ValueError, "0 successes in 0 trials", "n >= 1"),
    (lambda h: h.kl([]), ValueError, "0 prompt", "two or more"),
    (lambda h: h.kl(CHAT), ValueError, "1 prompt", "two or more"),
    (lambda h: h.kl(model=h.plain), ValueError, "no adapter to disable", "pass reference="),
    (lambda h: h.kl(max_new_tokens=0), ValueError, "max_new_tokens is 0", "at least 1"),
    (lambda h: h.kl("prompts"), TypeError, "a list of conversations, not prompts"),
    (lambda h: judge.auc([], [1.0]), ValueError, "0 right and 1 wrong scores", "each needs one"),
    (lambda h: judge.auc([math.nan], [1.0]), ValueError, "1 right and 1 wrong scores", "none may be NaN"),
    (lambda h: judge.best_of_n([[1.0, 2.0]], [[1.0, 2.0]], [3]), ValueError, "best of n=3", "2 samples"),
    (lambda h: judge.best_of_n([[1.0, 2.0]], [[1.0, 2.0]], [0]), ValueError, "best of n=0", "2 samples"),
    (lambda h: agreement.agreement({"one": [ROW]}), ValueError, "two annotations or more, not 1"),
    (lambda h: agreement.agreement({"one": [ROW], "two": [ROW | {"id": "b"}]}), ValueError,
     "one, two have no comparison in common"),
    (lambda h: agreement.measure([]), ValueError, "columns none", "chosen and rejected are needed"),
    (lambda h: agreement.measure([{"id": 1}]), ValueError, "columns {'id'}", "comparisons, or chosen"),
    (lambda h: agreement.report({"mine": []}), ValueError, "columns none", "chosen and rejected"),
)  # fmt: skip
def test_of_a_measure(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house.folder)
