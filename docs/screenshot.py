"""Make a picture of a run's dashboard: `python docs/screenshot.py runs/quickstart docs/dashboard.png`.

Needs Playwright (`pip install playwright`) and Chromium: Debian's (`apt-get install chromium`), or the one that
`playwright install chromium` fetches.
"""

import argparse
import os
import shutil

from playwright.sync_api import sync_playwright

from txl_dist.tracking.dashboard import write_dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 1280  # pixels of the page; the picture has SHARPNESS times as many
SHARPNESS = 1.5


def take(run_dir: str, picture: str, height: int, scheme: str) -> None:
    """Write the dashboard of a run, and a picture of its top."""
    address = write_dashboard(run_dir).resolve().as_uri()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(
            viewport={"width": WIDTH, "height": height}, device_scale_factor=SHARPNESS, color_scheme=scheme
        )
        page.goto(address)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", help="the run directory")
    parser.add_argument("picture", help="the PNG file to write")
    parser.add_argument("--height", type=int, default=900, help="how much of the page is shown, in its pixels")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light", help="the colours")
    given = parser.parse_args()
    take(given.run_dir, given.picture, given.height, given.scheme)
