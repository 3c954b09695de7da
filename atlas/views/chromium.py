"""The browser that draws pictures without a window: Chromium, or any browser made from it."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def executable() -> str | None:
    """The path of the first such browser on the search path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)
