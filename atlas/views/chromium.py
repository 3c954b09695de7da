"""The browser that draws pictures without a window: Chromium, or any browser made from it.

The page itself draws the figure: opened with #svg it turns into its SVG's text, which the browser prints;
a PNG is what the browser shows of that SVG, at two pixels a unit.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote

from atlas.errors import AtlasError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
SECONDS = 120
_SVG = re.compile(r'<pre id="svg">([^<]+)</pre>')
_SIZE = re.compile(r'width="(\d+)" height="(\d+)"')


def executable() -> str | None:
    """The path of the first such browser on the search path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def svg(page: str) -> str:
    """The figure of a page (its text) as an SVG document; raises AtlasError where there is no browser."""
    with tempfile.TemporaryDirectory(prefix="atlas-picture-") as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        found = _SVG.search(_run(folder, "--dump-dom", f"{file.as_uri()}#svg"))
    if found is None:
        raise AtlasError("The browser drew no figure; open the page of --html and save the figure from there.")
    return unquote(found[1])


def png(drawn: str) -> bytes:
    """The SVG document as a PNG file's bytes; raises AtlasError where there is no browser."""
    size = _SIZE.search(drawn)
    assert size is not None
    with tempfile.TemporaryDirectory(prefix="atlas-picture-") as folder:
        file, picture = Path(folder) / "figure.svg", Path(folder) / "figure.png"
        file.write_text(drawn, encoding="utf-8")
        window = f"--window-size={size[1]},{size[2]}"
        _run(
            folder,
            f"--screenshot={picture}",
            window,
            "--force-device-scale-factor=2",
            "--hide-scrollbars",
            file.as_uri(),
        )
        if not picture.exists():
            raise AtlasError("The browser drew no PNG; take --svg, or save it from the page of --html.")
        return picture.read_bytes()


def _run(folder: str, *arguments: str) -> str:
    """What the browser prints, with a profile of its own in `folder`."""
    browser = executable()
    if browser is None:
        raise AtlasError(
            "SVG and PNG files are drawn by Chromium, and there is none here: install it, or save the figure from "
            "the page that --html writes, in any browser."
        )
    flags = ["--headless", "--disable-gpu", f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium's own sandbox does not work for root
        flags.append("--no-sandbox")
    try:
        done = subprocess.run([browser, *flags, *arguments], capture_output=True, timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise AtlasError(f"{browser} did not draw the figure within {SECONDS} seconds.") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise AtlasError(f"{browser} cannot be run; save the figure from the page that --html writes.") from error
    return done.stdout.decode("utf-8", errors="replace")
