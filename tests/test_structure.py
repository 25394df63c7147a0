"""The house stays small and its arrows keep one direction. `python tests/test_structure.py` prints the figures."""

import ast
import json
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports from rooms on floors below its own, and from its own room. "" is the base: files, profiles, ...
ORDER = {"": 0, "task": 1, "data": 2, "model": 3, "measure": 4, "record": 4, "train": 5, "show": 6, "tools": 7}
FILE, FUNCTION, FLOORS, SAME = 300, 45, 8, 8
# Where the package stands. The aim is 7,000, 1,600 and 4,000: these go down, never up.
PACKAGE, TOOLS, LESSON = 8500, 1180, 5425


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by name; a package's own is its __init__.py."""
    paths = sorted((ROOT / "rlnb").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def lines(name: str) -> int:
    return len(modules()[name].read_text(encoding="utf-8").splitlines())


def room(name: str) -> str:
    """Of rlnb.train.ppo.config "train"; "" for rlnb.files. The command line counts as a tool."""
    parts = name.split(".")
    return "tools" if parts[-1] == "__main__" else parts[1] if len(parts) > 1 and parts[1] in ORDER else ""


def imported(code: str, package: str = "") -> set[str]:
    """The modules of rlnb that some code imports, also inside functions but not for type checks alone."""
    found = set()
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlnb":
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            # `from rlnb.show import plots` needs rlnb.show too, but takes nothing from it.
            names = [*inner] if len(inner) == len(node.names) else [*inner, node.module]
        found |= {name for name in names if name in modules() and name != package}
    return found


@cache
def arrows() -> dict[str, set[str]]:
    return {name: imported(path.read_text(encoding="utf-8"), name) for name, path in modules().items()}


def closure(start: set[str]) -> set[str]:
    """All that these modules import, directly or not; a module brings the __init__.py of its packages."""
    reached, waiting = set(), set(start)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        packages = {name.rpartition(".")[0]} & modules().keys()
        waiting |= (arrows()[name] | packages) - reached
    return reached


def lesson(name: str) -> set[str]:
    """The modules that a notebook imports, directly or not."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return closure(imported(code))


@cache
def floor(name: str) -> int:
    """1 for a module that imports nothing of rlnb, else one above the highest that it imports."""
    own = arrows()[name] - {name}
    return 1 + max((floor(other) for other in own), default=0)


def functions(path: Path) -> dict[str, int]:
    """Lines of every function of a file, decorators and docstring included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_package_is_small():
    total = sum(map(lines, modules()))
    tools = sum(lines(name) for name in modules() if room(name) == "tools")
    assert total <= PACKAGE and tools <= TOOLS, (total, tools)


@pytest.mark.parametrize("name", modules())
def test_files_and_functions_are_short(name):
    assert lines(name) <= FILE
    assert {f: n for f, n in functions(modules()[name]).items() if n > FUNCTION} == {}


def test_a_lesson_needs_a_part_of_the_package():
    needed = sum(map(lines, lesson("05_dpo")))
    assert needed <= LESSON, needed


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name):
    wrong = [other for other in arrows()[name] if room(other) != room(name) and ORDER[room(other)] >= ORDER[room(name)]]
    assert wrong == []


def test_there_is_no_circle_and_few_floors():
    names = {}
    for name in modules():
        try:
            names[name] = floor(name)
        except RecursionError:
            pytest.fail(f"{name} imports itself by a detour")
    highest = max(names, key=names.get)
    assert names[highest] <= FLOORS, highest


def test_no_two_places_have_the_same_lines():
    """Eight lines in a row that stand twice: blank lines, comments and imports do not count."""
    places = defaultdict(list)
    for name, path in modules().items():
        text = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        kept = [line.strip() for line in text.splitlines()]
        kept = [line for line in kept if len(line) > 3 and not re.match(r"#|from |import ", line)]
        for i in range(len(kept) - SAME + 1):
            places["\n".join(kept[i : i + SAME])].append(name)
    assert {text: names for text, names in places.items() if len(names) > 1} == {}


def test_importing_rlnb_is_quick():
    code = "import time; t = time.perf_counter(); import rlnb; print(time.perf_counter() - t)"
    from sys import executable

    done = subprocess.run([executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def main() -> None:
    """The figures that the tests above hold."""
    by_room = defaultdict(int)
    for name in modules():
        by_room[room(name) or "base"] += lines(name)
    print(f"{sum(by_room.values())} lines in {len(modules())} files:", dict(by_room))
    for name in ("02_sft", "05_dpo", "08_grpo"):
        needed = lesson(name)
        print(f"{name} needs {len(needed)} modules, {sum(map(lines, needed))} lines")
    highest = max(modules(), key=floor)
    print(f"{floor(highest)} floors, at {highest}")
    longest = sorted((n, f"{name}:{f}") for name, p in modules().items() for f, n in functions(p).items())[-5:]
    print("longest functions:", longest)


if __name__ == "__main__":
    main()
