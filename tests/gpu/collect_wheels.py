"""Collects the wheels that a device without a network lacks: python tests/gpu/collect_wheels.py FOLDER HAVE [pip's words]

HAVE: a text with the names of what is installed there, such as the output of `pip list`. Versions are those of the
requirement files. Each wheel's own needs follow, unless they are there or in LEFT_OUT. pip's words: --index-url, say.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT, MOST = Path(__file__).resolve().parents[2], 64 * 2**20
WANTED = ("unsloth", "unsloth_zoo", "trl", "datasets", "peft", "cut_cross_entropy", "msgspec", "tyro", "hf_transfer",
          "nbclient", "nbconvert", "ipykernel", "ipywidgets", "pytest")  # fmt: skip
# Large, compiled for one torch, or of no use to what the slot does.
LEFT_OUT = {"torch", "triton", "vllm", "xformers", "bitsandbytes", "torchvision", "torchao", "diffusers", "jupyterlab"}
TARGET = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3",
          "--abi=none", *(f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 17)), "--platform=manylinux2014_x86_64",
          "--platform=any"]  # fmt: skip


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata that hold for Python 3.12 on Linux without extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(name).decode().partition("\n\n")[0].splitlines()
    found = [Requirement(line.partition(":")[2]) for line in lines if line.startswith("Requires-Dist:")]
    there = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": "",
             "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}  # fmt: skip
    return [f"{r.name}{r.specifier}" for r in found if r.marker is None or r.marker.evaluate(there)]


def main(folder: Path, have: Path, *words: str) -> None:
    there = {plain(name) for name in re.findall(r"[A-Za-z0-9][\w.-]*\w", have.read_text())} | LEFT_OUT
    files = [file.read_text() for file in sorted(ROOT.glob("requirements*.txt"))]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join(files[::-1]), re.MULTILINE))
    todo = [f"{name}=={pins[name]}" if name in pins else name for name in WANTED]
    for wanted in todo:  # it grows
        name = re.split(r"[<>=!~ ]", wanted)[0]
        if plain(name) in there and name not in WANTED:
            continue
        there.add(plain(name))
        before = set(folder.glob("*.whl"))
        pip = [sys.executable, "-m", "pip", "download", "-q", *TARGET, "-d", str(folder), *words, wanted]
        subprocess.run(pip, check=True)
        todo += [need for wheel in set(folder.glob("*.whl")) - before for need in needs(wheel)]
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{total / 2**20:.1f} MiB in {folder}")
    if total > MOST:
        raise SystemExit(f"more than the {MOST / 2**20:.0f} MiB that travel: take names out of WANTED")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
