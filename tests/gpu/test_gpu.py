"""What only a GPU can check: Unsloth's kernels, vLLM's rollouts, the notebooks in the gpu profile.

See README.md. Every test but the notebooks loads the same random model of the practice model's shape, so
nothing is downloaded.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlnb.data import shapes
from rlnb.model import LoRA, backend, load_model, save_adapter, trainable
from rlnb.task import problems

import torch
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NOTEBOOKS = sorted(file.stem for file in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    assert backend() == "unsloth-gpu"
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    return tiny.make(tmp_path_factory.mktemp("models") / "practice", **tiny.PRACTICE)


def logits(model):
    ids = torch.arange(4, 132, device="cuda").reshape(4, 32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().cpu()


def arguments(folder, **more):
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "bf16": bf16,
        "fp16": not bf16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | more


def train_grpo(model, tokenizer, folder, beta=0.0):
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=GRPOConfig(
            **arguments(folder), num_generations=4, max_completion_length=16, beta=beta
        ),
        train_dataset=shapes.prompts(problems.generate("train", 16)),
        processing_class=tokenizer,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
    return rows


def test_unsloths_kernels_agree_with_transformers(base, tmp_path):
    model, _ = load_model(base, LoRA())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_model(base, folder)[0]), logits(model))
    # In another process, because Unsloth changes transformers' own classes in this one.
    run_code(
        "import sys; sys.modules['unsloth'] = None\n"
        "import test_gpu as t; from safetensors.torch import save_file\n"
        f"model, _ = t.load_model({str(base)!r}, {str(folder)!r})\n"
        f"save_file({{'logits': t.logits(model)}}, {str(tmp_path / 'plain')!r})\n"
    )
    ours, plain = logits(model), load_file(tmp_path / "plain")["logits"]
    assert (ours - plain).abs().max() < 0.05 * plain.abs().max()  # rounding to 16 bits, 4 layers


def test_an_adapter_attaches_after_a_full_fine_tuning(base):
    full, _ = load_model(base)
    count, total = trainable(full)
    assert count == total
    lora, _ = load_model(base, LoRA(rank=4))
    names = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_sft_trains(base, tmp_path):
    model, tokenizer = load_model(base, LoRA())
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments(tmp_path, max_steps=20), max_length=None, packing=False),
        train_dataset=shapes.prompt_completion(problems.generate("train", 8)),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_trains_with_and_without_a_reference(base, tmp_path, beta):
    rows = train_grpo(*load_model(base, LoRA()), tmp_path, beta)
    assert ("kl" in rows[0]) == (beta > 0)


@pytest.mark.parametrize("fast_inference", [False, True])
def test_a_rank_that_does_not_fit_is_refused_before_memory_is_taken(base, fast_inference):
    before = torch.cuda.memory_allocated()
    with pytest.raises(ValueError, match="rank 32 is above max_lora_rank 16"):
        load_model(base, LoRA(rank=32), max_lora_rank=16, fast_inference=fast_inference)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_fast_inference_without_vllm_names_the_way_out(base):
    with pytest.raises(ImportError, match="needs vllm"):
        load_model(base, LoRA(), fast_inference=True)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
@pytest.mark.parametrize("rank", [8, 12, 16])
def test_vllm_rolls_out_at_every_rank_that_fits(base, tmp_path, rank):
    """In a process of its own: vLLM gives memory back only when its process ends. 12 is rounded."""
    run_code(
        "import test_gpu as t; from pathlib import Path\n"
        f"model, tokenizer = t.load_model({str(base)!r}, t.LoRA(rank={rank}), fast_inference=True,"
        f" max_lora_rank={rank})\n"
        "assert model.vllm_engine is not None\n"
        f"t.train_grpo(model, tokenizer, Path({str(tmp_path)!r}))\n"
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_in_the_gpu_profile(notebook, tmp_path):
    """On the practice model; with RLNB_MODEL on another one."""
    environment = {"RLNB_MODEL": "abacus-3m", "RLNB_RUNS": str(tmp_path)} | os.environ
    command = ["rlnb", "run", notebook, "--profile", "gpu", "--out", str(tmp_path / "html")]
    run([sys.executable, "-m", *command], cwd=ROOT, env=environment)


def run_code(code):
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
