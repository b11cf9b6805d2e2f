"""The README's picture: the first screen of the demo's report, as Chromium shows it.

``python -m tests.docs.picture REPORT PICTURE``
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.e2e.browser import CHROMIUM, started

WIDTH, HEIGHT, SCALE = 1200, 1010, 1.5


def take_picture(report: Path, picture: Path) -> None:
    """Write a PNG of one and a half as many pixels each way.

    Raises:
        SystemExit: Chromium is not installed.
    """
    if CHROMIUM is None:
        raise SystemExit("Chromium is not installed (apt-get install chromium)")
    with started() as browser:
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(report.resolve().as_uri())
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=picture)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
