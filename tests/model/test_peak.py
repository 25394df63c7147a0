"""What a training took: measured at its peak, in a process that holds nothing else."""

import subprocess
import sys

import pytest
import tiny
import torch

from rlnb.model import LoRA, memory
from rlnb.tools.setup import ROOT
from tests.benchmarks import memory as peak


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("peak") / "tiny")


@pytest.mark.slow
def test_a_training_that_fails_says_why(base, tmp_path):
    """The config alone can be predicted from; weights that nobody can read fail in the child."""
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_text("nobody can load this")
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        peak.try_out(tmp_path, LoRA(), batch=1, length=8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_growth_is_measured_at_its_peak():
    found = peak.measure(lambda: bytearray(64 * memory.MB))
    assert 60 * memory.MB < found.ram < 96 * memory.MB
    assert peak.measure(lambda: None).ram < 8 * memory.MB
    assert (found.gpu is None) == (not torch.cuda.is_initialized())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_a_child_of_a_large_process_does_not_inherit_its_peak():
    """As getrusage says it does: a notebook's kernel is such a parent."""
    code = "from rlnb import machine; print(machine.peak_memory_mb())"
    ballast = bytearray(512 * memory.MB)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    assert len(ballast) > 0
    assert float(done.stdout) < 256


@pytest.mark.slow
def test_a_training_is_tried_out_in_a_process_of_its_own(base):
    predicted, found = peak.try_out(base, LoRA(rank=4), batch=1, length=8)
    assert predicted == memory.predict(base, LoRA(rank=4), batch=1, length=8)
    assert (found.ram is None) == (sys.platform != "linux")
