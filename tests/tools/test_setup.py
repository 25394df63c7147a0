"""Set-up: the requirement files agree with each other and with the imports, and setting up works.

It is tried for real, with a package of three lines that pip takes from a folder.
"""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rlnb.tools import setup as environments

ROOT = environments.ROOT
REQUIREMENT = re.compile(
    r'(?P<name>[\w.-]+)==(?P<version>[\w.]+)( ; sys_platform != "darwin")? +# \S.+'
)


ALL = [step[-1] for step in environments.STEPS["gpu"]]


def requirements(name: str) -> dict[str, str]:
    """Package -> version, from one requirement file."""
    matches = map(REQUIREMENT.match, (ROOT / name).read_text().splitlines())
    return {match["name"]: match["version"] for match in matches if match}


@pytest.mark.parametrize("name", [*ALL, "requirements-colab.txt"])
def test_each_requirement_has_a_version_and_a_reason(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert lines and [line for line in lines if not REQUIREMENT.fullmatch(line)] == []


def test_versions_live_in_the_requirement_files_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    conda = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    python = project["project"]["requires-python"]
    asked = re.findall(r"- (.*)", conda)
    assert asked == [f"python {python}", "pip", "pip:", "-r requirements.txt"]
    assert python == ">=3.11,<3.14" and environments.PYTHONS == ("3.11", "3.12", "3.13")


def test_unsloth_gets_a_trl_that_it_allows_and_the_plain_path_one_that_trains_on_a_cpu():
    assert requirements("requirements.txt")["trl"] == "1.16.0"
    assert requirements("requirements-unsloth.txt")["trl"] == "1.15.0"
    assert not {"unsloth", "unsloth_zoo"} & set(requirements("requirements.txt"))


def test_colab_gets_the_versions_of_the_other_files():
    others = {package: pin for name in ALL for package, pin in requirements(name).items()}
    colab = requirements("requirements-colab.txt")
    assert {name: pin for name, pin in colab.items() if others.get(name) != pin} == {}
    theirs = {"torch", "torchvision", "triton", "numpy", "pandas", "ipython", "ipykernel", "jupyter_client"}
    assert not theirs & set(colab)  # Colab's own kernel needs its versions


def sources() -> dict[str, str]:
    """The code of the package, the tests and the notebooks, by place."""
    found = {}
    for path in [p for d in ("rlnb", "tests", "notebooks") for p in (ROOT / d).rglob("*.py")]:
        found[str(path.relative_to(ROOT))] = path.read_text()
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        plain = [line for cell in code for line in cell.splitlines() if not line.startswith("%")]
        found[str(path.relative_to(ROOT))] = "\n".join(plain)
    return found


def test_what_is_imported_is_declared():
    files = [*ALL, "requirements-browser.txt"]
    declared = {name.lower().replace("_", "-") for file in files for name in requirements(file)}
    own = {"rlnb", "tests", "data", *(path.stem for d in ("tests", "notebooks") for path in (ROOT / d).rglob("*.py"))}
    distributions = packages_distributions()
    undeclared = set()
    for place, code in sources().items():
        for node in ast.walk(ast.parse(code, place)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - own:
                packages = {n.lower().replace("_", "-") for n in distributions.get(name, [name])}
                if not packages & declared:
                    undeclared.add(f"{place}: {name}")
    assert not undeclared


LIGHT = ("profiles", "files", "machine", "task.problems", "task.rewards", "data.shapes", "record.runs",
         "record.diagnose", "show.plots", "tools.experiments")  # fmt: skip


def test_importing_rlnb_loads_nothing_heavy():
    heavy = {"torch", "transformers", "trl", "peft", "unsloth", "datasets"}
    code = (
        "import sys, time; began = time.process_time(); import rlnb\n"
        "print(time.process_time() - began)\n"
        f"import {', '.join(f'rlnb.{name}' for name in LIGHT)}\n"
        f"print(*{heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=-1, text=True)
    seconds, loaded = done.stdout.split("\n")[:2]
    assert loaded == ""
    assert float(seconds) < 0.3


STANDARD = ("rlnb/__init__.py", "rlnb/__main__.py", "rlnb/tools/__init__.py", "rlnb/tools/setup.py")


@pytest.mark.parametrize("name", [*STANDARD, "rlnb/tools/check_machine.py"])
def test_an_old_python_gets_as_far_as_the_message(name):
    tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 9))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names <= {"rlnb"}
    assert {name for name in imported if name.startswith("rlnb")} <= {"rlnb", "rlnb.tools", "rlnb.tools.setup"}


# From here on it sets up, in a project of its own.


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout whose only requirement is the package `tiny`; `rlnb data` shows which is there."""
    for name in ("tools", "task"):
        (tmp_path / "rlnb" / name).mkdir(parents=True)
    for name in STANDARD:
        shutil.copy(ROOT / name, tmp_path / name)
    show = "import tiny\n\ndef write_data():\n    print('tiny', tiny.VERSION)\n"
    (tmp_path / "rlnb" / "task" / "problems.py").write_text(show)
    for name in environments.FILES:
        (tmp_path / name).touch()
    for version in ("1.0", "2.0"):
        info = f"tiny-{version}.dist-info"
        files = {
            "tiny.py": f"VERSION = '{version}'",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        }
        with zipfile.ZipFile(tmp_path / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name, text)
            wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    require(tmp_path, "1.0")
    return tmp_path


def require(project: Path, version: str) -> None:
    (project / "requirements.txt").write_text(f"tiny=={version}  # the one requirement\n")


def offline(project: Path) -> dict[str, str]:
    """An environment in which pip knows the project's packages only."""
    return {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project)}


def start(project: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """`python -m rlnb` in a session of its own, with a Python outside of all environments."""
    return subprocess.Popen(
        [sys._base_executable, "-m", "rlnb", *arguments],
        cwd=project,
        env=offline(project) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rlnb(project: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of a finished `python -m rlnb`."""
    process = start(project, *arguments, **environment)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def test_a_command_sets_up_goes_on_and_the_next_time_does_not_set_up(project):
    status, output = rlnb(project, "data")
    assert (status, output.splitlines()[-1]) == (0, "tiny 1.0")
    assert "Setting up" in output
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert rlnb(project, "data") == (0, "tiny 1.0\n")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime - began.ru_utime < 1, "seconds of CPU time; other work does not count"


@pytest.mark.slow
def test_a_change_is_installed_in_place_and_what_pip_refuses_is_shown(project):
    assert rlnb(project, "setup")[0] == 0
    (project / ".venv" / "kept").touch()
    require(project, "2.0")
    status, output = rlnb(project, "data")
    assert (status, output.splitlines()[-1]) == (0, "tiny 2.0")
    assert (project / ".venv" / "kept").exists()
    require(project, "3.0")
    status, output = rlnb(project, "data")
    assert status == 1 and "Traceback" not in output
    assert "tiny==3.0" in output and "-r requirements.txt\nfailed" in output


def test_an_interrupted_install_starts_from_an_empty_environment(project):
    process = start(project, "setup")
    stamp = project / ".venv" / environments.STAMP
    while not stamp.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in output
    assert stamp.read_text() == f"unsloth {environments.UNFINISHED}"
    (project / ".venv" / "left over").touch()
    status, output = rlnb(project, "data")
    assert (status, output.splitlines()[-1]) == (0, "tiny 1.0")
    assert not (project / ".venv" / "left over").exists()


def test_an_environment_whose_making_was_killed_is_made_anew(project):
    """Killed before it has pip: the next set-up must not ask that pip to install."""
    process = start(project, "setup")
    while not (project / ".venv" / "pyvenv.cfg").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not list((project / ".venv").rglob("pip/__main__.py")), "too late: this machine is fast"
    status, output = rlnb(project, "data")
    assert (status, output.splitlines()[-1]) == (0, "tiny 1.0"), output


def test_a_folder_of_other_files_is_left_alone(project):
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").touch()
    status, output = rlnb(project, "setup", "--venv", "mine")
    assert status == 1 and "holds other files" in output and "Traceback" not in output
    assert [path.name for path in (project / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_another_kind_starts_from_an_empty_environment_and_is_remembered(project):
    (project / "requirements-unsloth.txt").write_text("tiny==2.0\n")
    assert rlnb(project, "setup", "--kind", "plain", "--venv", "other")[0] == 0
    other = environments.interpreter(project / "other")
    shown = [other, "-m", "rlnb", "data"]
    assert subprocess.check_output(shown, cwd=project, text=True) == "tiny 1.0\n"
    assert rlnb(project, "setup", "--venv", "other") == (0, "")
    (project / "other" / "left over").touch()
    assert rlnb(project, "setup", "--kind", "unsloth", "--venv", "other")[0] == 0
    assert subprocess.check_output(shown, cwd=project, text=True) == "tiny 2.0\n"
    assert not (project / "other" / "left over").exists()


def test_what_runs_in_the_environment_imports_rlnb_from_any_folder(project, tmp_path_factory):
    def place() -> str:
        command = [python, "-c", "import rlnb; print(rlnb.__file__)"]
        elsewhere, clean = tmp_path_factory.mktemp("elsewhere"), {"PATH": os.environ["PATH"]}
        done = subprocess.run(
            command, cwd=elsewhere, env=clean, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        return done.stdout.strip()

    python = environments.interpreter(project / ".venv")
    here = [python, "-m", "rlnb", "setup", "--here", "--kind", "plain"]
    subprocess.run([sys._base_executable, "-m", "venv", project / ".venv"], check=True)
    assert "No module named 'rlnb'" in place()
    subprocess.run(here, cwd=project, env=offline(project), check=True, stdout=-1)
    assert place() == str(project / "rlnb" / "__init__.py")
    project = project.rename(project.with_name("moved"))
    python = environments.interpreter(project / ".venv")
    assert "No module named 'rlnb'" in place()
    assert rlnb(project, "data") == (0, "tiny 1.0\n")
    assert place() == str(project / "rlnb" / "__init__.py")


def test_a_python_that_makes_no_environments_gets_the_way_out(project):
    (project / "venv.py").write_text("raise SystemExit('apt install python3-venv')  # as on Debian without it")
    status, output = rlnb(project, "run", PYTHONPATH=str(project))
    assert status == 1 and "Traceback" not in output
    assert "apt install python3-venv" in output and "setup --here" in output


def test_an_unsupported_python_gets_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "PYTHONS", ("3.98", "3.99"))
    with pytest.raises(SystemExit, match=r"needs Python 3\.98 to 3\.99: this is 3\.1\d.*make PYTHON="):
        environments.setup(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(environments, "read_stamp", lambda folder: (None, None))
    with pytest.raises(SystemExit, match=r"needs Python 3\.98 to 3\.99: this is 3\.1\d"):
        environments.setup(None, "plain")


def test_an_environment_made_by_hand_is_used_as_it_is(monkeypatch, tmp_path):
    for name in environments.FILES:
        (tmp_path / name).write_text("pytest==0.0.1  # not what is here\n")
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    assert environments.differences("plain") == {"pytest": pytest.__version__}
    installed = f"pytest=={pytest.__version__}  # what is here\n"
    (tmp_path / "requirements.txt").write_text(installed)
    environments.ensure(["data"])  # returns, where it would otherwise replace this process


def test_ci_goes_through_make():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_waiting_threads_do_not_spin_for_long():
    """Set by rlnb before torch is loaded, unless the user has set it."""
    code = "import os, rlnb; print(os.environ['GOMP_SPINCOUNT'])"
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        own = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        own |= {"PYTHONPATH": str(ROOT)} | given
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
        assert done.stdout.strip() == expected
