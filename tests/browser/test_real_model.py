"""Panel and labelling in the browser on SmolLM2-135M, for one run: after `python -m rlnb fetch smollm2-135m`."""

import re

import nbformat
import pytest
from playwright.sync_api import expect

from rlnb import profiles
from rlnb.tools.notebooks import KERNELSPEC
from tests.browser.lab import SLOW, button, chromium, fill, jupyterlab, run_all, shot, status, table_rows

NAME = "smollm2-135m"
CELLS = (
    'from rlnb.show.panel import panel\n\npanel("sft", seed=0)',
    "from rlnb.show.labelling import label\nfrom rlnb.train import responses\n\n"
    'label(responses(0), annotator="anna", path="labels")',
    "6 * 7",
)

pytestmark = pytest.mark.skipif(not (profiles.models() / NAME).is_dir(), reason=f"python -m rlnb fetch {NAME}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})
    own = {"RLNB_MODEL": NAME, "RLNB_MODELS": str(profiles.models())}
    home = tmp_path_factory.mktemp("lab")
    with jupyterlab(home, notebook, **own) as address, chromium(address, "real_at_the_end") as page:
        yield page


def test_the_panel_trains_the_real_model(page):
    run_all(page, 2 * SLOW)
    fill(page, "max steps", "3")
    button(page, "Run").click()
    expect(page.locator("text=/^Done in/")).to_be_visible(timeout=2 * SLOW)
    assert re.search(r"Held out: [\d.]+ % \[", page.locator("text=/^Done in/").inner_text())
    assert table_rows(page) == 1
    shot(page, "real_1_panel")


def test_its_answers_are_labelled(page):
    keys = page.get_by_placeholder(re.compile("click here and type"))
    keys.scroll_into_view_if_needed()
    button(page, "Left").click()
    status(page, "1 of")
    shot(page, "real_2_labelled")
