"""A reader in a real browser: JupyterLab, headless Chromium, one notebook from opening it to labelling.

python -m rlnb test browser

The tests go through one session in the order of this file. Pictures of each stop are in html/browser.
"""

import re
import time

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.lab import (
    ROOT, SLOW, button, chromium, fill, jupyterlab, menu, run_all, serious, shot, slider, status, table_rows,
)  # fmt: skip

CELLS = (  # behind the notebook's own, the last of which is its panel
    "from rlnb.train import responses\nrows = responses(SEED)",
    'from rlnb.show.labelling import label\nlabel(rows, annotator="anna", path="labels")',
    "6 * 7",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A copy of a notebook with some cells behind it."""
    notebook = nbformat.read(ROOT / "notebooks" / "02_sft.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    with jupyterlab(tmp_path_factory.mktemp("lab"), notebook) as address, chromium(address, "at_the_end") as page:
        yield page


# --- the session ---------------------------------------------------------------------------------


def test_a_notebook_runs_from_top_to_bottom(page):
    run_all(page)
    shot(page, "1_all_cells_ran")


def test_the_panel_shows_its_knobs_and_the_runs_of_this_notebook(page):
    panel = page.locator(".jp-OutputArea", has=page.locator(".rlnb-runs"))
    panel.scroll_into_view_if_needed()
    for name in ("rank", "alpha", "max_lora_rank", "learning rate", "max steps", "batch size", "seed"):
        expect(page.locator(".widget-label", has_text=re.compile(f"^{name}$"))).to_be_visible()
    expect(panel.locator("img[alt^=loss]").first).to_be_visible()
    expect(page.locator(".jp-RenderedImage img").last).to_be_visible()  # the figure above it
    assert table_rows(page) == 2  # of the notebook's own cells
    status(page, re.compile(r"trains 299,008 parameters"))
    status(page, re.compile(r"alpha / r = 32 / 16 = 2"))
    shot(page, "2_panel")


def test_moving_the_sliders_moves_the_forecast(page):
    handle, readout = slider(page, "rank")
    expect(readout).to_have_text("16")
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text("32")
    status(page, re.compile(r"trains 598,016 parameters"))
    handle, readout = slider(page, "learning rate")
    before = readout.inner_text()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 30, box["y"] + 5, steps=8)
    page.mouse.up()
    expect(readout).not_to_have_text(before)
    assert float(readout.inner_text()) < float(before)
    shot(page, "3_sliders_moved")


def test_an_invalid_rank_says_so_and_cannot_run(page):
    handle, _ = slider(page, "rank")
    handle.focus()
    page.keyboard.press("End")
    status(page, "LoRA rank 128 is above max_lora_rank 64")
    expect(button(page, "Run")).to_be_disabled()
    shot(page, "4_invalid_rank")
    page.locator(".widget-dropdown select").select_option("128")
    expect(button(page, "Run")).to_be_enabled()
    button(page, "Reset").click()
    expect(slider(page, "rank")[1]).to_have_text("16")


def test_a_run_draws_its_curve_and_lands_in_the_table(page):
    fill(page, "max steps", "31")
    button(page, "Run").click()
    began = time.perf_counter()
    expect(page.locator(".jupyter-widgets progress")).to_be_visible()
    print(f"\nfirst point after {time.perf_counter() - began:.1f} s")
    expect(button(page, "Run")).to_be_disabled()
    shot(page, "5_running")
    expect(page.locator("text=/^Done in/")).to_be_visible(timeout=SLOW)
    assert re.search(r"Held out: [\d.]+ % \[", page.locator("text=/^Done in/").inner_text())
    assert table_rows(page) == 3
    expect(page.locator(".rlnb-runs").locator("text=/max steps 31/").first).to_be_visible()
    shot(page, "6_done")


def test_stop_keeps_the_run_and_the_kernel_answers_meanwhile(page):
    fill(page, "max steps", "512")
    button(page, "Run").click()
    expect(page.locator(".jupyter-widgets progress")).to_be_visible()
    last = page.locator(".jp-CodeCell").last
    last.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("40 + 4")
    page.keyboard.press("Control+Enter")
    expect(last.locator(".jp-OutputArea-output")).to_have_text("44")
    expect(button(page, "Stop")).to_be_enabled()
    button(page, "Stop").click()
    expect(page.locator("text=/^Stopped at step/")).to_be_visible()
    expect(page.locator("text=/^interrupted$/")).to_be_visible()
    assert table_rows(page) == 4
    shot(page, "7_stopped")


def test_a_page_that_is_closed_loses_nothing(page):
    menu(page, "File", "Save Notebook")
    fill(page, "max steps", "128")
    button(page, "Run").click()
    expect(page.locator(".jupyter-widgets progress")).to_be_visible()
    page.reload()
    page.locator(".jp-Notebook").wait_for(timeout=SLOW)
    expect(page.locator("text=/^Done in/")).to_be_attached(timeout=SLOW)
    page.locator("text=/^Done in/").scroll_into_view_if_needed()
    assert table_rows(page) == 5
    shot(page, "9_after_reload")


def test_three_pairs_are_labelled_by_click_and_by_key(page):
    keys = page.get_by_placeholder(re.compile("click here and type"))
    keys.scroll_into_view_if_needed()
    button(page, "Left").click()
    status(page, "1 of")
    keys.click()
    for number, letter in ((2, "r"), (3, "t")):
        page.keyboard.type(letter)
        status(page, f"{number} of")
        expect(keys).to_have_value("")
    assert serious(page, ".jupyter-widgets") == []
    shot(page, "10_labelled")


def test_it_reads_in_the_dark(page):
    menu(page, "Settings", "Theme", "JupyterLab Dark")
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    page.locator(".rlnb-runs").scroll_into_view_if_needed()
    time.sleep(1)
    assert serious(page, ".jupyter-widgets") == []
    shot(page, "11_dark")
