"""Small correct functions as diffs, most with one known defect put in: python -m data.review.make

The functions and the defects are in data/review/functions.toml.
"""

import json
import random
import re
import tomllib
from pathlib import Path
from typing import Any

from rlnb import files
from data.review.check import DATA, KINDS, SPLITS

FUNCTIONS = tomllib.loads((DATA / "functions.toml").read_text(encoding="utf-8"))["function"]
TEST_FAMILIES = ("grid", "config", "copy")
SIZES = {"train": 400, "test": 150}


def put_in(code: str, right: str, wrong: str) -> tuple[str, int]:
    """The code with a defect in the place of the right text, and the number of the line that it is in."""
    if code.count(right) != 1:
        raise ValueError(f"{right!r} stands {code.count(right)} times in {code!r}, not once")
    broken = code.replace(right, wrong)
    lines = zip(code.splitlines(), broken.splitlines(), strict=False)
    return broken, next(number for number, (old, new) in enumerate(lines, 1) if old != new)


def draw(kind: str, families: list[dict[str, Any]], rng: random.Random) -> tuple[str, str, int]:
    """A family, a diff with a defect of this kind, and the defect's line."""
    fit = [(function, defect) for function in families for defect in function["defects"] if defect[0] == kind]
    function, defect = rng.choice(fit) if fit else (rng.choice(families), None)
    code, line = function["code"].strip(), 0
    if defect:
        code, line = put_in(code, *defect[1:])
    names = {letter: rng.choice(words) for letter, words in function["names"].items()}
    lines = re.sub(r"\{([a-d])\}", lambda found: names[found[1]], code).splitlines()
    first = rng.randint(0, min(line or 2, 2) - 1)  # the lines before it were there already
    hunk = [(" " if number < first else "+") + text for number, text in enumerate(lines)]
    return function["family"], "\n".join([f"@@ {function['family']}.py", *hunk]), line


def rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a split, all different; the kinds come in turn."""
    families = [function for function in FUNCTIONS if (function["family"] in TEST_FAMILIES) == (split == "test")]
    rng, found = random.Random(f"{split}-{seed}"), {}
    while len(found) < SIZES[split]:
        kind = KINDS[len(found) % len(KINDS)]
        family, prompt, line = draw(kind, families, rng)
        answer = {"defect": kind, "line": line}
        row = {"id": f"{split}-{len(found):03d}", "split": split, "family": family, "prompt": prompt}
        found.setdefault(prompt, row | answer | {"completion": json.dumps(answer, separators=(",", ":"))})
    return list(found.values())


def write_data(folder: Path = DATA) -> None:
    """Writes both splits as JSON Lines, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        files.write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows(split)))


if __name__ == "__main__":
    write_data()
