"""Models and adapters: loaded, sampled, merged, exported. What runs on a GPU alone is untested (tests/gpu)."""

from rlnb.model.backends import backend, quiet

backend()  # Unsloth, above everything that imports trl, transformers or peft

from rlnb.model.folders import resolve, save_adapter  # noqa: E402
from rlnb.model.load import load_model, trainable  # noqa: E402
from rlnb.model.lora import LoRA  # noqa: E402

__all__ = ["LoRA", "backend", "load_model", "quiet", "resolve", "save_adapter", "trainable"]
