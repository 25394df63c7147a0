"""A random model of the practice model's make, for tests: built on the spot, nothing downloaded.

``make(folder)`` writes a random Llama and a tokenizer with one token a digit and the practice
model's chat format; with ``**PRACTICE`` it gets the practice model's shape, about 3M parameters.
"""

from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('this template takes user and assistant messages only') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CORPUS = (
    "Anna has 12 apples and buys 5 more. How many apples does she have now?",
    "Each of 7 boxes holds 34 pens. Tom gives away 6 pens. How many pens are left?",
    "<reasoning>12 + 5 = 17; 17 * 3 = 51</reasoning><answer>51</answer>",
)
PRACTICE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}


def tokenizer(vocabulary: int = 320):
    """A byte-level BPE, one token a digit, with distinct pad and end tokens and no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def make(folder: Path, seed: int = 0, **shape: int) -> Path:
    """Write a random Llama to the folder: 2 layers of width 64 unless the shape says otherwise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | shape
    heads = max(2, shape["hidden_size"] // 64)
    config = LlamaConfig(
        vocab_size=len(tokens),
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return Path(folder)
