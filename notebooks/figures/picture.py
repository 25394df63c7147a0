"""What the diagrams are made of: boxes, arrows, labels, a legend, and the look on a light and on a dark page.

Blue is what trains, grey what is frozen, orange data and rewards. Sizes and places are in pixels.
In a text "_{w}" is a subscript. The first line of a box is bold, unless the text begins with a line break.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LINE, SIZE = 760, 18, 13  # of a figure, from line to line, of letters; all in pixels
STYLE = """<style>
.rlnb text { font: 13px system-ui, sans-serif; fill: #222222 } .rlnb .strong { font-weight: 600 }
.rlnb .faint { fill: #5A5A57 } .rlnb .sub { font-size: 10px } .rlnb .card { fill: #FCFCFA }
.rlnb .line { fill: none; stroke: #5A5A57; stroke-width: 1.4 } .rlnb .tip { fill: #5A5A57 }
.rlnb .plain { fill: #FFFFFF; stroke: #A5A5A0; stroke-width: 1.4 }
.rlnb .trains { fill: #DCEBF5; stroke: #0072B2; stroke-width: 1.6 }
.rlnb .frozen { fill: #EBEBE8; stroke: #85857F; stroke-width: 1.4 }
.rlnb .data { fill: #FBE8DA; stroke: #D55E00; stroke-width: 1.4 }
.rlnb path.curve { fill: none; stroke-width: 2.6 }
@media (prefers-color-scheme: dark) {
.rlnb text { fill: #EDEDEA } .rlnb .faint { fill: #B5B5B0 } .rlnb .card { fill: #1A1B1D }
.rlnb .line { stroke: #B5B5B0 } .rlnb .tip { fill: #B5B5B0 } .rlnb .plain { fill: #242528; stroke: #75757A }
.rlnb .trains { fill: #123850; stroke: #56B4E9 } .rlnb .frozen { fill: #36373B; stroke: #8E8E93 }
.rlnb .data { fill: #4A2A12; stroke: #F0883E } }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>"""
FIGURES: dict[str, Callable[[], str]] = {}


def figure(height: int, title: str) -> Callable:
    """Registers a function that draws. Its docstring describes the figure to who cannot see it."""

    def register(draw: Callable[["Picture"], None]) -> None:
        FIGURES[draw.__name__] = lambda: Picture(height).svg(draw, title)

    return register


def text_width(text: str, bold: bool = False) -> float:
    """An estimate for a wide font, DejaVu Sans. A subscript counts as if it were large."""
    text = re.sub(r"_\{(.*?)\}", r"\1", text)
    narrow = sum(letter in "iljtfrI.,:;'|!()[] -/" for letter in text)
    wide = sum(letter in "mwMWOQ%&+=<>−→…" for letter in text)
    return SIZE * (0.62 * len(text) - 0.25 * narrow + 0.22 * wide) * (1.12 if bold else 1)


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float


class Picture:
    def __init__(self, height: int):
        self.height, self.parts = height, []

    def label(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """Lines of text, the first with its base line at y."""
        for i, line in enumerate(text.split("\n")):
            sub = r'<tspan class="sub" dy="3">\1</tspan><tspan dy="-3">\2</tspan>'
            line = re.sub(r"_\{(.*?)\}([^_]*)", sub, escape(line))
            where = f'x="{x:g}" y="{y + LINE * i:g}" text-anchor="{anchor}"'
            self.parts.append(f'<text class="{kind}" {where}>{line}</text>')

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "plain") -> Box:
        size = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"'
        self.parts.append(f'<g><rect class="{kind}" {size}/>')
        lines = text.strip("\n").split("\n")
        for i, line in enumerate(lines if text else []):
            base = y + h / 2 + 4.5 + LINE * (i - (len(lines) - 1) / 2)
            self.label(x + w / 2, base, line, "strong" if line == text.split("\n")[0] else "")
        self.parts.append("</g>")
        return Box(x, y, w, h)

    def line(self, path: str, kind: str = "line", tip: bool = True) -> None:
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')

    def arrows(self, *boxes: Box) -> None:
        """From each box to the next: straight where they face each other, else with a bend half-way."""
        for a, b in pairwise(boxes):
            if a.x + a.w <= b.x or b.x + b.w <= a.x:
                start, end = (a.x + a.w + 2, b.x - 3) if a.x < b.x else (a.x - 2, b.x + b.w + 3)
                y, to = a.y + a.h / 2, b.y + b.h / 2
                if a.y < to < a.y + a.h:
                    y = to
                elif b.y < y < b.y + b.h:
                    to = y
                bend = "" if y == to else f"H{(start + end) / 2:g} V{to:g} "
                self.line(f"M{start:g} {y:g} {bend}H{end:g}")
            else:
                narrow = min(a, b, key=lambda box: box.w)
                x = narrow.x + narrow.w / 2
                start, end = (a.y + a.h + 2, b.y - 3) if a.y < b.y else (a.y - 2, b.y + b.h + 3)
                self.line(f"M{x:g} {start:g} V{end:g}")

    def legend(self, note: str = "", **meanings: str) -> None:
        """At the bottom: a note, and below it what the colours mean."""
        self.label(24, self.height - 46, note, "faint", "start")
        usual, x = {"trains": "trains", "frozen": "frozen", "data": "data and rewards"}, 24
        for kind, text in (meanings or usual).items():
            place = f'x="{x}" y="{self.height - 29}" width="14" height="14" rx="3"'
            self.parts.append(f'<rect class="{kind}" {place}/>')
            self.label(x + 21, self.height - 17, text, "faint", "start")
            x += int(text_width(text)) + 48

    def svg(self, draw: Callable[["Picture"], None], title: str) -> str:
        size, view = f'width="{WIDTH}" height="{self.height}"', f"0 0 {WIDTH} {self.height}"
        draw(self)
        drawn = "\n".join(self.parts)
        return f"""<svg xmlns="http://www.w3.org/2000/svg" class="rlnb" role="img" {size} viewBox="{view}">
<title>{escape(title)}</title>
<desc>{escape(" ".join(draw.__doc__.split()))}</desc>
{STYLE}
<rect class="card" {size} rx="8"/>
{drawn}
</svg>
"""
