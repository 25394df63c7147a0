"""Settings: what is passed to TRL is what the recipe says, and mistakes are named before anything runs."""

import pytest

from rlnb.train import recipes


@pytest.mark.parametrize("method", recipes.RECIPES)
@pytest.mark.parametrize("profile", recipes.PROFILES)
def test_every_recipe_makes_a_trl_config(method, profile, tmp_path):
    from rlnb.model import load as models

    models.backend()
    import trl
    from trl.experimental.orpo import ORPOConfig

    from rlnb.train.ppo import PPOConfig

    recipe = recipes.recipe(method, profile)
    kinds = {"sft": trl.SFTConfig, "reward_model": trl.RewardConfig, "dpo": trl.DPOConfig,
             "kto": trl.KTOConfig, "orpo": ORPOConfig, "ppo": PPOConfig,
             "rloo": trl.RLOOConfig}  # fmt: skip
    kind = kinds.get(method, trl.GRPOConfig)
    config = kind(**recipe.trl(tmp_path, seed=3))
    assert config.learning_rate == recipe.learning_rate
    assert config.max_steps == recipe.steps
    assert config.seed == 3
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert batch == recipe.batch
    if kind in (trl.GRPOConfig, trl.RLOOConfig):
        assert config.num_generations == recipe.group
        assert config.generation_batch_size == recipe.batch
    for setting in ("beta", "desirable_weight"):
        assert getattr(config, setting, None) == getattr(
            recipe, setting, getattr(config, setting, None)
        )


def test_settings_can_be_changed_and_mistakes_are_named():
    assert recipes.recipe("sft", "cpu", learning_rate=1.0).learning_rate == 1.0
    with pytest.raises(TypeError, match=r"sft has no setting \['lr'\]; it has rank, alpha"):
        recipes.recipe("sft", "cpu", lr=1.0)
    with pytest.raises(ValueError, match="no recipe for 'dqn'; there are sft, "):
        recipes.recipe("dqn")


def test_a_batch_that_does_not_fit_the_groups_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch=60 completions .* groups of 8: .* e\.g\. 56"):
        recipes.recipe("grpo", "cpu", batch=60).trl(tmp_path, 0)


def test_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "tpu")
    with pytest.raises(ValueError, match="RLNB_PROFILE is 'tpu'; the profiles are cpu, gpu, smoke"):
        recipes.profile()


def test_only_a_real_model_gets_the_instruction(monkeypatch):
    monkeypatch.delenv("RLNB_MODEL", raising=False)
    assert recipes.system("cpu") is None
    assert "<reasoning>" in recipes.system("gpu")
