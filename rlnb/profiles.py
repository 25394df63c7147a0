"""Three profiles: they change sizes and the model, never the code that a reader sees.

``cpu`` trains the practice model in minutes on two cores, ``gpu`` a real small model, ``smoke`` makes a
few steps, for continuous integration.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

PROFILES = ("cpu", "gpu", "smoke")
PRACTICE = "abacus-3m"  # the model that ships
REAL = "Qwen/Qwen2.5-0.5B-Instruct"  # of the hub: the model of the gpu profile
FETCHED = ("smollm2-135m",)  # what python -m rlnb fetch brings into the models folder


def profile() -> str:
    """$RLNB_PROFILE, else "gpu" where there is a CUDA device, else "cpu"."""
    name = os.environ.get("RLNB_PROFILE") or ("gpu" if has_cuda() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"RLNB_PROFILE is {name!r}; the profiles are {', '.join(PROFILES)}.")
    return name


def by(**values: Any) -> Any:
    """The value for the profile in force: by(cpu=64, gpu=96, smoke=2). What is not named is as on the cpu.

    Raises TypeError for a name that is no profile, or without cpu.
    """
    if "cpu" not in values or set(values) - set(PROFILES):
        raise TypeError(f"by({', '.join(values)}): give cpu=, and gpu= and smoke= where they differ")
    return values.get(profile(), values["cpu"])


def model_name() -> str:
    """$RLNB_MODEL, else the practice model, or in the gpu profile a real small one from the hub."""
    return os.environ.get("RLNB_MODEL") or (REAL if profile() == "gpu" else PRACTICE)


def models() -> Path:
    """$RLNB_MODELS, or `models` in the repository, or in the working folder if rlnb is installed."""
    repository = Path(__file__).resolve().parents[1]
    default = (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "models"
    return Path(os.environ.get("RLNB_MODELS") or default).expanduser().absolute()


@cache
def has_cuda() -> bool:
    """Whether torch can use an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available()
