"""`make site`: every notebook with its stored outputs, README and data cards, with navigation and search.

Sphinx reads the files where they lie, myst-nb the notebooks among them, Furo draws the pages. Nothing is executed,
and a page loads nothing from the network. Furo, because one wheel holds all its styles and scripts, without a font
or a script of a CDN and without Node; Jupyter Book 2 downloads Node and its template when it first builds.
"""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
MATHJAX = Path(find_spec("mathjax").submodule_search_locations[0], "static/mathjax/es5/tex-svg.js")

project, author, html_title = "rlnb", "", "rlnb"
root_doc, language = "README", "en"
extensions = ["myst_nb"]
include_patterns = ["README.md", "notebooks/**.ipynb", "data/**.md", "tests/**.md"]
exclude_patterns = [".*", "**/.*", "html", "runs", "models", "build", "**/__pycache__"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # it would load widgets from a CDN; a widget shows its stored picture
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["static", str(MATHJAX)]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_show_sphinx = html_show_copyright = False
html_show_search_summary = False  # it would fetch pages, which a browser forbids where they are plain files
html_sourcelink_suffix = ""
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load more of MathJax


def setup(app) -> None:
    app.connect("source-read", add_contents)
    app.connect("doctree-read", name_figures)
    app.connect("html-page-context", level_captions, priority=900)  # after Furo's own
    app.connect("build-finished", copy_front_page)


def add_contents(app, name: str, text: list[str]) -> None:
    """The front page is the README and gets the sidebar's lists; its link to a folder leads to the first file."""
    if name != root_doc:
        return
    lessons, solutions = notebooks("notebooks"), notebooks("notebooks/solutions")
    cards = [path for top in ("data", "tests") for path in sorted((ROOT / top).rglob("*.md"))]
    lists = {
        "Lessons": [f"{path.stem[:2]} {title(path)} <{document(path)}>" for path in lessons],
        "Solutions": [f"{path.stem} <{document(path)}>" for path in solutions],
        "Behind them": [document(path) for path in cards],
    }
    text[0] = text[0].replace("](notebooks/solutions)", f"]({document(solutions[0])}.ipynb)")
    for caption, entries in lists.items():
        text[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```\n"])


def notebooks(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("[!.]*.ipynb"))


def document(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def title(path: Path) -> str:
    """The first line of a notebook, up to its colon."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return re.match(r"# ([^:\n]+)", "".join(cells[0]["source"]))[1]


def name_figures(app, tree) -> None:
    """A figure that code has drawn has no words of its own: its section names it, for those who hear the page."""
    from docutils import nodes

    for image in tree.findall(nodes.image):
        section = next((node for node in parents(image) if isinstance(node, nodes.section)), None)
        if not image.get("alt") and section:
            image["alt"] = f"Figure that the code above draws, in: {section.next_node(nodes.title).astext()}"


def parents(node):
    while node := node.parent:
        yield node


def level_captions(app, page, template, context, tree) -> None:
    """Furo calls the sidebar's captions headings, of no level: ARIA wants one."""
    levelled = context["furo_navigation_tree"].replace('role="heading"', 'role="heading" aria-level="2"')
    context["furo_navigation_tree"] = levelled


def copy_front_page(app, error) -> None:
    if not error:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
