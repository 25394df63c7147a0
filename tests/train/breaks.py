"""A training that breaks off on purpose."""

import rlnb.model  # noqa: F401  Unsloth before transformers
from transformers import TrainerCallback


class BreakAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the machine is gone")
