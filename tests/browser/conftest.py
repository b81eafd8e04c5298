"""Headless Chromium for tests that need to see what a reader sees."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1000,2000",
    "--timeout=60000",
)


def chromium_program() -> str:
    """Path of the browser; the test fails, and says what to install, when there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path is not None, "no browser found: install the Debian package chromium"
    return path


@pytest.fixture(scope="session")
def dump_dom(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """A function that opens a page in Chromium, lets its scripts run, and returns the page as it is then."""
    profile = tmp_path_factory.mktemp("chromium")

    def open_page(page: Path) -> str:
        command = [chromium_program(), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return open_page
