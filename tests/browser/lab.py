"""JupyterLab of its own and a headless Chromium, and what a reader's hands do in them."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import nbformat
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "html" / "browser"
SLOW = 240_000  # milliseconds for a notebook to run on two busy cores
QUICK = 30_000  # for what a reader waits for


@contextmanager
def jupyterlab(home: Path, notebook, **environment: str) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own, in the smoke profile."""
    nbformat.write(notebook, home / "notebook.ipynb")
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
    own = {"PYTHONPATH": str(ROOT), "RLNB_RUNS": str(home / "runs"), "RLNB_PROFILE": "smoke", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | own | environment
    environment.pop("MPLBACKEND", None)  # of conftest.py, and no reader's: figures would be text
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/notebook.ipynb?token={token}"
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


@contextmanager
def chromium(address: str, last: str, **context) -> Iterator[Page]:
    """A page at an address; its last look is kept under a name. context: of Playwright's new_page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium on this machine: apt-get install chromium"
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(**{"viewport": {"width": 1400, "height": 1000}} | context)
        page.set_default_timeout(QUICK)
        page.goto(address)
        yield page
        shot(page, last)
        chromium.close()


def run_all(page: Page, timeout: int = SLOW) -> None:
    """Runs all cells, the last of which is 6 * 7."""
    page.locator(".jp-Notebook").wait_for(timeout=SLOW)
    page.locator("text=/Python 3 .*Idle/").first.wait_for(timeout=SLOW)
    menu(page, "Run", "Run All Cells")
    page.locator(".jp-Cell").first.click()
    last = page.locator(".jp-CodeCell").last
    expect(last.locator(".jp-OutputArea-output")).to_have_text("42", timeout=timeout)
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")


def serious(page: Page, *parts: str) -> list:
    """What axe calls serious or critical on a page, or in parts of it, which are CSS selectors.

    Not looked at: the handles of ipywidgets' sliders, which have no name of their own, though one stands beside them.
    """
    context = {"exclude": [[".noUi-handle"]]} | ({"include": [[part] for part in parts]} if parts else {})
    # Without preload: axe would fetch the style sheets, and a browser forbids a plain file to fetch.
    found = Axe().run(page, context=context, options={"resultTypes": ["violations"], "preload": False})
    grave = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
    return [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in grave]


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


def fill(page: Page, name: str, value: str) -> None:
    """Types a number into a field."""
    field = page.locator(".widget-text", has=page.locator(f"text=/^{name}$/")).locator("input")
    field.fill(value)
    field.press("Enter")
