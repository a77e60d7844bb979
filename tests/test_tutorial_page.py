"""The parts of a tutorial's page that its script does not have."""

import ast
import warnings

import pytest
import torch
from docutils import nodes
from docutils.core import publish_doctree
from pages import fresh_start
from tutorial import details, fold, packages

CELL = """
Title
=====

Text. {0}

.. code-block:: Python

{1}
"""


def page(code, text=""):
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    return publish_doctree(CELL.format(text, lines))


def test_first_line_becomes_the_summary():
    document = page("# fold: How x is made\n\nx = 1\n\n# fold-like comment\ny = 2")
    fold(document)
    (closed,) = document.findall(details)
    summary, block = closed
    assert summary.astext() == "How x is made"
    assert block.astext() == block.rawsource == "x = 1\n\n# fold-like comment\ny = 2"
    assert list(document.findall(nodes.literal_block)) == [block]


def test_other_cells_stay_as_they_are(caplog):
    document = page("x = 1  # fold: no\nfolded = 'fold: no'")
    before = document.pformat()
    fold(document)
    assert document.pformat() == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("code", "text"), [("x = 1\n# fold: late", ""), ("x = 1", "\n\nfold: in the text")]
)
def test_lost_fold_is_a_warning(code, text, caplog):
    fold(page(code, text))
    assert "folds nothing" in caplog.text


@pytest.mark.parametrize("count", [39, 40])
def test_long_output_is_closed(count):
    text = "\n".join(map(str, range(count)))
    output = nodes.literal_block(text, text, classes=["sphx-glr-script-out"])
    document = page("x = 1")
    document += output
    fold(document)
    closed = list(document.findall(details))
    assert [part["classes"] for part in closed] == [["output"]] * (count == 40)
    assert list(document.findall(nodes.literal_block))[1].astext() == text


def test_packages_are_named_in_one_order():
    tree = ast.parse(
        "import os.path\nimport zlib\nfrom backpack.extensions import BatchGrad\n"
        "def f():\n    import torch.func, unknown.part\n"
    )
    expected = ["torch", "backpack-for-pytorch", "unknown"]
    assert [package for _, package in packages(tree)] == expected


def test_a_warning_stops_a_tutorial_but_for_a_new_process_of_joblib():
    default = torch.get_default_dtype()
    with warnings.catch_warnings():
        fresh_start({}, "")
        stopped = "A worker stopped while some jobs were given to the executor."
        warnings.warn(stopped, stacklevel=1)
        with pytest.raises(UserWarning, match="an array with one element"):
            warnings.warn("an array with one element", stacklevel=1)
    torch.set_default_dtype(default)
