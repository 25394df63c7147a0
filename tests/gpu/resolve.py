"""Do the pins fit together? What the packages of the GPU require, as their own metadata say, against our pins.

    python -m tests.gpu.resolve            what does not fit, for every Python; ends with 1 if there is anything
    python -m tests.gpu.resolve --renew    asks pip for the metadata anew, after a pin has changed

Only what we pin is looked at: pip finds the rest. Without a network, but for --renew.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlnb.tools.setup import PYTHONS, ROOT, STEPS

STORED = Path(__file__).with_name("requires.json")  # "vllm==0.32.0" -> what it requires, as its metadata say it
# Of what we pin, and two packages that we do not: what limits numpy stands in their metadata.
ASKED = ("torch", "transformers", "datasets", "peft", "trl", "unsloth", "unsloth_zoo", "vllm", "torchvision",
         "bitsandbytes", "mistral_common", "numba")  # fmt: skip
UNPINNED = {"mistral_common": "1.13.1", "numba": "0.65.0"}


def pins(kind: str = "gpu") -> dict[str, str]:
    """Package -> version of a kind of set-up; of the later file, as with pip."""
    texts = [(ROOT / step[-1]).read_text(encoding="utf-8") for step in STEPS[kind]]
    return dict(pair for text in texts for pair in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", text))


def conflicts(pinned: dict[str, str], stored: dict[str, list[str]], python: str) -> list[str]:
    """A line for each pin that a package does not allow, on x86-64 Linux with one Python."""
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    here = default_environment() | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    here |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    found = []
    for package, lines in stored.items():
        for wants in map(Requirement, lines):
            version = versions.get(canonicalize_name(wants.name))
            applies = not wants.marker or wants.marker.evaluate(here)
            if version and applies and not wants.specifier.contains(version, prereleases=True):
                found.append(f"Python {python}: {package} wants {wants}, the pin is {version}")
    return found


def renew() -> None:
    """Asks pip for the metadata of what is pinned now; downloads no package where the index has metadata apart."""
    wanted = [f"{name}=={(pins() | UNPINNED)[name]}" for name in ASKED]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "-q"]
        subprocess.run([*command, "--report", str(report), *wanted], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    requires = {canonicalize_name(entry["name"]): entry.get("requires_dist", []) for entry in found}
    kept = {w: [r for r in requires[canonicalize_name(w.split("==")[0])] if "extra ==" not in r] for w in wanted}
    STORED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true")
    if parser.parse_args().renew:
        renew()
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    lines = [line for python in PYTHONS for line in conflicts(pins(), stored, python)]
    print("\n".join(lines) or f"{len(stored)} packages allow our pins on Python {', '.join(PYTHONS)}")
    sys.exit(bool(lines))
