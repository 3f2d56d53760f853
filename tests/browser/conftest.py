"""Debian's chromium, headless, and a leaking fleet for it to look at.

Without chromium these tests are skipped, and say so; with CI=true they fail instead, because there
they have to run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright import sync_api as playwright

# Real processes, as the end-to-end tests have them.
from tests.e2e.conftest import chat, cli, start_worker, url  # noqa: F401
from tests.e2e.programs import ROOT

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOKEN = "the-token-of-this-test"


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def browser(url: str) -> Iterator[playwright.Browser]:  # noqa: F811
    """A browser for one test. It comes after the server, because while the synchronous driver runs,
    this thread has a running event loop, in which nothing else can be started."""
    path = chromium()
    if path is None:
        message = "chromium is not installed (apt-get install chromium): the page is NOT tested"
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            pytest.fail(message)
        pytest.skip(message)
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    """Opens pages; whatever one of them complains about fails the test."""
    complaints: list[str] = []
    opened: list[playwright.Page] = []

    def open_one(address: str, **options: object) -> playwright.Page:
        page = browser.new_page(**{"viewport": {"width": 1360, "height": 900}, **options})
        opened.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: _note(said, complaints))
        page.goto(address)
        playwright.expect(page.locator("#link-text")).to_have_text("Live", timeout=15_000)
        return page

    yield open_one
    for page in opened:
        page.close()
    assert complaints == []


def _note(said: playwright.ConsoleMessage, complaints: list[str]) -> None:
    # A refused request is what some of the tests are about.
    if said.type == "error" and "Failed to load resource" not in said.text:
        complaints.append(said.text)


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


@pytest.fixture(scope="session")
def artefacts() -> Path:
    folder = ROOT / "artefacts"
    folder.mkdir(exist_ok=True)
    return folder
