"""The command line. Every command but setup first sees to the set-up by itself (see bootstrap)."""

from __future__ import annotations  # for Python 3.9: see bootstrap

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from rlnb.tools import setup as bootstrap
from rlnb.tools.setup import ROOT

PROFILES = ("cpu", "gpu", "smoke")
METHODS = ("sft", "reward_model", "ppo", "rloo", "dpo", "kto", "orpo", "grpo")  # training.METHODS, but light
STAGES = ("lint", "unit", "notebooks", "learning", "plain", "browser")


def main(argv: list[str] | None = None) -> int:
    """Carries out one command line (default: the process's own) and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.do not in (_lab, _pretrain):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.do not in (_setup, _doctor):
            bootstrap.ensure(argv)
        if getattr(arguments, "profile", None):
            os.environ["RLNB_PROFILE"] = arguments.profile
        return arguments.do(arguments, rest)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlnb", description="The workbook's commands.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, do, about, **options):
        added = commands.add_parser(name, help=about, **options)
        added.set_defaults(do=do)
        return added

    setup = command("setup", _setup, "make the environment, if anything changed")
    setup.add_argument("--kind", choices=bootstrap.STEPS, help="default: as it is, or unsloth")
    place = setup.add_mutually_exclusive_group()
    place.add_argument("--here", action="store_true", help="install into the Python that runs this")
    place.add_argument("--venv", type=Path, default=bootstrap.VENV, help="default: .venv")

    run = command("run", _run, "execute notebooks and keep an HTML copy of each")
    run.add_argument("names", nargs="*", help="like 02_sft; default: all of notebooks/, in order")
    run.add_argument("--profile", choices=PROFILES, help="default: gpu if there is one, else cpu")
    run.add_argument("--out", type=Path, default=ROOT / "html", help="default: html")
    run.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    run.add_argument(
        "--jobs", type=int, help="notebooks at a time, a core each; default: 2 if there are the cores"
    )

    command("lab", _lab, "open JupyterLab; it gets the arguments that follow")

    doctor = command("doctor", _doctor, "what works on this machine, or why a run is dead")
    doctor.add_argument("run", nargs="?", help="id of a run; default: this machine")

    test = command("test", _test, "run the checks: see tests/README.md")
    test.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: the first three")

    train = command("train", _train, "one training run from the command line")
    train.add_argument("method", choices=METHODS)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--profile", choices=PROFILES, help="default: gpu if there is one, else cpu")
    train.add_argument("--from", dest="start", help="base, sft, or the folder of an adapter")

    compare = command("compare", _compare, "all methods over seeds: writes data/results/methods.csv")
    compare.add_argument("--seeds", type=int, default=5)
    compare.add_argument("--only", nargs="+", metavar="METHOD", help="like 'SFT, DPO'; default: all")
    compare.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; default: 2")
    compare.add_argument("--resume", action="store_true", help="keep the rows that are there")

    command("pretrain", _pretrain, "build the practice model from nothing", add_help=False)
    data = command("data", _data, "write data/problems/ anew")
    data.add_argument(
        "--preferences", action="store_true", help="data/preferences/ too: samples an SFT model"
    )
    data.add_argument(
        "--reward-model", action="store_true", help="data/reward-model/ too: trains it, four minutes"
    )
    return parser


def _setup(arguments, rest) -> int:
    bootstrap.setup(None if arguments.here else arguments.venv.absolute(), arguments.kind)
    return 0


def _run(arguments, rest) -> int:
    from rlnb.tools import notebooks as execute

    jobs = arguments.jobs or execute.usual_jobs(arguments.names, arguments.write)
    return execute.main(arguments.names, out=arguments.out, write=arguments.write, jobs=jobs)


def _lab(arguments, rest) -> int:
    options = [
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start.ipynb",
        "--LabApp.news_url=None",  # nothing calls home
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    return bootstrap.become([sys.executable, "-m", "jupyterlab", *options, *rest])


def _doctor(arguments, rest) -> int:
    """Looks at the Python that would run the workbook, as it is: nothing is installed for it."""
    python = bootstrap.interpreter(bootstrap.VENV)
    elsewhere = Path(sys.prefix).resolve() != bootstrap.VENV.resolve()
    if elsewhere and python.exists() and not find_spec("torch"):
        bootstrap.become([str(python), "-m", "rlnb", "doctor", *filter(None, [arguments.run])])
    from rlnb.record import doctor

    return doctor.main(arguments.run)


def _train(arguments, rest) -> int:
    from rlnb.train import methods as training

    return training.main(arguments)


def _compare(arguments, rest) -> int:
    from rlnb.tools import compare

    return compare.main(arguments)


def _pretrain(arguments, rest) -> int:
    from rlnb.tools import pretrain

    return pretrain.main(rest)


def _data(arguments, rest) -> int:
    from rlnb.task import problems

    problems.write_data()
    if arguments.preferences:
        from rlnb.train import methods as training
        from rlnb.data import preferences

        preferences.write(training.collect_responses(), training.RESPONSES)
    if arguments.reward_model:
        from rlnb.train import methods as training

        training.ship_reward_model()
    return 0


def _test(arguments, rest) -> int:
    """Runs stages, each with a heading and its seconds; all of them, also after one has failed."""
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        sys.exit(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    results = []
    for stage in arguments.stages or STAGES[:3]:
        print(f"\n=== {stage}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as runs:  # not among the user's own
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RLNB_RUNS": runs,
                "RLNB_PROFILE": "cpu" if stage == "learning" else "smoke",
                "HF_HUB_OFFLINE": "1",
            }
            passed = all(
                subprocess.call(command, cwd=ROOT, env=environment) == 0
                for command in _commands(stage, Path(runs) / "html")
            )
        verdict = "passed" if passed else "FAILED"
        results.append(f"{stage} {verdict} in {time.monotonic() - began:.0f} s")
        print(f"=== {results[-1]}", flush=True)
    print("\n" + "\n".join(results))
    return int(any("FAILED" in line for line in results))


def _commands(stage: str, pages: Path) -> list[list[str]]:
    """The commands of a stage, each run if the one before it has passed. pages: for HTML copies."""
    python = [sys.executable, "-m"]
    nbval = ["-p", "no:python", "--nbval-lax", "--nbval-current-env"]
    run = ["rlnb", "run", "--out", str(pages)]
    other = ROOT / ".venv-plain"
    plain = [str(bootstrap.interpreter(other)), "-m"]
    return {
        "lint": [[*python, "ruff", "check", "rlnb", "tests", "notebooks"]],
        "unit": [[*python, "pytest", "tests"]],
        "notebooks": [[*python, "pytest", *nbval, "notebooks"]],
        "learning": [[*python, *run], [*python, "pytest", "-s", "tests/learning"]],
        "plain": [
            [*python, "rlnb", "setup", "--kind", "plain", "--venv", str(other)],
            [*plain, "pytest", "tests"],
            [*plain, *run, "02_sft", "08_grpo"],
        ],
        "browser": [
            [*python, "pip", "install", "-q", "-r", "requirements-browser.txt"],
            [*python, "pytest", "tests/browser"],
        ],
    }[stage]


if __name__ == "__main__":
    sys.exit(main())
