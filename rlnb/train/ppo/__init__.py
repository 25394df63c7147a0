"""PPO for language models with LoRA, the one trainer that this workbook writes itself.

    from rlnb.train.ppo import PPOConfig, PPOTrainer

The order to read it in: maths.py (the formulas), model.py (policy, critic, reference and reward on one
base), rollouts.py, trainer.py (the five parts of a step); then config.py, reward.py, checks.py and base.py
(what is around a step).
"""

from rlnb.train.ppo.config import PPOConfig
from rlnb.train.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
