"""The questions page: its lines run, and the errors that it names are raised."""

import re
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import ROOT, SITE

SOURCE = (ROOT / "docs" / "questions.rst").read_text()
FIRST, *ENTRIES = re.split(r"\n(?=[^\n]+\n-{5,}\n)", SOURCE)
START = re.search(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", FIRST)[1]
TITLES = [entry.partition("\n")[0] for entry in ENTRIES]


def blocks(directive, entry):
    found = re.findall(rf"\.\. {directive}\n\n?((?:   .*\n|\n)+)", entry + "\n")
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def start(monkeypatch):
    """Return the names that the page starts from, with the downloads at hand."""
    monkeypatch.setattr(sys, "path", [str(SITE / "take"), *sys.path])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # as the reader's is
    torch.manual_seed(0)
    names = {"print": lambda *values: None}
    exec(textwrap.dedent(START), names)
    yield names
    torch.set_default_dtype(before)


@pytest.mark.parametrize("entry", ENTRIES, ids=TITLES)
def test_lines_run(entry, start):
    fastpath = torch.backends.mha.get_fastpath_enabled()
    precision = torch.get_float32_matmul_precision()
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for block in blocks("code-block:: python", entry):
            exec(block, start)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allowed


RAISING = [entry for entry in ENTRIES if "\n.. raises:" in entry]


@pytest.mark.parametrize(
    "entry", RAISING, ids=[entry.partition("\n")[0] for entry in RAISING]
)
def test_error_has_the_text_of_the_title(entry, start):
    title = entry.partition("\n")[0]
    own = re.search(r"\.\. raises: (.+)", entry)
    quoted = re.search(r"``(?:\w*(?:Error|Warning): )?([^`].*?)``(?:$| )", title)
    text = own[1] if own else quoted[1] if quoted else ""
    (code,) = blocks(r"raises:[^\n]*", entry)
    with warnings.catch_warnings(action="error"), pytest.raises(Exception) as error:
        exec(code, start)
    assert text in f"{error.type.__name__}: {error.value}", str(error.value)
    if kind := re.search(r"``(\w*(?:Error|Warning)): ", title):
        assert error.type.__name__ == kind[1]


def test_every_error_in_a_title_is_raised():
    silent = {
        "Batching rule not implemented for aten::_nested_tensor_from_mask",
        "There is a performance drop because",
    }
    for entry in ENTRIES:
        title = entry.partition("\n")[0]
        if re.search(r"(Error|Warning): ", title) and entry not in RAISING:
            assert any(text in title for text in silent), title
