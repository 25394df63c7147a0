"""Bad input to rlnb.model's loading and adapters: what the message must say."""

import math

import broken
import pytest
from clear import cases, check, inside

from rlnb.model import LoRA, adapters, load_model, lora, memory, resolve, reward_model, save_adapter
from rlnb.model.folders import read_saved

import torch  # after rlnb.model, which brings in Unsloth


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    broken.house(folder)
    return folder


@pytest.fixture(scope="module")
def model(house):
    return load_model(house / "base", house / "good")[0]


def load(name="base", adapter=None, **more):
    return lambda house: load_model(house / name, house / adapter if adapter else None, **more)


def new(**fields):
    return lambda house: load_model(house / "base", LoRA(**fields), max_lora_rank=fields.pop("most", 64))


def made(**fields):
    return lambda house: LoRA(**fields)


@cases(
    (lambda house: resolve("no-such-model"), FileNotFoundError, "no model 'no-such-model'", "data/ has abacus-3m"),
    (lambda house: resolve(""), FileNotFoundError, "no config.json", "is not a model"),
    (lambda house: resolve(house), FileNotFoundError, "is not a model: there is no config.json among"),
    (lambda house: resolve(house / "base" / "config.json"), FileNotFoundError, "base/config.json is no folder"),
    (lambda house: resolve(house / "good"), FileNotFoundError, "no config.json among adapter_config.json"),
    (lambda house: resolve(house / "models/pickle"), FileNotFoundError, "no *.safetensors among",
     "pytorch_model.bin"),
    (lambda house: resolve(None), TypeError, "None", "str"),
    (lambda house: resolve(5), TypeError, "int", "str"),
    (load("models/text"), ValueError, "models/text", "config.json"),
    (load("models/listed"), ValueError, "models/listed", "config.json"),
    (load("models/untyped"), ValueError, "models/untyped", "model_type"),
    (load("models/unknown"), ValueError, "nosuch"),
    (load("models/deeper"), ValueError, "models/deeper", "layers.2", "random"),
    (load("models/partial"), ValueError, "models/partial", "layers.1", "random"),
    (load("models/cut"), ValueError, "models/cut", "model.safetensors"),
    (load(dtype="int8"), ValueError, "dtype is 'int8'", "float32, bfloat16"),
    (load(dtype=torch.float32), ValueError, "dtype is torch.float32", "float32, bfloat16"),
    (load(dtype="float16"), ValueError, "dtype is 'float16'", "on a GPU, float16"),
    (load(max_seq_length=0), ValueError, "max_seq_length is 0", "at least 1"),
    (load(max_seq_length=12.5), ValueError, "max_seq_length is 12.5", "a whole number"),
    (load(max_seq_length="64"), ValueError, "max_seq_length is '64'", "a whole number"),
    (load(fast_inference=True), ValueError, "fast_inference=True serves an adapter", "lora=LoRA(...)"),
    (lambda house: load_model(house / "base", {"r": 4}), ValueError, "lora is {'r': 4}",
     "LoRA(...), an adapter's folder"),
    (lambda house: load_model(house / "base", 16), ValueError, "lora is 16",
     "LoRA(...), an adapter's folder or None"),
    (lambda house: load_model(house / "base", ""), FileNotFoundError, "is not an adapter", "adapter_config.json"),
    (lambda house: load_model(house / "base", LoRA(16), max_lora_rank=8), ValueError,
     "rank 16 is above max_lora_rank 8", "lower the rank, or"),
    (lambda house: load_model(house / "base", LoRA(16), max_lora_rank=0), ValueError, "max_lora_rank is 0",
     "at least 1"),
    (lambda house: load_model(house / "base", LoRA(16), max_lora_rank="64"), ValueError, "max_lora_rank is '64'"),
    (lambda house: load_model(house / "base", LoRA(16), max_lora_rank=600, fast_inference=True), ValueError,
     "max_lora_rank 600 is above 512"),
    (lambda house: load_model(house / "base", LoRA(65), max_lora_rank=512), ValueError,
     "rank 65 is above 64, the smallest width", "leave the narrow layers out"),
    (lambda house: load_model(house / "base", LoRA(targets=("wq",))), ValueError, "no linear layer wq",
     "its layers are q_proj"),
    (lambda house: load_model(house / "base", LoRA(targets=("lm_head",))), ValueError,
     "LoRA on lm_head is refused", "Leave it out"),
    (lambda house: load_model(house / "base", LoRA(targets=("embed_tokens",))), ValueError,
     "no linear layer embed_tokens"),
    (made(rank=0), ValueError, "LoRA rank is 0", "at least 1"),
    (made(rank=-4), ValueError, "LoRA rank is -4", "at least 1"),
    (made(rank=8.0), ValueError, "LoRA rank is 8.0", "a whole number"),
    (made(rank="16"), ValueError, "LoRA rank is '16'", "a whole number"),
    (made(rank=True), ValueError, "LoRA rank is True", "a whole number"),
    (made(rank=None), ValueError, "LoRA rank is None", "a whole number"),
    (made(alpha=0), ValueError, "LoRA alpha is 0", "alpha above 0"),
    (made(alpha=-32), ValueError, "LoRA alpha is -32", "alpha above 0"),
    (made(alpha=math.nan), ValueError, "LoRA alpha is nan", "alpha above 0"),
    (made(alpha=math.inf), ValueError, "LoRA alpha is inf", "alpha above 0"),
    (made(alpha="32"), ValueError, "LoRA alpha is '32'", "alpha above 0"),
    (made(alpha=None), ValueError, "LoRA alpha is None", "alpha above 0"),
    (made(dropout=1.0), ValueError, "LoRA dropout is 1.0", "dropout in [0, 1)"),
    (made(dropout=-0.1), ValueError, "LoRA dropout is -0.1", "dropout in [0, 1)"),
    (made(dropout=math.nan), ValueError, "LoRA dropout is nan", "dropout in [0, 1)"),
    (made(dropout=None), ValueError, "LoRA dropout is None", "dropout in [0, 1)"),
    (made(targets="q_proj"), ValueError, "LoRA targets is 'q_proj'", '"all-linear" or names'),
    (made(targets=()), ValueError, "LoRA targets is ()", '"all-linear" or names'),
    (made(targets=""), ValueError, "LoRA targets is ''", '"all-linear" or names'),
    (made(targets=(1, 2)), ValueError, "LoRA targets is (1, 2)", "names"),
    (made(targets=None), ValueError, "LoRA targets is None", "names"),
    (made(init="pissa"), ValueError, "LoRA init is 'pissa', which rewrites the base's weights",
     '"default" or "gaussian"'),
    (made(init="kaiming"), ValueError, "LoRA init is 'kaiming'", "one of default, gaussian"),
    (made(init=None), ValueError, "LoRA init is None", "one of default, gaussian"),
    (lambda house: lora.check_rank(8, 4), ValueError, "rank 8 is above max_lora_rank 4", "max_lora_rank=8"),
    (lambda house: lora.vllm_rank(1000), ValueError, "max_lora_rank 1000 is above 512"),
    (lambda house: lora.from_rlinf({}), ValueError, "is_lora is None", "true or false"),
    (lambda house: lora.from_rlinf({"is_lora": "yes"}), ValueError, "is_lora is 'yes'"),
    (lambda house: lora.from_rlinf({"is_lora": True}), ValueError, "lora_rank is None", "at least 1"),
)  # fmt: skip
def test_of_a_model(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)


SAVED = (
    ("nowhere", FileNotFoundError, "no adapter", "nowhere is no folder"),
    ("configless", FileNotFoundError, "configless is not an adapter", "no adapter_config.json among adapter_model"),
    ("alone", FileNotFoundError, "alone is not an adapter", "no adapter_model.safetensors among"),
    ("text", ValueError, "text/adapter_config.json", "line 1"),
    ("listed", ValueError, "listed/adapter_config.json: [] is not an object"),
    ("bare", ValueError, "bare/adapter_config.json: LoRA rank is None"),
    ("ia3", ValueError, "ia3/adapter_config.json: peft_type is 'IA3', it must be 'LORA'"),
    ("untyped", ValueError, "untyped/adapter_config.json: peft_type is None, it must be 'LORA'"),
    ("pissa", ValueError, "pissa/adapter_config.json: init_lora_weights is 'pissa'", "the reference"),
    ("pissa-steps", ValueError, "init_lora_weights is 'pissa_niter_16', which rewrites the base's weights"),
    ("olora", ValueError, "olora/adapter_config.json: init_lora_weights is 'olora'"),
    ("alpha-zero", ValueError, "alpha-zero/adapter_config.json", "LoRA alpha is 0", "alpha above 0"),
    ("alpha-nan", ValueError, "alpha-nan/adapter_config.json", "LoRA alpha is nan", "alpha above 0"),
    ("alpha-text", ValueError, "alpha-text/adapter_config.json", "LoRA alpha is '16'", "alpha above 0"),
    ("alpha-none", ValueError, "alpha-none/adapter_config.json", "LoRA alpha is None", "alpha above 0"),
    ("rank-zero", ValueError, "rank-zero/adapter_config.json", "LoRA rank is 0", "at least 1"),
    ("rank-text", ValueError, "rank-text/adapter_config.json", "LoRA rank is '4'", "at least 1"),
    ("targets-none", ValueError, "targets-none/adapter_config.json", "LoRA targets is None"),
    ("classifier", ValueError, "classifier/adapter_config.json", "task_type is 'SEQ_CLS'",
     "give it where rewards go"),
    ("reward", ValueError, "reward/adapter_config.json", "task_type is 'SEQ_CLS'", "rewards"),
    ("score-head", ValueError, "score-head/adapter_model.safetensors", "score.weight"),
    ("nan", ValueError, "nan/adapter_model.safetensors", "lora_B.weight", "NaN"),
    ("inf", ValueError, "inf/adapter_model.safetensors", "lora_B.weight", "infinity"),
    ("narrowed", ValueError, "narrowed/adapter_model.safetensors", "the file has no", "v_proj"),
    ("half", ValueError, "half/adapter_model.safetensors", "the file has no", "lora_B"),
    ("empty", ValueError, "empty/adapter_model.safetensors", "the file has no", "lora_A"),
    ("foreign", ValueError, "foreign/adapter_model.safetensors", "no base_model.model"),
    ("more", ValueError, "more/adapter_model.safetensors", "layers.9"),
    ("flat", ValueError, "flat/adapter_model.safetensors", "size mismatch"),
    ("halved", ValueError, "halved/adapter_model.safetensors", "size mismatch"),
    ("wider", ValueError, "wider/adapter_model.safetensors is for another base", "size mismatch"),
    ("cut", ValueError, "cut/adapter_model.safetensors"),
    ("bytes", ValueError, "bytes/adapter_model.safetensors"),
)


@pytest.mark.parametrize(("name", "kind", "words"), [pytest.param(n, k, w, id=n) for n, k, *w in (
    *SAVED,
    ("rank-wide", ValueError, "rank 128 is above max_lora_rank 64", "lower the rank"),
    ("targets-gone", ValueError, "no linear layer ", "wq", "wv", "its layers are q_proj"),
    ("targets-head", ValueError, "LoRA on lm_head is refused"),
)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*was trained on")
def test_of_a_saved_adapter_that_goes_on(name, kind, words, house):
    check(lambda: load_model(house / "base", house / "bad" / name), kind, words, folder=house)


@pytest.mark.parametrize(("name", "kind", "words"), [pytest.param(n, k, w, id=n) for n, k, *w in (
    *SAVED,
    ("targets-gone", ValueError, "targets-gone/adapter_model.safetensors", "wq", "not found in the base"),
)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*was trained on")
def test_of_a_saved_adapter_beside_others(name, kind, words, house, model):
    before = list(model.peft_config), [x.sum().item() for x in model.get_base_model().parameters()]
    check(lambda: adapters.add(model, "new", house / "bad" / name), kind, words, folder=house)
    assert before == (list(model.peft_config), [x.sum().item() for x in model.get_base_model().parameters()])


def test_an_adapter_that_changes_nothing_is_told(house, model):
    with pytest.warns(UserWarning, match=r"zero/adapter_model.safetensors: every lora_B is 0"):
        load_model(house / "base", house / "bad" / "zero")


def test_an_adapter_of_another_base_is_told(house):
    with pytest.warns(UserWarning, match=r"bad/wider was trained on other, not on .*base"):
        read_saved(house / "bad" / "wider", house / "base")


@cases(
    (lambda model, house: adapters.add(model, "default", house / "good"), ValueError, "adapter name 'default'",
     "is taken: there are default"),
    (lambda model, house: adapters.add(model, "a.b", house / "good"), ValueError, "adapter name 'a.b'", "has a dot"),
    (lambda model, house: adapters.add(model, "", house / "good"), ValueError, "adapter name ''", "empty"),
    (lambda model, house: inside(adapters.using(model, "gone"), print), ValueError, "no adapter 'gone'",
     "it has default"),
    (lambda model, house: inside(adapters.using(model, None), print), ValueError, "no adapter None"),
    (lambda model, house: inside(adapters.using(model.get_base_model(), "sft"), print), ValueError,
     "'sft': it has none"),
    (lambda model, house: adapters.combine(model, "mix", {}), ValueError, "weights is {}", "{'sft': 0.5}"),
    (lambda model, house: adapters.combine(model, "mix", {"gone": 1.0}), ValueError, "no adapter 'gone'",
     "it has default"),
    (lambda model, house: adapters.combine(model, "default", {"default": 1.0}), ValueError, "'default'", "is taken"),
    (lambda model, house: adapters.combine(model, "mix", {"default": math.nan}), ValueError,
     "the weight of 'default' is nan", "finite"),
    (lambda model, house: adapters.combine(model, "mix", {"default": "1"}), ValueError,
     "the weight of 'default' is '1'", "finite"),
    (lambda model, house: adapters.combine(model, "mix", ["default"]), ValueError, "weights is ['default']",
     "{'sft': 0.5}"),
    (lambda model, house: inside(adapters.off(model), lambda: inside(adapters.merged(model), print)), ValueError,
     "no adapter is in use"),
    (lambda model, house: inside(adapters.merged(model), lambda: inside(adapters.off(model), print)), RuntimeError,
     "leave adapters.merged first"),
    (lambda model, house: inside(adapters.merged(model), lambda: adapters.add(model, "b",
     house / "good")), RuntimeError, "leave adapters.merged first"),
    (lambda model, house: save_adapter(model, house / "new", "sft"), ValueError, "no adapter 'sft': it has default"),
    (lambda model, house: save_adapter(model, house), FileExistsError, "holds other files", "name another folder"),
    (lambda model, house: save_adapter(model.get_base_model(), house / "new"), ValueError,
     "no adapter 'default': it has none"),
    (lambda model, house: save_adapter(model, house / "base/config.json"), FileExistsError, "config.json"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_of_adapters_at_work(call, kind, words, house, model):
    before = list(model.peft_config)
    check(lambda: call(model, house), kind, words, folder=house)
    assert before == list(model.peft_config)


def predict(name="base", adapter=None, **more):
    return lambda house: memory.predict(house / name, adapter, **{"batch": 2, "length": 8} | more)


@cases(
    (predict(dtype="int8"), ValueError, "dtype is 'int8'", "one of float32"),
    (predict(adapter=LoRA(8), max_lora_rank=1000), ValueError, "max_lora_rank 1000 is above 512"),
    (predict(adapter=LoRA(targets=("wq",))), ValueError, "no linear layer wq", "q_proj"),
    (predict(batch=0), ValueError, "batch is 0", "at least 1"),
    (predict(length=-8), ValueError, "length is -8", "at least 1"),
    (predict("gone"), FileNotFoundError, "no model"),
    (predict("models/text"), ValueError, "models/text", "config.json"),
    (lambda house: memory.predict("no-such-model", batch=1, length=1), FileNotFoundError, "no model 'no-such-model'"),
    (lambda house: reward_model.load("gone", LoRA(4)), FileNotFoundError, "no model 'gone'"),
    (lambda house: reward_model.load(house / "base", house / "nowhere"), FileNotFoundError, "no adapter",
     "nowhere is no folder"),
    (lambda house: reward_model.load(house / "base", house / "good"), ValueError, "good/adapter_config.json",
     "no reward model's, which is SEQ_CLS"),
    (lambda house: reward_model.load(house / "base", house / "bad/reward-nan"), ValueError,
     "reward-nan/adapter_model.safetensors", "NaN"),
    (lambda house: reward_model.load(house / "base", LoRA(4, targets=("wq",))), ValueError,
     "No modules were targeted", "target_modules"),
    (lambda house: reward_model.load(house / "models/text", LoRA(4)), ValueError, "models/text", "config.json"),
)  # fmt: skip
def test_of_memory_and_reward_models(call, kind, words, house):
    check(lambda: call(house), kind, words, folder=house)
