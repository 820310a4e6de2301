"""Take a picture of the top of a report, for the README.

.venv/bin/python tests/browser/picture.py report.html docs/report.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import chromium


def main(report: str, picture: str) -> None:
    with chromium.running() as port:
        page = chromium.Page(port)
        page.open(Path(report), width=1400, height=860)
        page.wait("[...document.querySelectorAll('#pair canvas')].filter(c => c.width > 100)[1]")
        page.settle()
        page.screenshot(Path(picture), whole=False)
        page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
