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


def commands():
    """Return what installs one: Debian's package for root, or a download for others."""
    if Path("/etc/debian_version").exists() and os.geteuid() == 0:
        return [["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]]
    return [[sys.executable, "-m", "playwright", "install", "chromium"]]


def agreed():
    """Ask a person. Where none can answer, as in CI or a container, go ahead."""
    if os.environ.get("CI") or not sys.stdin.isatty():
        return True
    return input("Run this now? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__" and not find():
    print("The tests need a Chromium or Chrome, and there is none. This gets one:")
    for command in commands():
        print("   ", *command, flush=True)
    if not agreed():
        sys.exit("Nothing was installed. Install one, and run this again.")
    for command in commands():
        subprocess.run(command, check=True)
