"""Neo4j Browser as a person uses it: log in, drop files on its window, run saved queries, look at the graph.

    python -m tests.neo4j_browser BOLT DIR      takes the screenshots of docs/browser.md from a running server

The password is NEO4J_PASSWORD. Whatever Browser asks of other hosts (fonts, usage statistics) is refused.
"""

import base64
import os
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from atlas.store import connect
from atlas.views import chromium
from queries.browser import ARCHIVE, FOLDERS, STYLE, browser_address, write_files

MILLISECONDS = 120_000  # that a step may take on a busy machine

_FILE = """([name, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
  return transfer;
}"""


def open_page(browser: Browser, address: str) -> Page:
    """Browser's first page; it reaches no host but its own."""
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.set_default_timeout(MILLISECONDS)
    own = (address.removesuffix("/browser/"), "data:", "blob:")
    page.route(lambda url: not url.startswith(own), lambda route: route.abort())
    page.goto(address)
    return page


def log_in(page: Page, password: str) -> None:
    """Fill in the form, and turn off that Browser draws edges which a query did not return."""
    page.get_by_test_id("bolt-scheme-select").select_option("bolt://")
    page.get_by_test_id("username").fill("neo4j")
    page.get_by_test_id("password").fill(password)
    page.get_by_test_id("connect").click()
    page.get_by_text("You are connected").wait_for()
    page.locator(".monaco-editor").first.click()
    page.keyboard.type(":config autoComplete: false")
    _run(page)


def drop(page: Page, file: Path) -> None:
    """Drop a file on the window, as from a file manager."""
    data = base64.b64encode(file.read_bytes()).decode()
    page.dispatch_event(".filedrop", "drop", {"dataTransfer": page.evaluate_handle(_FILE, [file.name, data])})


def import_files(page: Page, folder: Path) -> None:
    """Drop the style and the saved queries, and open the drawer that shows them."""
    drop(page, folder / STYLE)
    page.get_by_test_id("styleResetButton").wait_for()
    drop(page, folder / ARCHIVE)
    page.get_by_test_id("navigationFavorites").click()
    page.get_by_test_id(f"expandFolder-{FOLDERS[0]}").click()


def run_saved(page: Page, title: str) -> Locator:
    """Open a saved query by its title and run it; the frame with what it found."""
    page.get_by_test_id(f"scriptTitle-{title}").click()
    expect(page.locator(".monaco-editor").first).to_contain_text(title)
    return _run(page)


def _run(page: Page) -> Locator:
    frames = page.get_by_test_id("frame")
    before = frames.count()
    page.get_by_test_id("editor-Run").click()
    expect(frames).to_have_count(before + 1)
    return frames.first


def _take_screenshots(bolt: str, folder: Path) -> None:
    with connect(bolt, create=False) as store:
        address = browser_address(store)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as files:
        browser = playwright.chromium.launch(executable_path=chromium.executable(), args=["--no-sandbox"])
        page = open_page(browser, address)
        log_in(page, os.environ["NEO4J_PASSWORD"])
        write_files(Path(files))
        import_files(page, Path(files))
        for title in ("One circuit", "Features of one task", "What feeds one feature", "Why a head looks there"):
            frame = run_saved(page, title)
            frame.locator("svg g.node").first.wait_for()
            if (panel := frame.get_by_label("Collapse the node properties display")).is_visible():
                panel.click()  # it stays closed in the frames that follow
            page.wait_for_timeout(5000)  # until the nodes stand still
            frame.get_by_label("zoom-to-fit").click()
            page.wait_for_timeout(1000)
            target = page if title == "One circuit" else frame
            target.screenshot(path=folder / f"browser-{title.lower().replace(' ', '-')}.png")
        browser.close()


if __name__ == "__main__":
    _take_screenshots(sys.argv[1], Path(sys.argv[2]))
