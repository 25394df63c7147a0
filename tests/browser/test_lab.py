"""A reader in a real browser: JupyterLab, headless Chromium, one notebook from opening it to labelling.

python -m rlnb test browser

The tests go through one session in the order of this file. Pictures of each stop are in html/browser.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "html" / "browser"
NOTEBOOK = "02_sft"
CELLS = (  # behind the notebook's own, the last of which is its panel
    "from rlnb.train import responses\nrows = responses(SEED)",
    'from rlnb.show.labelling import label\nlabel(rows, annotator="anna", path="labels")',
    "6 * 7",
)
SLOW = 240_000  # milliseconds for a notebook to run on two busy cores
QUICK = 30_000  # for what a reader waits for


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A JupyterLab of its own, with a copy of a notebook and some cells behind it."""
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    nbformat.write(notebook, home / f"{NOTEBOOK}.ipynb")
    quiet = home / "s" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else it asks, in the picture
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.port": port, "ServerApp.root_dir": home, "ServerApp.ip": "127.0.0.1",
        "IdentityProvider.token": token, "ServerApp.open_browser": False,
        "ServerApp.allow_root": True, "LabApp.user_settings_dir": home / "s", "LabApp.workspaces_dir": home / "w",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RLNB_RUNS": str(home / "runs"),
        "RLNB_PROFILE": "smoke", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("MPLBACKEND", None)  # of conftest.py, and no reader's: figures would be text
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def page(address):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium on this machine: apt-get install chromium"
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(QUICK)
        page.goto(address)
        yield page
        shot(page, "at_the_end")
        chromium.close()


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")


def menu(page: Page, *names: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{names[0]}$")).click()
    for name in names[1:]:
        item = page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).last
        item.hover()
        last = item
    last.click()


def slider(page: Page, name: str):
    """A slider's handle, and what stands beside it."""
    row = page.locator(".widget-hslider", has=page.locator(f"text=/^{name}$/"))
    return row.locator(".noUi-handle"), row.locator(".widget-readout")


def button(page: Page, name: str):
    return page.locator("button.jupyter-button", has_text=re.compile(f"^{name}$"))


def status(page: Page, text: str | re.Pattern, timeout: int = QUICK) -> None:
    expect(page.locator(".jp-OutputArea").filter(has_text=text).last).to_be_visible(timeout=timeout)


def table_rows(page: Page) -> int:
    return page.locator(".rlnb-runs tr").count() - 1  # one is the head


# --- the session ---------------------------------------------------------------------------------


def test_a_notebook_runs_from_top_to_bottom(page):
    page.locator(".jp-Notebook").wait_for(timeout=SLOW)
    page.locator("text=/Python 3 .*Idle/").first.wait_for(timeout=SLOW)
    menu(page, "Run", "Run All Cells")
    page.locator(".jp-MarkdownCell").first.click()
    last = page.locator(".jp-CodeCell").last
    expect(last.locator(".jp-OutputArea-output")).to_have_text("42", timeout=SLOW)
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
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
    shot(page, "10_labelled")


def test_it_reads_in_the_dark(page):
    menu(page, "Settings", "Theme", "JupyterLab Dark")
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    page.locator(".rlnb-runs").scroll_into_view_if_needed()
    time.sleep(1)
    shot(page, "11_dark")


def fill(page: Page, name: str, value: str) -> None:
    """Types a number into a field."""
    field = page.locator(".widget-text", has=page.locator(f"text=/^{name}$/")).locator("input")
    field.fill(value)
    field.press("Enter")
