"""Find a Chromium for the tests. Run as a script, get one if there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find():
    """Return the path of a Chromium or Chrome, or ``None``."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, (*NAMES, own))), None)


if __name__ == "__main__" and not find():
    debian = Path("/etc/debian_version").exists() and os.geteuid() == 0
    commands = (
        ["apt-get update", "apt-get install -y chromium"]
        if debian
        else [f"{sys.executable} -m playwright install chromium"]
    )
    for command in commands:
        print(f"No Chromium or Chrome found, so: {command}", flush=True)
        subprocess.run(command.split(), check=True)
