"""The files to take away: imported as a reader would, and how they are made."""

import ast
import os
import re
import runpy
import subprocess
import sys
import textwrap

import pytest
from conftest import EXAMPLES, ROOT, SITE, parse
from take_away import module

TAKE_AWAY = runpy.run_path(str(ROOT / "conf.py"))["take_away"]
RUFF = [sys.executable, "-m", "ruff"]

files = pytest.mark.parametrize("name", TAKE_AWAY)


@files
def test_file_imports_alone_and_does_nothing(name, tmp_path):
    (tmp_path / f"{name}.py").write_bytes((SITE / "take" / f"{name}.py").read_bytes())
    _, functions = TAKE_AWAY[name]
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(tmp_path)!r})
        state = torch.random.get_rng_state(), torch.get_default_dtype()
        before = torch.is_grad_enabled(), torch.get_num_threads()
        from {name} import {", ".join(functions)}
        assert torch.equal(state[0], torch.random.get_rng_state())
        assert torch.get_default_dtype() == state[1] == torch.float32
        assert before == (torch.is_grad_enabled(), torch.get_num_threads())
        assert all(map(callable, [{", ".join(functions)}]))
        held = vars(sys.modules[{name!r}]).values()
        assert not any(isinstance(value, torch.Tensor) for value in held)
    """
    command = [sys.executable, "-I", "-B", "-W", "error", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert [result.returncode, result.stdout, result.stderr] == [0, "", ""]
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.py"]


def test_plan_writes_nothing_to_stderr():
    code = """
        import sys, torch
        sys.path.insert(0, "take")
        from memory_plan import memory_plan
        memory_plan(torch.nn.Linear(3, 2), torch.rand(4, 3), 1e6)
    """
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    command = [sys.executable, "-B", "-W", "error", "-c", textwrap.dedent(code)]
    options = {"cwd": SITE, "env": environment, "text": True}
    result = subprocess.run(command, capture_output=True, **options)
    assert [result.returncode, result.stdout, result.stderr] == [0, "", ""]


def test_error_bars_run_as_a_reader_imports_them():
    code = """
        import sys, torch
        sys.path.insert(0, "take")
        from error_bars import error_bars
        from laplace_softmax import laplace_softmax, softmax_ggn
        model, X, X_new = torch.nn.Linear(4, 3), torch.rand(9, 4), torch.rand(5, 4)
        sd, fit = error_bars(model, X, torch.rand(9, 3), X_new)
        p = laplace_softmax(model, softmax_ggn(model, X), X_new, precision=1.0)
        assert sd.shape == p.shape == (5, 3) and sd.dtype == p.dtype == torch.float32
        assert (sd > fit.alpha_ ** -0.5).all()
        torch.testing.assert_close(p.sum(1), torch.ones(5))
    """
    command = [sys.executable, "-B", "-W", "error", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=SITE, capture_output=True, text=True)
    assert [result.returncode, result.stdout, result.stderr] == [0, "", ""]


@files
def test_linters_find_nothing(name):
    file = SITE / "take" / f"{name}.py"
    config = ["--config", str(ROOT / "tests" / "ruff.toml"), "--no-cache"]
    for command in ["check"], ["format", "--check"]:
        result = subprocess.run([*RUFF, *command, *config, file], capture_output=True)
        assert result.returncode == 0, result.stdout.decode()


@files
def test_file_holds_the_text_of_the_tutorial(name):
    text = (SITE / "take" / f"{name}.py").read_text()
    tutorial, _ = TAKE_AWAY[name]
    source = (EXAMPLES / f"{tutorial}.py").read_text()
    docstring, *statements = ast.parse(text).body
    assert tutorial in docstring.value.value
    assert "PyTorch 2.9" in docstring.value.value
    definitions = [s for s in statements if not hasattr(s, "names")]
    assert all(ast.get_source_segment(text, s) in source for s in definitions)


@files
def test_page_links_the_file_below_its_title_and_above_the_first_function(name):
    tutorial, functions = TAKE_AWAY[name]
    html = parse(f"auto_examples/{tutorial}.html")
    link = html.select_one(f"#take-{name} a[download]")
    file = SITE / "auto_examples" / tutorial / ".." / link["href"]
    assert file.resolve() == (SITE / "take" / f"{name}.py").resolve()
    count = len(file.resolve().read_text().splitlines())
    assert f"{name}.py ({count} lines, needs torch" in html.text
    assert html.select_one(f'.byline a[download]:-soup-contains("{name}.py")')
    holds_one = re.compile(rf"^def ({'|'.join(functions)})\(", re.MULTILINE).search
    cell = next(cell for cell in html.select("pre") if holds_one(cell.text))
    assert cell.find_previous("p", class_="take-away")["id"] == f"take-{name}"
    assert all(f"def {function}(" in html.text for function in functions)


SOURCE = '''
import copy  # unused
import os.path
import torch
from torch import (
    autograd,
    nn,
)

print("at work")
N = 3
# %%
# Text of the page.
#
# More text.
# Only this comment is the function's.
LIMITS = {"a": os.path.sep}  # kept
SIZE: int = 2


def helper(x, N, module=nn.Module):
    return [size for size in x]


# %%
class Base: ...


# fold: Not part of it
@torch.no_grad()
def wanted(x: Base, limit=LIMITS):
    """Read no ``N`` of the module."""

    def inner():
        N = len(x)
        return N, helper(x, SIZE)

    return inner


def unwanted():
    return copy, wanted, autograd


for twice in range(2):
    pass
twice = 3


def broken():
    return twice
'''


def test_module_has_what_the_function_reaches_and_nothing_else():
    assert module(SOURCE, ["wanted"], "# From a page.\n") == textwrap.dedent('''\
        # From a page.

        import os.path

        import torch
        from torch import nn

        LIMITS = {"a": os.path.sep}  # kept
        SIZE: int = 2


        def helper(x, N, module=nn.Module):
            return [size for size in x]


        class Base: ...


        @torch.no_grad()
        def wanted(x: Base, limit=LIMITS):
            """Read no ``N`` of the module."""

            def inner():
                N = len(x)
                return N, helper(x, SIZE)

            return inner
        ''')


def test_comment_right_above_comes_along():
    source = "x = 1\n\n\n# Why f is as it is,\n# in two lines.\ndef f():\n    pass\n"
    assert module(source, ["f"], "") == "\n\n" + source.partition("\n\n\n")[2]


def test_long_import_is_wrapped_as_the_formatter_does(tmp_path):
    names = [f"a_name_of_some_length_{i}" for i in range(4)]
    source = f"from m import ({', '.join(names)}, other)\n"
    source += f"def f():\n    return {', '.join(names)}\n"
    file = tmp_path / "wrapped.py"
    file.write_text(module(source, ["f"], '"""."""\n'))
    assert "(\n    a_name_of_some_length_0,\n" in file.read_text()
    assert "other" not in file.read_text()
    subprocess.run([*RUFF, "check", "--select", "F,I", file], check=True)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("missing", "defines no function 'missing'"),
        ("SIZE", "defines no function 'SIZE'"),
        ("broken", "has nothing to take along that defines 'twice'"),
    ],
)
def test_what_cannot_be_taken_is_an_error(function, text):
    with pytest.raises(LookupError, match=text):
        module(SOURCE, [function], "")


def test_name_with_two_meanings_is_an_error():
    source = "a = 1\na = 2\n\n\ndef f():\n    return a\n"
    with pytest.raises(LookupError, match="defines 'a' more than once"):
        module(source, ["f"], "")
