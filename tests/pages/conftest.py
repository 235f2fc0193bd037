"""A real browser, in which the pages are tested."""

import os
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window; tests of pages are skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open an address; after the test there must be no error on the console, and no request that left the page.

    What is served at the address may be asked for again.
    """
    contexts = []
    problems = []

    def open_page(address, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if leaves(request.url, address) else None)
        page.goto(str(address))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def leaves(url, address):
    """Return whether a request is to anything but the page itself."""
    return not url.startswith("data:") and url != str(address) and not url.startswith(f"{address}data?")
