"""What all tests look at: the tutorials, the built site, and a browser."""

import contextlib
import functools
import http.server
import os
import re
import threading
import time
from pathlib import Path

import browser
import pytest
from bs4 import BeautifulSoup
from definitions import Definitions
from playwright.sync_api import sync_playwright
from xdist.scheduler import LoadScopeScheduling

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_WAIT_POLICY"] = "passive"  # a waiting thread leaves the core to others
os.environ["TORCH_LOGS"] = "-torch.utils.cpp_extension"  # see Makefile

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SITE = ROOT / "docs" / "_build" / "html"
# What differs from run to run or machine to machine: addresses, paths, raw warnings.
UNSTABLE = re.compile(r"0x[0-9a-f]{6}|site-packages|\.py:\d+: \w*Warning")
TUTORIALS = sorted(
    script.relative_to(EXAMPLES).with_suffix("").as_posix()
    for script in EXAMPLES.rglob("*.py")
)
PAGES = sorted(
    page.relative_to(SITE).as_posix()
    for page in SITE.rglob("*.html")
    if not page.is_relative_to(SITE / "_static")
)


def measures(tutorial):
    """Return whether a tutorial prints timings, which differ from run to run."""
    source = (EXAMPLES / f"{tutorial}.py").read_text()
    return "torch.utils.benchmark" in source or "process_time" in source


@functools.cache
def parse(page):
    """Return a page of the built site, given relative to it, to look things up in."""
    return BeautifulSoup((SITE / page).read_text(), "html.parser")


@contextlib.contextmanager
def serve(site, prefix=""):
    """Serve a site as GitHub Pages does, below a path and with its 404 page."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            if path.startswith(prefix + "/"):
                return super().translate_path(path.removeprefix(prefix))
            return str(site / "missing")

        def do_GET(self):
            # Pictures and fonts come late, as on a slow network: a page must not jump.
            if Path(self.path).suffix in (".png", ".svg", ".woff2"):
                time.sleep(0.2)
            super().do_GET()

        def end_headers(self):
            self.send_header("Cache-Control", "no-store")  # each visit is the first
            super().end_headers()

        def send_error(self, code, message=None, explain=None):
            body = (site / "404.html").read_bytes()
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    def handler(*args):
        return Handler(*args, directory=site)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def chromium():
    executable = browser.find()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def site():
    with serve(SITE) as url:
        yield url


@pytest.fixture(scope="session")
def taught():
    """Return a function that returns the names of a tutorial, see ``Definitions``."""
    return functools.cache(lambda name: Definitions(EXAMPLES / f"{name}.py"))


def pytest_collection_modifyitems(items):
    """Start with the files that take longest, and end with small pieces of work."""
    first = [
        "test_build",
        "test_active_learning",
        "test_choosing_a_method",
        "test_layer_support",
    ]
    order = [*first, "others", "test_tutorials", "test_browser"]
    place = {name: at for at, name in enumerate(order)}
    items.sort(key=lambda item: place.get(item.path.stem, place["others"]))


class Scheduling(LoadScopeScheduling):
    """Give a worker what shares work: a file, the tests of a page, or a single test."""

    def _split_scope(self, nodeid):
        file, _, test = nodeid.partition("::")
        if file.endswith("test_tutorials.py"):
            return test.partition("[")[2]
        if file.endswith("test_browser.py"):
            page = re.search(r"[\w/]+\.html", test)
            return page[0] if page else nodeid
        return file


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_sessionfinish(session):
    """Fail if anything was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.stats.get("skipped"):  # workers have no reporter
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
