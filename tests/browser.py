"""A page in a real Chromium: what its layout is at some width, and what it complains of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def measured(page: str, width: int, expression: str, folder: Path) -> tuple[Any, str]:
    """Return an expression's value in a page that is so wide, and what the browser wrote to its console.

    The page is in a frame: a window of Chromium is at least 500 pixels wide. In the expression, `page` is its window.
    """
    around = folder / f"around-{width}.html"
    around.write_text(
        f'<title>none</title><iframe width="{width}" height="900" style="border: 0" srcdoc="{escape(page)}"></iframe>'
        "<script>const frame = document.querySelector('iframe');"
        " frame.onload = () => { const page = frame.contentWindow;"
        f" document.title = JSON.stringify({expression}); }};</script>",
        "utf-8",
    )
    found, console = dumped(around.as_uri())
    title = re.search(r"(?s)<title>(.*?)</title>", found)
    assert title is not None and title[1] != "none", found[:500]
    return json.loads(unescape(title[1])), console


def dumped(address: str) -> tuple[str, str]:
    """Return the document at an address as it stands when its scripts have run, and what stands in the console."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server",
               "--enable-logging=stderr", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom",
               address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
