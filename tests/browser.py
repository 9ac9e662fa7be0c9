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
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", "--window-size=1400,1000", "--dump-dom", around.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"(?s)<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] != "none", done.stdout[:500]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(unescape(title[1])), console
