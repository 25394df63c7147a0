"""Sampling: equal to transformers' generate when greedy, true to the softmax when not, and leaving
the model, its flags and the caller's random state as they were.
"""

import copy
import json

import pytest
import torch
import transformers

from rlnb.model import LoRA, decode_cpu as decoding, load_model, sampling
from rlnb.model.lora import lora_layers
from rlnb.task import problems
from tests import tiny

CHAT = [[{"role": "user", "content": text}] for text in (*tiny.CORPUS, "12 + 5?", "3")]
PLAIN = ["Anna has 12", "Each of 7 boxes holds 34 pens. Tom", "5", "12 apples and 5 more apples"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def spread(model):
    """Weights large enough for the model to have an opinion, the adapter's too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.12, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tiny.make(tmp_path_factory.mktemp("model"))
    model, tokens = load_model(folder, lora=LoRA(rank=4))
    return spread(model), tokens


@pytest.fixture(scope="module")
def practice():
    model, tokens = load_model("abacus-3m", lora=LoRA(rank=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval(), tokens


def build(kind, vocabulary):
    """Small random models of other makes: a sliding window, learned positions without groups."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **sizes)
    else:
        config = transformers.MistralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=12, max_position_embeddings=128, **sizes,
        )  # fmt: skip
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def state(model):
    """All that a caller could find changed."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "identity": {n: id(p) for n, p in model.named_parameters()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "merged": [m.merged for m in lora_layers(model).values()],
        "config": json.dumps(model.config.to_dict(), default=str),
        "attention": model.config._attn_implementation,
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key == "weights":
            assert all(torch.equal(value[name], after[key][name]) for name in value)
        elif key == "random":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


def by_generate(model, prompt_ids, limit=24, ends=(1,)):
    ids, mask = decoding.left_pad(prompt_ids, 0)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit,
            eos_token_id=list(ends), pad_token_id=0,
        )  # fmt: skip
    return [decoding.up_to_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]


def greedy(model, tokens, prompts, **settings):
    found = sampling.sample(
        model, tokens, prompts, temperature=0, max_new_tokens=24, progress=False, **settings
    )
    return [ids for (ids,) in found.ids]


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2, 32])
def test_greedy_is_transformers_greedy_with_lora(adapted, monkeypatch, at_once):
    model, tokens = adapted
    monkeypatch.setattr(decoding, "READ_AT_ONCE", at_once)
    assert greedy(model, tokens, CHAT) == by_generate(model, sampling.tokenize(tokens, CHAT))


def test_greedy_is_transformers_greedy_on_the_practice_model(practice):
    model, tokens = practice
    prompts = [problems.prompt(problem) for problem in problems.load("validation")[:8]]
    expected = by_generate(model, sampling.tokenize(tokens, prompts))
    assert greedy(model, tokens, prompts) == expected
    assert len({len(ids) for ids in expected}) > 1  # rows did leave the batch early


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_greedy_is_transformers_greedy_on_other_makes(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding, "READ_AT_ONCE", 2)
    model = build(kind, len(tokenizer))
    expected = by_generate(model, sampling.tokenize(tokenizer, PLAIN))
    model.train()  # GPT-2 has dropout: not here
    assert greedy(model, tokenizer, PLAIN) == expected


def test_the_batch_does_not_change_greedy_completions(adapted):
    model, tokens = adapted
    together = greedy(model, tokens, CHAT)
    assert greedy(model, tokens, CHAT, batch_size=2) == together
    assert [greedy(model, tokens, [prompt])[0] for prompt in CHAT] == together


def test_greedy_repeats_itself_n_times(adapted):
    found = sampling.sample(*adapted, CHAT[:2], 3, temperature=0, max_new_tokens=4)
    assert all(len(texts) == 3 and len(set(texts)) == 1 for texts in found.texts)


def test_an_adapter_switched_off_is_off(adapted):
    model, tokens = adapted
    with model.disable_adapter():
        base = greedy(model, tokens, CHAT)
        assert base == by_generate(model, sampling.tokenize(tokens, CHAT))
    assert base != greedy(model, tokens, CHAT)


def test_the_engine_for_gpus_agrees(adapted):
    model, tokens = adapted
    rows = sampling.tokenize(tokens, CHAT)
    settings = decoding.Settings(24, 0, 0, 2, (1,), 0)
    expected = greedy(model, tokens, CHAT)
    model = copy.deepcopy(model)
    model.generation_config.repetition_penalty = 1.5  # some models ask for one: it would not be us
    assert sampling._generate(model, rows, settings, lambda _: None) == expected


# --- sampled -------------------------------------------------------------------------------------


def assert_frequencies(drawn, expected):
    """A chi-square test at five standard deviations; cells that expect under five are pooled."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    expected = expected.double() * len(drawn)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic, cells = ((counts - expected) ** 2 / expected).sum(), len(expected)
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def next_token(model, ids, temperature):
    with torch.no_grad():
        return (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


def test_samples_follow_the_softmax(adapted):
    """The first token, and the second one after each of the two most frequent first ones."""
    model, tokens = adapted
    (prompt,) = sampling.tokenize(tokens, CHAT[:1])
    found = sampling.sample(
        model, tokens, CHAT[:1], 6000, max_new_tokens=2, temperature=1.3, batch_size=6000
    )
    first = [ids[0] for ids in found.ids[0]]
    assert_frequencies(first, next_token(model, prompt, 1.3))
    frequent = torch.bincount(torch.tensor(first)).argsort(descending=True)[:3].tolist()
    for token in [token for token in frequent if token != tokens.eos_token_id][:2]:
        second = [ids[1] for ids in found.ids[0] if ids[0] == token]
        assert_frequencies(second, next_token(model, [*prompt, token], 1.3))


@pytest.mark.parametrize("chance", [0.0, 0.5, 1 - 2**-24])
def test_a_token_without_probability_is_never_drawn(chance):
    logits = torch.full((1, 4), -float("inf"))
    logits[0, 1:3] = 0.0
    settings = decoding.Settings(1, 1.0, 0, 1, (), 0)
    assert decoding.pick(logits, torch.tensor([chance]), settings).item() in (1, 2)


def test_a_seed_fixes_the_samples_whatever_the_batch(adapted):
    model, tokens = adapted

    def drawn(**settings):
        return sampling.sample(model, tokens, CHAT, 4, max_new_tokens=12, **settings).ids

    assert drawn(seed=3) == drawn(seed=3) == drawn(seed=3, batch_size=3)
    assert drawn(seed=3) != drawn(seed=4)
    assert len({tuple(ids) for ids in drawn(seed=3)[0]}) > 1


def test_the_engine_for_gpus_samples_by_the_seed(adapted):
    model, tokens = adapted
    rows = sampling.tokenize(tokens, CHAT)
    before = torch.get_rng_state()

    def drawn(seed):
        settings = decoding.Settings(8, 1.0, seed, 256, (1,), 0)
        return sampling._generate(model, rows, settings, lambda _: None)

    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(before, torch.get_rng_state())


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_completions_end_where_they_end(adapted, pad):
    model, tokens = adapted
    tokens = copy.deepcopy(tokens)
    tokens.pad_token = pad
    model = copy.deepcopy(model)
    ends = [1, *range(40, 80)]  # a model may have several end tokens: make them frequent
    model.generation_config.eos_token_id = ends
    found = sampling.sample(model, tokens, CHAT, 8, max_new_tokens=12, seed=2)
    flat = [ids for group in found.ids for ids in group]
    finished = [ids[-1] in ends for ids in flat]
    assert {True, False} == set(finished)
    for ids, done in zip(flat, finished, strict=True):
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) <= 12 and (done or len(ids) == 12)
    texts = [text for group in found.texts for text in group]
    assert texts == tokens.batch_decode(flat, skip_special_tokens=True)
    assert [len(group) for group in found.ids] == [8] * len(CHAT)


def test_no_prompts_no_completions(adapted):
    assert sampling.sample(*adapted, []) == sampling.Completions([], [])


def test_a_bar_on_request(adapted, capsys):
    sampling.sample(*adapted, CHAT[:2], max_new_tokens=2, progress="drafting")
    assert "drafting" in capsys.readouterr().err
    sampling.sample(*adapted, CHAT[:2], max_new_tokens=2, progress=False)
    assert capsys.readouterr().err == ""


# --- nothing changes -----------------------------------------------------------------------------


def test_the_model_and_the_random_state_stay_as_they_are(adapted):
    model, tokens = adapted
    model.for_training() if hasattr(model, "for_training") else model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.model.model.layers[0].eval()  # a mixture of modes
    try:
        before = state(model)
        in_training = sampling.sample(model, tokens, CHAT, 2, max_new_tokens=8)
        assert_same(before, state(model))
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert sampling.sample(model, tokens, CHAT, 2, max_new_tokens=8) == in_training


@pytest.mark.parametrize("kind", ["plain", "unsloth"])
def test_the_switch_for_gpus_goes_back(adapted, tokenizer, kind):
    """transformers' modes, and Unsloth's own switches where it has put them on the model."""
    model = copy.deepcopy(adapted[0]) if kind == "unsloth" else build("gpt2", len(tokenizer))
    if kind == "plain":
        model.train().transformer.h[0].eval()
    elif hasattr(model, "for_training"):
        model.for_training(use_gradient_checkpointing=True)
    else:
        pytest.skip("Unsloth is not installed")
    before = state(model)
    with pytest.raises(KeyboardInterrupt), sampling.switched(model):
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache
        raise KeyboardInterrupt
    assert_same(before, state(model))


def test_an_interrupt_leaves_the_model_as_it_was(adapted):
    model, tokens = adapted
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(interrupt)
    try:
        before = state(model)
        with pytest.raises(KeyboardInterrupt):
            sampling.sample(model, tokens, CHAT, 2, max_new_tokens=8)
        assert_same(before, state(model))
    finally:
        handle.remove()


def test_lora_is_merged_in_float32_and_if_it_is_on(adapted):
    model, _ = adapted

    def merged(model):
        return [layer.merged for layer in lora_layers(decoding.view(model)).values()]

    assert all(merged(model))
    assert not any(merged(copy.deepcopy(model).to(torch.bfloat16)))
    with model.disable_adapter():
        assert not any(merged(model))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "says"),
    [
        (CHAT, {"n": 0}, ValueError, "n is 0"),
        (CHAT, {"temperature": -0.1}, ValueError, "temperature.*-0.1"),
        (CHAT, {"temperature": float("nan")}, ValueError, "temperature.*nan"),
        (CHAT, {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        (CHAT, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (["a", ""], {}, ValueError, "prompt 1 has no tokens"),
        (["a", "1" * 449], {}, ValueError, "prompt has 449 tokens.*64.*512 positions: shorten"),
        (CHAT[0], {}, TypeError, "a list of conversations, not .*role"),
        ("a prompt", {}, TypeError, "not a prompt"),
        ([*CHAT, "a"], {}, TypeError, "list of strings or a list of conversations"),
        ([None], {}, TypeError, "None"),
    ],
)
def test_errors_name_what_is_wrong(adapted, prompts, settings, error, says):
    with pytest.raises(error, match=says):
        sampling.sample(*adapted, prompts, **settings)


def test_a_model_that_has_diverged_is_an_error(adapted):
    model, tokens = adapted
    model = copy.deepcopy(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="not finite"):
            sampling.sample(model, tokens, CHAT, temperature=temperature)


# --- in TRL's trainer ----------------------------------------------------------------------------


def train(folder, out, rollout):
    """Three steps of GRPO from one seed; every second completion of a group gets the reward."""
    model, tokens = load_model(folder, lora=LoRA(rank=4))
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=12, temperature=0.9, top_p=1.0, top_k=0, learning_rate=1e-2,
        bf16=True, use_cpu=True, gradient_checkpointing=False, report_to="none", seed=5,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [i % 2 for i in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in CHAT * 3]),
        processing_class=tokens,
        rollout_func=rollout,
    )
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_rollout_runs_a_copy_and_never_the_model_that_trains(tmp_path):
    """TRL puts a forward on the model that leads back to it, in training mode: with dropout, and LoRA apart."""

    ran = []

    def watched(prompts, trainer):
        own = {id(module): module for module in trainer.model.modules()}
        hooks = [m.register_forward_hook(lambda module, *_: ran.append(id(module) in own)) for m in own.values()]
        found = sampling.rollout(prompts, trainer)
        for hook in hooks:  # a copy has them too
            hook.remove()
        assert ran and not any(ran)
        return found

    train(tiny.make(tmp_path / "model"), tmp_path / "out", watched)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_rollout_in_grpo(tmp_path):
    folder = tiny.make(tmp_path / "model")
    runs = []

    def watched(prompts, trainer):
        training = trainer.model.training
        found = sampling.rollout(prompts, trainer)
        runs[-1].append((prompts, found))
        assert trainer.model.training == training
        assert found["prompt_ids"] == trainer._tokenize_prompts(prompts)[0]
        return found

    for out in ("a", "b"):
        runs.append([])
        trainer = train(folder, tmp_path / out, watched)
    assert len(runs[0]) == 3
    assert runs[0] == runs[1]  # the seed fixes them
    for prompts, found in runs[0]:
        assert len(prompts) == len(found["completion_ids"]) == 8
        assert prompts[0] == prompts[3] != prompts[4]  # repeated, a group after the other
        assert len({tuple(ids) for ids in found["completion_ids"]}) > 1
        assert found["logprobs"] is None
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    lengths = [len(ids) for ids in runs[1][-1][1]["completion_ids"]]
    assert steps[-1]["completions/mean_length"] == sum(lengths) / 8

    # The trainer runs the model in bf16; samples come from its float32 weights.
    model, ids = trainer.model.eval(), torch.tensor([found["prompt_ids"][0]])
    with sampling.inference(model) as view:
        logits = view(input_ids=ids).logits
    assert torch.allclose(logits, model.get_base_model()(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)

    again = [sampling.rollout(prompts, trainer)["completion_ids"] for _ in range(2)]
    assert again[0] != again[1]
    trainer.chat_template = tiny.TEMPLATE.replace("<|user|>", "<|user|>Question: ")
    other = sampling.rollout(prompts, trainer)["prompt_ids"]
    assert other == trainer._tokenize_prompts(prompts)[0] != found["prompt_ids"]

    trainer.args.top_k = 50
    with pytest.raises(ValueError, match="top_k=0 only, and the trainer has 50"):
        sampling.rollout(CHAT, trainer)
    trainer.args.top_k, trainer.args.top_p = 0, 0.95
    with pytest.raises(ValueError, match=r"top_p=1\.0 only, and the trainer has 0\.95: change that or leave"):
        sampling.rollout(CHAT, trainer)
    trainer.args.top_p, trainer.args.use_vllm = 1.0, True
    with pytest.raises(ValueError, match="use_vllm=False only"):
        sampling.rollout(CHAT, trainer)
    trainer.args.use_vllm, trainer.args.generation_kwargs = False, {"num_beams": 2}
    with pytest.raises(ValueError, match="num_beams"):
        sampling.rollout(CHAT, trainer)


def test_what_a_model_was_loaded_for_is_a_limit_too(adapted, monkeypatch):
    model, tokenizer = adapted
    monkeypatch.setattr(model, "max_seq_length", 16, raising=False)
    with pytest.raises(ValueError, match="but the model has 16 positions"):
        sampling.sample(model, tokenizer, ["1 + 1 ="], max_new_tokens=16)


def test_switching_to_inference_leaves_checkpointing_as_it_was(adapted):
    """As Unsloth's for_inference does on a GPU."""
    model, _ = adapted
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [layer.gradient_checkpointing for layer in layers]

    def turn_off():
        for layer in layers:
            layer.gradient_checkpointing = False

    model.for_inference, model.for_training = turn_off, lambda **_: None
    try:
        for training in (True, False):
            model.train(training)
            for layer in layers:
                layer.gradient_checkpointing = "unsloth"
            with sampling.switched(model):
                assert not any(layer.gradient_checkpointing for layer in layers)
            assert layers and all(layer.gradient_checkpointing == "unsloth" for layer in layers)
    finally:
        del model.for_inference, model.for_training
        for layer, was in zip(layers, before, strict=True):
            layer.gradient_checkpointing = was
