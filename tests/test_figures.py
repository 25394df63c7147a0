"""The diagrams of the notebooks: drawn anew they are the same, and what they say can be read."""

import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "figures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.svg"))
TAG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawing():
    """The modules that draw. They are no package: `draw.py` finds `picture.py` beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import draw
        import picture

        yield draw, picture
    for name in ("draw", "picture"):
        del sys.modules[name]


def stored(name: str) -> ElementTree.Element:
    return ElementTree.fromstring((FOLDER / f"{name}.svg").read_text(encoding="utf-8"))


def numbers(element: ElementTree.Element, *names: str) -> list[float]:
    return [float(element.get(name)) for name in names]


def area(text: ElementTree.Element, picture) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a line of text, by an estimate."""
    width = picture.text_width("".join(text.itertext()), text.get("class") == "strong")
    x, y = numbers(text, "x", "y")
    left = x - {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")] * width
    return left, left + width, y - 0.75 * picture.SIZE, y + 0.25 * picture.SIZE


def test_what_is_stored_is_what_the_program_writes(drawing):
    draw, _ = drawing
    assert sorted(draw.FIGURES) == NAMES
    differ = [n for n in NAMES if (FOLDER / f"{n}.svg").read_bytes() != draw.FIGURES[n]().encode()]
    assert not differ, f"{', '.join(differ)}: run python notebooks/figures/draw.py"


def test_the_command_writes_every_figure(tmp_path):
    for path in FOLDER.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, tmp_path / "draw.py"], check=True, cwd="/")
    for name in NAMES:
        written, kept = (folder / f"{name}.svg" for folder in (tmp_path, FOLDER))
        assert written.read_bytes() == kept.read_bytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_whole(name):
    """It is well-formed, says in words what it shows, has the width of all, and needs nothing from outside."""
    svg = stored(name)
    for tag in ("title", "desc"):
        assert svg.find(TAG + tag).text.strip()
    assert svg.get("viewBox").split()[2] == svg.get("width") == "760"
    code = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert not re.search(r"<(script|image|foreignObject)|href=|url\((?!#tip)|@import|\bnan\b", code)
    assert "prefers-color-scheme: dark" in code


@pytest.mark.parametrize("name", NAMES)
def test_text_fits_its_box(drawing, name):
    for group in stored(name).iter(f"{TAG}g"):
        x, y, w, h = numbers(group.find(f"{TAG}rect"), "x", "y", "width", "height")
        for text in group.iter(f"{TAG}text"):
            left, right, top, bottom = area(text, drawing[1])
            said = "".join(text.itertext())
            assert x + 3 <= left and right <= x + w - 3, f"{said!r} is wider than its box"
            assert y + 2 <= top and bottom <= y + h - 2, f"{said!r} is higher than its box"


@pytest.mark.parametrize("name", NAMES)
def test_no_text_overlaps_or_leaves_the_figure(drawing, name):
    svg = stored(name)
    width, height = numbers(svg, "width", "height")
    texts = [text for text in svg.iter(f"{TAG}text") if "".join(text.itertext())]
    places = [(area(text, drawing[1]), "".join(text.itertext())) for text in texts]
    for (left, right, top, bottom), said in places:
        assert left >= 8 and right <= width - 8 and top >= 4 and bottom <= height - 4, said
    for (one, said), (other, beside) in combinations(places, 2):
        apart = one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
        assert apart, f"{said!r} overlaps {beside!r}"


def test_the_estimate_of_a_width_counts_letters_subscripts_and_bold(drawing):
    width = drawing[1].text_width
    assert 80 < width("policy writes") < 95  # 84 in DejaVu Sans
    assert math.isclose(width("y_{w}"), width("yw")) and width("il") < width("ab") < width("mw")
    assert width("policy", bold=True) > width("policy")


def test_the_curves_of_kto_are_the_formula():
    """Value and loss add up to 1; each is 1/2 in the middle, and sigmoid(6) at the end."""
    curves = [path for path in stored("kto").iter(f"{TAG}path") if "curve" in path.get("class", "")]
    assert len(curves) == 4
    points = [re.findall(r"\d+\.\d", path.get("d")) for path in curves]  # x, y, x, y
    heights = [[(220 - float(y)) / 160 for y in row[1::2]] for row in points]
    for loss, value in (heights[:2], heights[2:]):
        assert all(math.isclose(a + b, 1, abs_tol=0.002) for a, b in zip(loss, value, strict=True))
        assert value[30] == 0.5
    sigmoid = 1 / (1 + math.exp(-6))
    assert heights[1][-1] == pytest.approx(sigmoid, abs=1e-3)  # a good answer's value rises
    assert heights[3][0] == pytest.approx(sigmoid, abs=1e-3)  # a bad one's falls
