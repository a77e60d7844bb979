"""``make html`` on a copy: repeated, stopped, in odd places, and as it is published."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import browser
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, TUTORIALS, measures, serve

BROKEN = '"""\nBroken\n======\n\nA page that fails.\n"""\n\nprint("before")\n{}\n'
GOOD = """\"\"\"
Good {0}
============================================================

It works: {0}.
\"\"\"

print("it ran {0}")
"""
# These two are built as they are, with figures, to compare two builds.
REAL = ["batched_jacobians", "compute/torch_func_jacobians"]


def environment(**variables):
    """Return what decides how a copy is built: the caller, not a make around it."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return {**outer, "MAKELEVEL": "", **variables}


def make(copy, *arguments, **variables):
    result = subprocess.run(
        ["make", *arguments],
        cwd=copy,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout)
    return result


def content(site):
    """Return what each file of a site holds; an archive is what its members hold."""

    def read(file):
        if file.suffix != ".zip":
            return file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    files = (file for file in site.rglob("*") if file.is_file())
    return {file.relative_to(site).as_posix(): read(file) for file in files}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a repository whose tutorials are short, with its site."""
    copy = tmp_path_factory.mktemp("a copy")  # a path with a space
    for name in ("Makefile", "requirements.txt", "conf.py"):
        shutil.copy2(ROOT / name, copy)
    for name in ("docs", "examples"):
        generated = shutil.ignore_patterns("_build", "auto_examples", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=generated)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    for tutorial in set(TUTORIALS) - set(REAL):
        (copy / "examples" / f"{tutorial}.py").write_text(GOOD.format(tutorial))
    with (copy / "conf.py").open("a") as conf:
        conf.write("take_away = {}  # there are no functions to take\n")
    assert make(copy, "html").returncode == 0
    return copy


@pytest.fixture
def built(copy):
    """Return the built site, put the copy back as it was, and see the same site."""
    site = copy / "docs" / "_build" / "html"
    before = content(site)
    yield site
    for name in ("broken", "good1", "good2", "compute/my_topic"):
        (copy / "examples" / f"{name}.py").unlink(missing_ok=True)
    assert make(copy, "html").returncode == 0
    assert content(site) == before


def test_newer_configuration_runs_all_again_and_differs_in_nothing(copy, built):
    before = content(built)
    assert not any(map(measures, REAL))
    os.utime(copy / "conf.py")
    result = make(copy, "html")
    assert result.returncode == 0
    count = len(TUTORIALS)
    assert f"executed {count} out of {count}" in result.stdout
    after = content(built)
    assert set(after) == set(before)
    assert [name for name in before if before[name] != after[name]] == []


def test_second_build_runs_and_changes_nothing(copy, built):
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    result = make(copy, "html")
    assert result.returncode == 0
    assert "successfully executed 0 out of 0" in result.stdout
    assert before == {file: file.stat().st_mtime_ns for file in built.rglob("*")}


def test_broken_tutorial_stops_the_build_and_keeps_the_site(copy, built):
    script, before = copy / "examples" / "broken.py", content(built)

    def fails(line, *texts):
        script.write_text(BROKEN.format(line))
        result = make(copy, "html")
        assert result.returncode != 0
        assert all(text in result.stdout for text in texts)

    def is_mended():
        script.write_text(BROKEN.format("print('mended')"))
        assert make(copy, "html").returncode == 0
        assert "mended" in (built / "auto_examples" / "broken.html").read_text()

    place = 'examples/broken.py", line 9'
    role = "# %%\n# :no-such-role:`x`\n\nprint('after')"
    for line, *texts in [
        ("raise ValueError('it fails')", "ValueError: it fails", place),
        ("import warnings; warnings.warn('beware')", "UserWarning: beware", place),
        (role, "no-such-role", "auto_examples/broken.rst:"),
    ]:
        for _ in range(2):  # a failure stays a failure
            fails(line, *texts)
            assert content(built) == before
    is_mended()
    fails(line, *texts)
    is_mended()


def test_pattern_runs_one_tutorial(copy, built):
    for number in "12":
        (copy / "examples" / f"good{number}.py").write_text(GOOD.format(number))
    page = built / "auto_examples" / "good2.html"
    assert make(copy, "html", "PATTERN=good1").returncode == 0
    assert "it ran 1" in (built / "auto_examples" / "good1.html").read_text()
    assert "sphx-glr-script-out" not in page.read_text()
    assert make(copy, "html").returncode == 0
    assert "sphx-glr-script-out" in page.read_text()


def test_example_of_the_guide_builds(copy, built):
    guide = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    _, _, rest = guide.partition("```python\n")
    script = copy / "examples" / "compute" / "my_topic.py"
    script.write_text(rest.partition("```")[0])
    assert make(copy, "html", "PATTERN=my_topic").returncode == 0
    page = built / "auto_examples" / "compute" / "my_topic.html"
    assert "agrees with the formula" in page.read_text()


def test_published_site(copy, built, chromium):
    with serve(built, "/below/a/path") as url:
        result = make(
            copy,
            "html",
            SITE_URL=url,
            GITHUB_REPOSITORY="owner/name",
            NOTEBOOK_BRANCH="notebooks",
        )
        assert result.returncode == 0

        for tutorial in set(TUTORIALS) - set(REAL):
            page = built / "auto_examples" / f"{tutorial}.html"
            html = BeautifulSoup(page.read_text(), "html.parser")
            links = {link.text.strip(): link["href"] for link in html.select("a[href]")}
            edit = f"https://github.com/owner/name/edit/main/examples/{tutorial}.py"
            assert links["Edit on GitHub"] == edit
            colab = "https://colab.research.google.com/github/owner/name/blob"
            assert links["Open in Colab"] == f"{colab}/notebooks/{tutorial}.ipynb"
            canonical = html.find("link", rel="canonical")["href"]
            assert canonical == f"{url}auto_examples/{tutorial}.html"
            card = {meta["property"]: meta for meta in html.select("meta[property]")}
            assert card["og:title"]["content"] in html.title.text
            assert card["og:description"]["content"].startswith("It works")
            image = card["og:image"]["content"].removeprefix(url)
            assert (built / image).is_file() and image.endswith(".png")
            for listing in "sitemap.xml", "llms.txt":
                assert canonical in (built / listing).read_text()

        tab = chromium.new_page()
        failed = []
        tab.on("response", lambda r: r.status == 200 or failed.append(r.url))
        tab.goto(f"{url}no/such/page.html", wait_until="networkidle")
        assert failed == [f"{url}no/such/page.html"]
        menu = "getComputedStyle(document.querySelector('.wy-nav-side')).position"
        assert tab.evaluate(menu) == "fixed"
        tab.get_by_role("link", name="the first page").click()
        assert tab.url == f"{url}index.html"
        tab.close()


def test_site_built_elsewhere_has_no_dead_ends(copy, built):
    assert make(copy, "html", GITHUB_REPOSITORY="").returncode == 0
    text = (built / "auto_examples" / "batched_jacobians.html").read_text()
    assert "Open in Colab" not in text
    assert "Edit on GitHub" not in text


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_build_is_begun_anew(stop, copy, built):
    before = content(built)
    script = copy / "examples" / "broken.py"
    script.write_text(BROKEN.format("# %%\n# :no-such-role:`x`\n\nprint('after')"))
    with subprocess.Popen(
        ["make", "html"],
        cwd=copy,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as build:
        next(line for line in build.stdout if "checking consistency" in line)
        os.killpg(build.pid, stop)
    assert build.returncode != 0
    with open(copy / "docs" / "_build" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the last process of the build lets it go
    result = make(copy, "html")
    assert result.returncode != 0
    assert "no-such-role" in result.stdout
    assert content(built) == before


def test_two_builds_at_once_are_refused_in_one_line(copy, built):
    with open(copy / "docs" / "_build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = make(copy, "html")
        assert result.returncode != 0
        assert result.stdout.startswith("make: another make builds in this folder.")
        assert "Traceback" not in result.stdout


@pytest.fixture
def bare(tmp_path):
    """Return a folder with what installs the environment, and no environment."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    return tmp_path


def first_line(folder, *arguments, **variables):
    """Return the first line that a failing make itself says."""
    result = make(folder, "html", *arguments, **variables)
    assert result.returncode != 0
    said = [line for line in result.stdout.splitlines() if line.startswith("make: ")]
    return said[0]


def test_no_network_is_said_in_one_line(bare):
    options = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    expected = "make: could not install requirements.txt. Is there a network?"
    assert first_line(bare, **options) == expected


def test_old_python_is_said_in_one_line(bare):
    expected = "make: false is not Python 3.11 or newer."
    assert first_line(bare, "PYTHON=false") == expected


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_environment_whose_python_is_gone_or_old_is_named(python, bare):
    (bare / ".venv" / "bin").mkdir(parents=True)
    (bare / ".venv" / "bin" / "python").symlink_to(python)
    (bare / ".venv" / "installed").touch()
    way_out = "make: .venv has no Python 3.11 or newer that runs. Try: rm -rf .venv"
    assert first_line(bare) == way_out


def test_environment_without_pip_is_named(bare):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare / ".venv"])
    broken = "make: .venv/bin/python -m pip does not run."
    assert first_line(bare) == f"{broken} Install it or try: rm -rf .venv"


def test_another_python_than_that_of_the_environment_is_named(bare):
    (bare / ".venv").symlink_to(ROOT / ".venv")
    expected = "make: .venv was made with another Python than echo. Try: rm -rf .venv"
    assert first_line(bare, "PYTHON=echo") == expected


@pytest.mark.parametrize(
    ("person", "ci", "answer", "expected"),
    [
        (False, "", "no one answers", True),
        (True, "true", "no one answers", True),
        (True, "", "y", True),
        (True, "", "", False),
        (True, "", "no", False),
    ],
)
def test_a_person_is_asked_before_a_browser_is_installed(
    person, ci, answer, expected, monkeypatch
):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("sys.stdin.isatty", lambda: person, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert browser.agreed() == expected


def test_nothing_generated_is_tracked():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    generated = ("docs/_build/", "docs/auto_examples/", ".venv/")
    assert [name for name in tracked if name.startswith(generated)] == []
