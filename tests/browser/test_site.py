"""The site that `make site` builds, read in a real browser without a network, from plain files as a reader would.

python -m rlnb test browser

Pictures are in html/browser, and there external_links.txt: where pages lead to on the web, which nobody fetches here.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Page, expect

from tests.browser.lab import ROOT, SHOTS, chromium, serious, shot

SITE = ROOT / "html" / "site"
LESSON = "notebooks/05_dpo.html"
VIEWS = {"desktop": (1400, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module", autouse=True)
def build():
    """Afresh. A broken reference is a warning of Sphinx's, and any warning fails it."""
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run(["make", "site", f"PYTHON={sys.executable}"], cwd=ROOT, check=True)
    SHOTS.mkdir(parents=True, exist_ok=True)


@contextmanager
def reader(scheme: str, view: str) -> Iterator[Page]:
    """A page without a network. What it asks of one, or logs as an error or a warning, fails at the end."""
    trouble, (width, height) = [], VIEWS[view]
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": height}, "offline": True}
    with chromium("about:blank", f"site_last_{scheme}_{view}", **look) as page:
        page.on("request", lambda r: None if re.match("file:|data:|blob:", r.url) else trouble.append(r.url))
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        yield page
    assert trouble == []


def fits(page: Page) -> bool:
    """Whether nothing stands out at the side, so that a page is read by scrolling down alone."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def loaded(page: Page) -> list[str]:
    """The words of the images that came up: their alternative texts."""
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page.evaluate("[...document.images].filter(i => i.naturalWidth > 0).map(i => i.alt)")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_goes_from_the_front_page_through_a_lesson_to_the_search(scheme, view):
    with reader(scheme, view) as page:
        page.goto((SITE / "index.html").as_uri())
        expect(page.locator("h1")).to_contain_text("rlnb")
        assert fits(page) and serious(page) == []
        shot(page, f"site_front_{scheme}_{view}")
        page.locator("article a", has_text=re.compile("^05_dpo$")).first.click()
        page.wait_for_url(f"**/{LESSON}")
        words = loaded(page)
        assert len(words) == page.locator("img").count() >= 3 and all(words)
        expect(page.locator("mjx-container").first).to_be_visible()
        assert fits(page) and serious(page) == []
        page.locator("article img").first.scroll_into_view_if_needed()
        shot(page, f"site_lesson_{scheme}_{view}")
        page.locator(".related-pages .next-page").click()
        page.wait_for_url("**/06_kto.html")
        page.goto(f"{(SITE / 'search.html').as_uri()}?q=advantage")
        found = page.locator("#search-results a", has_text="GRPO: learn from trying")
        expect(found).to_be_visible()
        assert serious(page) == []
        shot(page, f"site_search_{scheme}_{view}")
        found.click()
        page.wait_for_url("**/08_grpo.html*")


def test_a_drawing_follows_the_switch_of_the_page():
    with reader("light", "desktop") as page:
        page.goto((SITE / LESSON).as_uri())
        drawing, pictures = page.locator("article img[src$='.svg']").first, []
        for theme in ("light", "dark", "light"):
            page.evaluate(f"document.body.dataset.theme = '{theme}'")
            pictures.append(drawing.screenshot())
    assert pictures[0] == pictures[2] != pictures[1]


def test_every_internal_link_leads_somewhere():
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in SITE.rglob("*.html")}
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in pages.items()}
    broken, external = [], set()
    for path, soup in pages.items():
        for tag in soup.find_all(["a", "img", "link", "script"]):
            address = tag.get("href") or tag.get("src") or ""
            if re.match(r"[a-z]+:", address):
                external.add(address)
                continue
            file, anchor = urldefrag(unquote(address))
            target = (path.parent / file.split("?")[0]).resolve() if file else path
            if not target.is_file() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{path.relative_to(SITE)}: {address}")
    assert len(pages) > 25 and broken == []
    (SHOTS / "external_links.txt").write_text("\n".join(sorted(external)) + "\n", encoding="utf-8")


def test_every_notebook_and_card_has_a_page():
    sources = [*ROOT.glob("notebooks/[!.]*.ipynb"), *ROOT.glob("notebooks/solutions/[!.]*.ipynb")]
    sources += [ROOT / "README.md", *Path(ROOT, "data").rglob("*.md"), *Path(ROOT, "tests").rglob("*.md")]
    missing = [path for path in sources if not (SITE / path.relative_to(ROOT).with_suffix(".html")).is_file()]
    assert missing == []
