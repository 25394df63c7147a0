"""What the doctor says of the machine, also of one whose packages are broken."""

import os
import subprocess
import sys

from rlnb.tools import check_machine
from rlnb.tools import setup as environments

DOCTOR = [sys.executable, "-m", "rlnb", "doctor"]


def here(**more):
    return {**os.environ, "PYTHONPATH": str(environments.ROOT), **more}


def test_the_command_looks_at_everything_and_finds_that_it_works():
    done = subprocess.run(DOCTOR, capture_output=True, text=True, env=here(), timeout=300)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Unsloth is not installed")]
    assert [line.split()[1] for line in lines] == [look.__name__ for look in check_machine.LOOKS]
    assert done.returncode == 0 and "PROBLEM" not in done.stdout


def test_broken_packages_are_what_it_reports(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')")
    path = os.pathsep.join([str(tmp_path), str(environments.ROOT)])
    done = subprocess.run(DOCTOR, capture_output=True, text=True, env=here(PYTHONPATH=path), timeout=300)
    assert done.returncode == 1 and not done.stderr
    for look in ("gpu", "backend"):
        line = next(line for line in done.stdout.splitlines() if line.split()[1] == look)
        assert line.startswith("PROBLEM") and "libcudart.so.13" in line


def test_missing_packages_are_what_it_reports():
    code = f"import sys; sys.path.insert(0, {str(environments.ROOT)!r})\n"
    code += "from rlnb.tools import check_machine; print(check_machine.report())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert not done.stderr and "torch missing, transformers missing" in done.stdout


def test_versions_are_held_against_the_requirement_files(monkeypatch, tmp_path):
    for step in environments.STEPS["gpu"]:
        (tmp_path / step[-1]).write_text("")
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("psutil==0.0.1  # reads memory\n")
    saw, level, do = check_machine.versions()
    assert "not as tested: psutil " in saw and level == "advice" and do.endswith("rlnb setup")
    (tmp_path / "requirements.txt").write_text("no-such-package==1  # is not there\n")
    saw, level, do = check_machine.versions()
    assert "no-such-package missing" in saw and level == "problem" and "setup" in do


def test_colab_is_held_against_what_was_added_to_it(monkeypatch, tmp_path):
    for name in environments.FILES:
        (tmp_path / name).write_text("psutil==0.0.1  # not what is here\n")
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "read_stamp", lambda folder: ("colab", "unfinished"))
    assert check_machine.versions()[2].endswith("rlnb setup --here --kind colab")
    (tmp_path / "requirements-colab.txt").write_text("")
    assert check_machine.versions()[0].endswith("the tested packages (colab)")
