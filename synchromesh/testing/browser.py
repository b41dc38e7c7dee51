"""Pages as a browser shows them: what is laid out and drawn, at a width, in the light and in the dark."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--virtual-time-budget=5000",
)
# Written into a copy of the page, whose own policy runs no script.
_LOOK = """<script>
const seen = (one) => { const box = one.getBoundingClientRect(); return box.width * box.height > 0; };
const color = (one, name) => getComputedStyle(one)[name];
const parts = (text) => {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number), times = text.startsWith("color(srgb") ? 255 : 1;
  return [r * times, g * times, b * times, a]; };
const behind = (one) => {
  if (!one) return [255, 255, 255];
  const [r, g, b, a] = parts(color(one, "backgroundColor"));
  if (a === 1) return [r, g, b];
  return behind(one.parentElement).map((under, i) => a * [r, g, b][i] + (1 - a) * under); };
const texts = "h1,h2,p,th,td:not(.none),dt,dd,li,figcaption b,figcaption span,svg text,summary,.rows span:not(:empty)";
const words = [...document.querySelectorAll(texts)].filter((one) => one.textContent.trim() && seen(one));
const scale = (one) => one.closest("svg[role]") ? one.closest("svg[role]").getBoundingClientRect().width / 400 : 1;
const found = {
  width: innerWidth, content: document.documentElement.scrollWidth, title: document.title,
  outside: [...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll,pre,svg,.runs") && seen(one)
    && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80)),
  lines: Object.fromEntries([...document.querySelectorAll("figure")].map((one) => [
    one.querySelector("figcaption b")?.textContent ?? "", [...one.querySelectorAll("path.line")].filter(seen).length])),
  shapes: Object.fromEntries([...document.querySelectorAll("figure")].map((one) => [
    one.querySelector("figcaption b")?.textContent ?? "",
    [...one.querySelectorAll("rect.fill,path.fill,.runs span")].filter(seen).length])),
  words: words.map((one) => [one.textContent.slice(0, 40), parseFloat(color(one, "fontSize")) * scale(one),
    one.namespaceURI.endsWith("svg") ? color(one, "fill") : color(one, "color"), `rgb(${behind(one)})`]),
  pictures: [...document.images].map((one) => one.naturalWidth),
};
parent.postMessage(JSON.stringify(found), "*");
</script>"""
# A window has a least width, what is framed in it has none.
_FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><pre id="found"></pre>
<script>addEventListener("message", (said) => { document.getElementById("found").textContent = said.data; });</script>
<iframe style="width:%dpx;height:3000px;border:0" srcdoc="%s"></iframe>
"""


def find_browser() -> str | None:
    """Return the path of a Chromium; None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass(frozen=True)
class Browser:
    """A Chromium.

    Attributes:
        path: of the program.
    """

    path: str

    def laid_out(self, page: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
        """Return what a reader sees of a page.

        width, content   of the window, and of what is in it, pixels
        outside          elements that stick out of the window, but for what scrolls by itself
        lines, shapes    by the title of a figure, how many curves and filled shapes are drawn
        words            [text, pixels of its height, colour, colour behind it] of everything written
        pictures         widths of the pictures that could be read
        title            of the page
        """
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
        with tempfile.TemporaryDirectory() as folder:
            frame = Path(folder, "frame.html")
            looking = text.replace("</body>", f"{_LOOK}</body>")
            frame.write_text(_FRAME % (width, html.escape(looking)))
            dom = self._run(frame, ["--dump-dom"], 1400, dark).decode()
        found = re.search(r'<pre id="found">(.+?)</pre>', dom, flags=re.S)
        assert found, dom[:500]
        return json.loads(html.unescape(found[1]))

    def dom(self, page: Path) -> str:
        """Return the page as it stands after whatever script in it has run."""
        return self._run(page, ["--dump-dom"], 1200, dark=False).decode()

    def picture(self, page: Path, *, width: int, height: int, dark: bool = False) -> Image.Image:
        """Return the page as it is drawn."""
        from PIL import Image  # only here: the other looks do without

        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder, "shot.png")
            self._run(page, [f"--screenshot={shot}"], width, dark, height)
            return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")

    def _run(self, page: Path, what: list[str], width: int, dark: bool, height: int = 2000) -> bytes:
        with tempfile.TemporaryDirectory() as profile:
            scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
            options = [scheme, f"--window-size={width},{height}", f"--user-data-dir={profile}"]
            command = [self.path, *_QUIET, *options, *what, page.resolve().as_uri()]
            done = subprocess.run(command, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours `rgb(r, g, b)`, 1 to 21, as WCAG 2 defines it.

    >>> round(contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)"))
    21
    """
    first, second = sorted((_luminance(one), _luminance(other)))
    return (second + 0.05) / (first + 0.05)


def _luminance(color: str) -> float:
    red, green, blue = (float(number) / 255 for number in re.findall(r"[\d.]+", color)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
