"""A browser without a window, for tests that open pages from disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)


@contextlib.contextmanager
def browser(scratch: Path, width: int = 1280, height: int = 800) -> Iterator[Any]:
    """Start Chromium; skip where there is none, unless CLT_PLUGIN_BROWSER=required.

    Args:
        scratch: An empty folder: the profile and what is downloaded go there, under ``profile`` and ``downloads``.
        width: Of the window, in pixels.
        height: Of the window, in pixels.

    Yields:
        Selenium's driver, which records the console and every request.
    """
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        lacking = "no chromium" if chromium is None else "no chromedriver"
        message = f"{lacking}: install Debian's chromium and chromium-driver (.ci/browser does) to test the page"
        if os.environ.get("CLT_PLUGIN_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*QUIET, f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(switch)
    downloads = scratch / "downloads"
    downloads.mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        # The window has borders: what counts is what is inside.
        started.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        started.get("about:blank")
        requests(started)  # what a new window's own page asks for
        yield started
    finally:
        started.quit()


def requests(driver: Any) -> list[str]:
    """Return the address of every request since this was last asked."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def complaints(driver: Any) -> list[str]:
    """Return what the console says since this was last asked: errors, warnings and refusals of the page's policy."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]
