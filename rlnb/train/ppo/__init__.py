"""PPO for language models with LoRA, the one trainer that this workbook writes itself.

The order to read it in: formulas.py, actor_critic.py (policy, critic and reference on one base),
rollouts.py, trainer.py (the five parts of a step, and what is around them); then config.py and reward.py.
"""

from rlnb.train.ppo.config import PPOConfig
from rlnb.train.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
