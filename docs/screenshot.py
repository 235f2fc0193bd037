"""Make a picture of a run's dashboard, or of another page.

    python docs/screenshot.py runs/quickstart docs/dashboard.png
    python docs/screenshot.py look.html docs/look.png --token 80

Needs Playwright (`pip install playwright`) and Chromium: Debian's (`apt-get install chromium`), or the one that
`playwright install chromium` fetches.
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from txl_dist.tracking.dashboard.dashboard import write_dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 1280  # pixels of the page; the picture has SHARPNESS times as many
SHARPNESS = 1.5


def take(path: Path, picture: str, height: int, scheme: str, token: int | None) -> None:
    """Write a picture of the top of a page, or of a run's dashboard, which is made first."""
    page_file = write_dashboard(str(path)) if path.is_dir() else path
    address = page_file.resolve().as_uri()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": height}, device_scale_factor=SHARPNESS, color_scheme=scheme
        )
        page.goto(address)
        if token is not None:
            page.locator("[role=option]").nth(token).click()
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a run directory, or a page")
    parser.add_argument("picture", help="the PNG file to write")
    parser.add_argument("--height", type=int, default=900, help="how much of the page is shown, in its pixels")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light", help="the colours")
    parser.add_argument("--token", type=int, help="the token of a page of txl_dist.look that is chosen")
    take(**vars(parser.parse_args()))
