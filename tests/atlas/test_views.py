"""Pictures, in a real headless Chromium."""

import pytest
from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def test_the_browser_is_there(browser: Browser) -> None:
    assert browser.is_connected()
