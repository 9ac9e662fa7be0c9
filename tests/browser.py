"""A page in a real Chromium: what its layout is at some width, and what it complains of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

# The least contrast of a text with what it stands on, as WCAG 2 counts it, and the text.
CONTRAST = """(() => {
    const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = el => {
        for (; el; el = el.parentElement) {
            const found = parts(page.getComputedStyle(el).backgroundColor);
            if (found.length === 3 || found[3] === 1) return found;
        }
        return [255, 255, 255];
    };
    let least = [99, ""];
    for (const el of page.document.querySelectorAll("body *")) {
        const own = [...el.childNodes].filter(one => one.nodeType === 3).map(one => one.textContent.trim()).join("");
        if (!own || !el.getClientRects().length || ["SCRIPT", "STYLE", "OPTION"].includes(el.tagName)) continue;
        const style = page.getComputedStyle(el);
        const shades = [light(parts(el.closest("svg") ? style.fill : style.color)), light(ground(el))];
        const found = (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
        if (found < least[0]) least = [found, own.slice(0, 40)];
    }
    return least;
})()"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def measured(page: str, width: int, expression: str, folder: Path, dark: bool = False) -> tuple[Any, str]:
    """Return an expression's value in a page that is so wide, and what the browser wrote to its console.

    The page is in a frame: a window of Chromium is at least 500 pixels wide. In the expression, `page` is its window.
    """
    around = folder / f"around-{width}.html"
    around.write_text(
        f'<title>none</title><iframe width="{width}" height="740" style="border: 0" srcdoc="{escape(page)}"></iframe>'
        "<script>const frame = document.querySelector('iframe');"
        " frame.onload = () => { const page = frame.contentWindow;"
        f" document.title = JSON.stringify({expression}); }};</script>",
        "utf-8",
    )
    found, console = dumped(around.as_uri(), dark)
    title = re.search(r"(?s)<title>(.*?)</title>", found)
    assert title is not None and title[1] != "none", found[:500]
    return json.loads(unescape(title[1])), console


def dumped(address: str, dark: bool = False) -> tuple[str, str]:
    """Return the document at an address as it stands when its scripts have run, and what stands in the console."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server",
               "--enable-logging=stderr", "--window-size=1400,1000", "--virtual-time-budget=5000",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
