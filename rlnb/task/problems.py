"""The task: arithmetic word problems with a worked trace. Only this file and ``grading`` know it.

A problem is a short story with numbers. Its solution is one equation a step and a final answer::

    <reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>

The stories (twelve kinds of one to three steps, four deeper ones) are data: ``problems.toml``.
"""

import json
import random
import re
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlnb import files, profiles
from rlnb.task.grading import TAGS, UNITS, Grade, apply, grade  # noqa: F401 (here for whoever has a problem)

DATA = Path(__file__).parents[2] / "data" / "problems"
TEST_SPLITS = ("id", "templates", "larger", "deeper", "rule")
SIZES = {"id": 1000, "templates": 500, "larger": 500, "deeper": 500, "rule": 500,
         "validation": 500, "demonstrations": 256, "train": 3000}  # fmt: skip
SYSTEM = (
    "Solve the problem. Write one equation per step, separated by semicolons, and then the final number, "
    "exactly like this: <reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>"
)
# Demonstrations are costly, so in this workbook somebody wrote them for half of the kinds only.
DEMONSTRATED = ("gain", "loss", "groups", "gain_loss", "change", "two_buys")

_TEXT = tomllib.loads((Path(__file__).parent / "problems.toml").read_text(encoding="utf-8"))
KINDS = {kind["name"]: kind for kind in _TEXT["kind"]}
FIELDS = {"id": str, "split": str, "kind": str, "question": str, "answer": int, "trace": list, "numbers": dict}
MOST = 100_000  # of deeper ones there are more, but they take minutes
MISSES = 20_000  # problems in a row that came before: then there is no other one
ID_KINDS = tuple(name for name, kind in KINDS.items() if not kind.get("deep"))
DEEP_KINDS = tuple(name for name, kind in KINDS.items() if kind.get("deep"))


@dataclass(frozen=True)
class Problem:
    """One word problem. ``numbers`` are the values in the story, ``trace`` the right equations."""

    id: str
    split: str
    kind: str
    question: str
    answer: int
    trace: tuple[str, ...]
    numbers: dict[str, int]

    @property
    def steps(self) -> int:
        return len(self.trace)

    @property
    def key(self) -> tuple:
        """What makes two problems the same whatever the names and the wording."""
        return (self.kind, *sorted(self.numbers.items()))


def work(plan: Iterable[str], numbers: dict[str, int]) -> tuple[str, ...] | None:
    """Carries out a plan like ("a + b", "s1 - c"); None where a result is not a positive integer."""
    known, trace = dict(numbers), []
    for step, rule in enumerate(plan, 1):
        left, op, right = rule.split()
        result = apply(op, known[left], known[right])
        if result < 1:
            return None
        trace.append(f"{known[left]} {op} {known[right]} = {result}")
        known[f"s{step}"] = result
    return tuple(trace)


def careless(problem: Problem) -> tuple[str, ...]:
    """The trace of somebody in a hurry: a plan that is usual for this kind of problem and wrong, or a
    forgotten carry (the last result is off by ten).
    """
    habit = KINDS[problem.kind]["careless"]
    trace = None if habit == "slip" else work(habit, problem.numbers)
    if trace and int(trace[-1].split()[-1]) != problem.answer:
        return trace
    wrong = problem.answer - 10 if problem.answer > 10 else problem.answer + 10
    return (*problem.trace[:-1], f"{problem.trace[-1].rpartition(' ')[0]} {wrong}")


def _tell(template: str, words: dict[str, object], rng: random.Random) -> str:
    return re.sub(r"\[([^]]*)\]", lambda m: rng.choice(m[1].split("|")), template).format_map(words)


def _words(new: bool, rng: random.Random) -> dict[str, object]:
    pool = "_new" if new else ""
    (name, he), (other, _) = (p.split(":") for p in rng.sample(_TEXT["people" + pool].split(), 2))
    things, others = rng.sample(_TEXT["things" + pool].split(), 2)
    his = "her" if he == "she" else "his"
    return dict(Name=name, Other=other, he=he, He=he.title(), his=his, things=things, others=others)


def draw(kind: str, rng: random.Random, *, larger=False, new=False, rule: bool = False) -> Problem:
    """One problem of a kind. ``larger`` numbers, ``new`` names and wording, a changed unit ``rule``."""
    spec = KINDS[kind]
    ranges = spec["larger"] if larger and "larger" in spec else spec["id"]
    unit = UNITS.get(spec.get("unit"))
    trace = None
    while not trace:
        numbers = {name: rng.randint(low, high) for name, (low, high) in ranges.items()}
        if unit and rule:
            low, high = spec["rule_unit"]
            numbers["U"] = rng.choice([size for size in range(low, high + 1) if size != unit])
        elif unit:
            numbers["U"] = unit
        trace = work(spec["plan"], numbers)
    words = {**_words(new, rng), **numbers}
    parts = [_tell(rng.choice(spec["new" if new and "new" in spec else "templates"]), words, rng)]
    if rng.random() < 0.15:
        parts.insert(0, _tell(rng.choice(_TEXT["fillers_new" if new else "fillers"]), words, rng))
    if rule:
        parts.insert(0, _tell(spec["rule"], words, rng))
    return Problem("", "", kind, " ".join(parts), int(trace[-1].split()[-1]), trace, numbers)


def generate(
    split: str, n: int, seed: int = 0, kinds: Iterable[str] | None = None, exclude: Collection[tuple] = ()
) -> list[Problem]:
    """n different problems of a split, the kinds in turn. ``exclude`` holds keys that must not come.

    Raises ValueError for an unknown split or kind, or when a kind has no n different problems.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST:
        raise ValueError(f"n is {n!r}: it must be a whole number from 1 to {MOST}")
    if split not in SIZES:
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SIZES)}.")
    usual = {"deeper": DEEP_KINDS, "demonstrations": DEMONSTRATED,
             "rule": [k for k in ID_KINDS if "rule" in KINDS[k]]}.get(split, ID_KINDS)  # fmt: skip
    kinds = usual if kinds is None else tuple(kinds)
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds is {kinds}: there is no kind of problem but {', '.join(KINDS)}.")
    rng, seen, found = random.Random(f"{split}-{seed}"), set(exclude), []
    options = dict(larger=split == "larger", new=split == "templates", rule=split == "rule")
    missed = 0  # in a row
    while missed < MISSES:
        if len(found) == n:
            return found
        problem, missed = draw(kinds[len(found) % len(kinds)], rng, **options), missed + 1
        if problem.key not in seen:
            missed = 0
            seen.add(problem.key)
            found.append(replace(problem, id=f"{split}-{len(found):04d}", split=split))
    raise ValueError(f"only {len(found)} of {n} different problems found: ask for fewer.")


def write_data(folder: Path = DATA) -> None:
    """Writes every split as JSONL, test splits first, so that nothing later repeats a test problem."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[tuple] = set()
    for split, size in SIZES.items():
        rows = generate(split, size, exclude=seen)
        seen.update(problem.key for problem in rows)
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        files.write(folder / f"{split}.jsonl", text)


def load(split: str) -> list[Problem]:
    """The problems of a split from data/problems. Raises FileNotFoundError for a split that is not there, and
    ValueError with file, line, field and value for what is no problem.
    """
    path = DATA / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no split {split!r} at {path}; there are {', '.join(SIZES)}.")
    rows = files.rows(path, FIELDS)
    return [Problem(**{name: row[name] for name in FIELDS} | {"trace": tuple(row["trace"])}) for row in rows]


def render(trace: Iterable[str], answer: int) -> str:
    """A trace and an answer in the strict format."""
    return f"<reasoning>{'; '.join(trace)}</reasoning><answer>{answer}</answer>"


def solution(problem: Problem) -> str:
    """The gold completion: the right trace and answer in the strict format."""
    return render(problem.trace, problem.answer)


def prompt(problem: Problem, system: str | None = None) -> list[dict[str, str]]:
    """The problem as chat messages. system: None is SYSTEM, but for the practice model, which was never told
    anything; "" is no system message for any model.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"{problem!r:.80} is a {type(problem).__name__}, not a Problem: see problems.load and generate")
    if system is None and profiles.model_name() != profiles.PRACTICE:
        system = SYSTEM
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": problem.question}]
