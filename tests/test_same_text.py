"""What tutorials share has one text, what is long is folded, and a fold has a title."""

import ast
import re

import pytest
from conftest import EXAMPLES, TUTORIALS
from sphinx_gallery.py_source_parser import split_code_and_text_blocks

FOLD = re.compile(r"# *fold\b", re.IGNORECASE)
TITLED = re.compile(r"# fold: \S.*")
LIMIT = 40  # lines of code of a cell that is not folded
LONG = {  # tutorial: the longest cell, and why
    "scale/layer_structure": (41, "the core, whole"),
}


def definitions(script):
    """Yield the name and the text, with decorators, of each top-level definition."""
    lines = script.splitlines()
    for node in ast.parse(script).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min(part.lineno for part in (node, *node.decorator_list))
            yield node.name, "\n".join(lines[start - 1 : node.end_lineno])


def different(scripts):
    """Return ``{name: {text: tutorials}}`` of what is defined in more than one way."""
    texts = {}
    for tutorial, script in scripts.items():
        for name, text in definitions(script):
            texts.setdefault(name, {}).setdefault(text, []).append(tutorial)
    return {name: by_text for name, by_text in texts.items() if len(by_text) > 1}


def cells(tutorial):
    """Return the code cells of a tutorial."""
    _, blocks = split_code_and_text_blocks(str(EXAMPLES / f"{tutorial}.py"))
    return [block.content.strip("\n") for block in blocks if block.type == "code"]


def code(cell):
    """Return the lines of a cell that are neither empty nor a comment."""
    lines = (line.strip() for line in cell.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def misplaced(cell):
    """Return the comments on folding that are not a first line with a title."""
    first, *rest = cell.splitlines()
    bad = [line for line in rest if FOLD.match(line.strip())]
    return bad + [first] * bool(FOLD.match(first) and not TITLED.fullmatch(first))


def test_same_name_has_the_same_text_on_all_pages():
    scripts = {name: (EXAMPLES / f"{name}.py").read_text() for name in TUTORIALS}
    found = different(scripts)
    assert {name: list(by_text.values()) for name, by_text in found.items()} == {}


FIRST = '@decorated\ndef f(x):\n    """Return x."""\n    return x\n'


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (FIRST, set()),
        (FIRST + "\n\ndef g(x):\n    return f(x)\n", set()),
        ("class A:\n    def f(self):\n        pass\n", set()),
        (FIRST.replace("Return x", "Give x"), {"f"}),
        (FIRST.replace("@decorated", "@other"), {"f"}),
        (FIRST.replace("    return x", "    return x  # as it is"), {"f"}),
        ("class f:\n    pass\n", {"f"}),
    ],
)
def test_comparison_of_texts_sees_each_difference(second, expected):
    assert set(different({"one": FIRST, "two": second})) == expected
    # The same within one script: a later definition replaces the earlier.
    assert set(different({"one": FIRST + "\n\n" + second})) == expected


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_fold_is_the_first_line_of_its_cell_and_has_a_title(tutorial):
    assert [line for cell in cells(tutorial) for line in misplaced(cell)] == []


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        ("# fold: How it is drawn\nx = 1", 0),
        ("x = 1", 0),
        ("# fold:\nx = 1", 1),
        ("# fold\nx = 1", 1),
        ("#fold: Title\nx = 1", 1),
        ("# Fold: Title\nx = 1", 1),
        ("x = 1\n# fold: Title", 1),
        ("for x in y:\n    # fold: Title\n    x()", 1),
    ],
)
def test_misplaced_fold_is_seen(cell, count):
    assert len(misplaced(cell)) == count


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_cell_that_is_not_folded_is_short(tutorial):
    limit, _ = LONG.get(tutorial, (LIMIT, ""))
    shown = [cell for cell in cells(tutorial) if not FOLD.match(cell)]
    long = [code(cell) for cell in shown if len(code(cell)) > limit]
    assert [(lines[0], len(lines)) for lines in long] == []
