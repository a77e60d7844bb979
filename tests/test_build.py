"""``make html`` on a copy: repeated, interrupted by errors, and as it is published."""

import os
import runpy
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, SITE, TUTORIALS, measures, serve

BROKEN = '"""\nBroken\n======\n\nA page that fails.\n"""\n\nprint("before")\n{}\n'
GOOD = """\"\"\"
Good {0}
========================================

It works: {0}.
\"\"\"

print("it ran {0}")
"""


def make(copy, *arguments, **variables):
    # Only what the caller sets decides how the copy is built, not a make around it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    result = subprocess.run(
        ["make", *arguments],
        cwd=copy,
        env={**environment, "MAKELEVEL": "", **variables},
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


def checkout(target):
    """Copy the files of the repository, with the environment of this checkout."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")
    for source in (ROOT / name for name in names if name):
        if source.is_file():
            copy = target / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    (target / ".venv").symlink_to(ROOT / ".venv")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Return the site, built again for a newer configuration, and what make said."""
    copy = tmp_path_factory.mktemp("rebuilt")
    checkout(copy)
    for generated in ("docs/_build", "docs/auto_examples"):
        shutil.copytree(ROOT / generated, copy / generated)
    os.utime(copy / "conf.py")
    repository = runpy.run_path(str(ROOT / "conf.py"))["html_context"]["repository"]
    result = make(copy, "html", GITHUB_REPOSITORY=repository)
    assert result.returncode == 0
    return copy / "docs" / "_build" / "html", result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a repository whose tutorials are short, with its site."""
    copy = tmp_path_factory.mktemp("copy")
    checkout(copy)
    for tutorial in TUTORIALS:
        (copy / "examples" / f"{tutorial}.py").write_text(GOOD.format(tutorial))
    with (copy / "conf.py").open("a") as conf:
        conf.write("take_away = {}  # there are no functions to take\n")
    assert make(copy, "html").returncode == 0
    return copy


@pytest.fixture
def built(copy):
    """Return the built site, and put the copy back as it was."""
    yield copy / "docs" / "_build" / "html"
    for name in ("broken", "good1", "good2", "compute/my_topic"):
        (copy / "examples" / f"{name}.py").unlink(missing_ok=True)
    assert make(copy, "html").returncode == 0


def test_two_builds_differ_in_nothing_but_timings(rebuilt):
    ours, theirs = content(SITE), content(rebuilt[0])
    assert set(ours) == set(theirs)
    timed = {Path(tutorial).name for tutorial in TUTORIALS if measures(tutorial)}
    for name in ours:
        if any(Path(name).name.startswith((t, f"sphx_glr_{t}_")) for t in timed):
            continue
        if timed and name == "searchindex.js":
            continue
        assert ours[name] == theirs[name], name


def test_second_build_runs_and_changes_nothing(copy, built):
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    result = make(copy, "html")
    assert result.returncode == 0
    assert "successfully executed 0 out of 0" in result.stdout
    assert before == {file: file.stat().st_mtime_ns for file in built.rglob("*")}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("raise ValueError('it fails')", "ValueError: it fails"),
        ("import warnings; warnings.warn('beware')", "UserWarning: beware"),
        ("# %%\n# :no-such-role:`x`\n\nprint('after')", "no-such-role"),
    ],
)
def test_broken_tutorial_stops_the_build_and_keeps_the_site(copy, built, line, text):
    before = content(built)
    script = copy / "examples" / "broken.py"
    for _ in range(2):  # a failure stays a failure
        script.write_text(BROKEN.format(line))
        result = make(copy, "html")
        assert result.returncode != 0
        assert text in result.stdout
        if text.split(":")[0].endswith(("Error", "Warning")):
            assert 'examples/broken.py", line 9' in result.stdout
        else:
            assert "auto_examples/broken.rst:" in result.stdout
        assert content(built) == before
    script.write_text(BROKEN.format("print('mended')"))
    assert make(copy, "html").returncode == 0
    assert "mended" in (built / "auto_examples" / "broken.html").read_text()
    script.write_text(BROKEN.format(line))
    assert make(copy, "html").returncode != 0
    script.write_text(BROKEN.format("print('mended')"))
    assert make(copy, "html").returncode == 0
    assert "mended" in (built / "auto_examples" / "broken.html").read_text()
    script.unlink()
    assert make(copy, "html").returncode == 0
    assert content(built) == before


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


def test_configuration_runs_all_tutorials_again(rebuilt):
    count = len(TUTORIALS)
    assert f"executed {count} out of {count}" in rebuilt[1]


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

        for tutorial in TUTORIALS:
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


def test_no_network_is_said_in_one_line(copy, tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(copy / name, tmp_path)
    result = make(
        tmp_path,
        "html",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert result.returncode != 0
    said = [line for line in result.stdout.splitlines() if line.startswith("make: ")]
    assert said[0] == "make: could not install requirements.txt. Is there a network?"


def test_old_python_is_said_in_one_line(copy, tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(copy / name, tmp_path)
    result = make(tmp_path, "html", "PYTHON=false")
    assert result.returncode != 0
    assert result.stdout.startswith("make: false is not Python 3.11 or newer.\n")


def test_nothing_generated_is_tracked():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    generated = ("docs/_build/", "docs/auto_examples/", ".venv/")
    assert [name for name in tracked if name.startswith(generated)] == []
