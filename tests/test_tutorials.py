"""Each tutorial as readers run it: a downloaded script, and a notebook."""

import ast
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import EXAMPLES, ROOT, TUTORIALS, UNSTABLE, measures, parse
from nbclient import NotebookClient

RAW_REST = re.compile(r":[a-z]+:`|^\.\. |`_+(?!\w)|\)_|^:\w+:", re.MULTILINE)

UNIX = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"}

# The door, figures and timings, several processes. Of all others a kernel would run the
# same code as the script, see test_page_and_notebook_hold_the_code_of_the_script.
IN_A_KERNEL = [
    "batched_jacobians",
    "trust/silent_failures",
    "scale/distributed_jacobians",
]

tutorials = pytest.mark.parametrize("tutorial", TUTORIALS)


def notebook(tutorial):
    return nbformat.read(ROOT / "docs" / "auto_examples" / f"{tutorial}.ipynb", 4)


def page(tutorial):
    return parse(f"auto_examples/{tutorial}.html")


def lines(texts):
    """Return the lines that are not empty, without the space at their ends."""
    return [
        line.rstrip() for text in texts for line in text.splitlines() if line.strip()
    ]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Return a function that runs a script alone, once, and returns what it prints."""
    seen = {}

    def run(tutorial):
        if tutorial not in seen:
            folder = tmp_path_factory.mktemp("alone")
            script = folder / "script.py"
            script.write_bytes((EXAMPLES / f"{tutorial}.py").read_bytes())
            command = [sys.executable, "-I", "-W", "error", script.name]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert result.stderr == ""
            assert list(folder.iterdir()) == [script], "it leaves files behind"
            seen[tutorial] = result.stdout
        return seen[tutorial]

    return run


@tutorials
def test_imports_are_there_on_every_system(tutorial):
    nodes = ast.walk(ast.parse((EXAMPLES / f"{tutorial}.py").read_text()))
    nodes = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in nodes}
    assert "torch" in names and not names & UNIX


@tutorials
def test_script_runs_alone_without_a_warning(tutorial, printed):
    text = printed(tutorial)
    assert text
    assert not UNSTABLE.search(text)
    assert str(ROOT) not in text


@tutorials
def test_tutorial_checks_what_it_claims(tutorial):
    assert "assert_close" in (EXAMPLES / f"{tutorial}.py").read_text()


@tutorials
def test_tutorial_that_measures_is_built_alone(tutorial):
    script = (EXAMPLES / f"{tutorial}.py").read_text()
    alone = script.endswith("\n\n# sphinx_gallery_parallel = False\n")
    assert alone == measures(tutorial)


@pytest.mark.parametrize("tutorial", IN_A_KERNEL)
def test_notebook_runs_and_prints_the_same(tutorial, printed, tmp_path):
    book = notebook(tutorial)
    client = NotebookClient(
        book, timeout=300, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    install, *cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert install.source.startswith("%pip install")
    streams = [output for cell in cells for output in cell.outputs if "text" in output]
    assert {stream.name for stream in streams} <= {"stdout"}
    if not measures(tutorial):
        assert lines(stream.text for stream in streams) == lines([printed(tutorial)])


@tutorials
def test_notebook_has_no_raw_rest(tutorial):
    for cell in notebook(tutorial).cells:
        if cell.cell_type == "markdown":
            assert not RAW_REST.search(cell.source), cell.source


@tutorials
def test_page_prints_the_same(tutorial, printed):
    blocks = page(tutorial).select(".sphx-glr-script-out pre")
    assert blocks
    if not measures(tutorial):
        assert lines(block.text for block in blocks) == lines([printed(tutorial)])


@tutorials
def test_page_and_notebook_hold_the_code_of_the_script(tutorial):
    # The first line of a folded cell is its summary.
    parts = page(tutorial).select(
        "details.fold:not(.output) > summary, .highlight-Python pre"
    )
    code = lines("# fold: " * (p.name == "summary") + p.text for p in parts)
    cells = notebook(tutorial).cells[1:]
    assert not any("sphinx_gallery" in cell.source for cell in cells)
    assert code == lines(cell.source for cell in cells if cell.cell_type == "code")
    script = lines([(EXAMPLES / f"{tutorial}.py").read_text()])
    assert set(code) <= set(script)


@tutorials
def test_readme_lists_the_tutorial(tutorial):
    assert f"](examples/{tutorial}.py)" in (ROOT / "README.md").read_text()


@tutorials
def test_each_figure_has_a_title(tutorial):
    for image in page(tutorial).select(
        "img.sphx-glr-single-img, img.sphx-glr-multi-img"
    ):
        assert tutorial.rpartition("/")[2].replace("_", " ") != image["alt"].lower()


@tutorials
def test_code_links_to_the_libraries(tutorial):
    links = {link["href"] for link in page(tutorial).select("pre a[href]")}
    libraries = {"torch": "https://docs.pytorch.org/docs/"}
    if "from backpack" in (EXAMPLES / f"{tutorial}.py").read_text():
        libraries["backpack"] = "https://docs.backpack.pt/"
    for library, start in libraries.items():
        assert any(link.startswith(start) for link in links), library
