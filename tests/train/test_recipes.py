"""Settings: a lesson's cell shows what the recipe says, every profile makes a config, mistakes are named."""

import ast
import dataclasses
import json

import pytest

from rlnb import profiles
from rlnb.train import methods, recipes
from rlnb.tools.setup import ROOT
from tests.benchmarks import real

# What a notebook's cell says on purpose in another way than the recipe.
SHORTER = {"03_reward_model": {"max_steps"}, "04_rlhf_ppo": {"reward_weights"}}
LESSONS = {
    "02_sft": "sft", "03_reward_model": "reward_model", "04_rlhf_ppo": "ppo", "05_dpo": "dpo", "06_kto": "kto",
    "07_orpo": "orpo", "08_grpo": "grpo",
}  # fmt: skip


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


def in_recipe(method: str) -> dict[str, str]:
    """The arguments of the dict(...) that a recipe returns, as code."""
    tree = ast.parse((ROOT / "rlnb" / "train" / "recipes.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if getattr(node, "name", None) == method)
    return keywords(function.body[-1].value)


def in_notebook(name: str, config: str) -> dict[str, str]:
    """The arguments of the first config of a class in a notebook's cells, as code."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    calls = [node for cell in code for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
    return keywords(next(call for call in calls if ast.unparse(call.func) == config))


@pytest.mark.parametrize(("notebook", "method"), [*LESSONS.items(), ("04_rlhf_ppo", "rloo")])
def test_a_lesson_shows_the_settings_that_everything_else_uses(notebook, method):
    shown, used = in_notebook(notebook, f"{methods.METHODS[method].name}Config"), in_recipe(method)
    apart = SHORTER.get(notebook, set())
    assert {k: v for k, v in shown.items() if k not in apart} == {k: v for k, v in used.items() if k not in apart}


@pytest.mark.parametrize("method", real.SETTINGS)
def test_the_real_model_s_notebook_shows_the_settings_of_its_benchmark(method, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", "cpu")
    code = in_notebook("16_real_model", f"{methods.METHODS[method].name}Config")
    shown = {name: eval(value, {"by": profiles.by}) for name, value in code.items()}
    assert shown == {name: (recipes.recipe(method) | real.SETTINGS[method])[name] for name in shown}
    assert set(real.SETTINGS[method]) <= set(shown)


@pytest.mark.parametrize("method", recipes.RECIPES)
@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_every_recipe_makes_a_config(method, profile, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", profile)
    config, _ = methods.METHODS[method.removesuffix("_from_base")].classes()
    usual = recipes.recipe(method)
    made = config(**recipes.common(config, seed=3), **usual)
    assert made.seed == 3 and made.max_steps > 0
    assert {name: getattr(made, name) for name in usual} == usual
    if hasattr(made, "num_generations"):
        rows = made.per_device_train_batch_size * made.gradient_accumulation_steps
        assert made.generation_batch_size == rows and rows % made.num_generations == 0


@pytest.mark.parametrize("method", methods.METHODS)
def test_recipes_have_no_words_of_their_own(method):
    config, _ = methods.METHODS[method].classes()
    names = {field.name for field in dataclasses.fields(config)}
    assert set(recipes.recipe(method)) <= names and set(recipes.common(config, 0)) <= names


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="no recipe for 'dqn'; there are sft, "):
        recipes.recipe("dqn")
    with pytest.raises(TypeError, match=r"by\(gpu\): give cpu="):
        profiles.by(gpu=1)
    with pytest.raises(TypeError, match=r"by\(cpu, tpu\)"):
        profiles.by(cpu=1, tpu=2)
    monkeypatch.setenv("RLNB_PROFILE", "tpu")
    with pytest.raises(ValueError, match="RLNB_PROFILE is 'tpu'; the profiles are cpu, gpu, smoke"):
        profiles.profile()


def test_what_is_not_named_is_as_on_the_cpu(monkeypatch):
    for profile, expected in (("cpu", 1), ("gpu", 1), ("smoke", 2)):
        monkeypatch.setenv("RLNB_PROFILE", profile)
        assert profiles.by(cpu=1, smoke=2) == expected
