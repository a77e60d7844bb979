"""A function of a tutorial is taken with what it needs, results from a whole run."""

import pytest
import torch
from definitions import Definitions

TUTORIAL = """
import math
import torch
torch.set_default_dtype(torch.float64)
print("it runs")
scale = 2
table = {"one": 1}
factors = [3]
seen = []

def double(x):
    return scale * x

def product(x):
    return x * math.prod(factors)

def third():
    return triple(1)

cases = {}
def case(function):
    cases[function.__name__] = function
@case
def good():
    pass

triple = lambda x: 3 * x
factors.append(5)
for key in table:
    seen.append(double(table[key]))
def fill(values):
    values["two"] = 2
fill(table)
"""


@pytest.mark.parametrize(
    ("ask", "answer", "runs"),
    [
        (lambda names: names["double"](4), 8, False),
        (lambda names: names["third"](), 3, False),
        (lambda names: names["scale"], 2, False),
        (lambda names: names["product"](2), 30, True),
        (lambda names: names["seen"], [2], True),
        (lambda names: names["table"], {"one": 1, "two": 2}, True),
        (lambda names: names["key"], "one", True),
        (lambda names: list(names["cases"]), ["good"], True),
    ],
)
def test_only_what_needs_a_run_runs(ask, answer, runs, tmp_path, capsys):
    script = tmp_path / "tutorial.py"
    script.write_text(TUTORIAL)
    torch.set_default_dtype(torch.float32)
    names = Definitions(script)
    assert torch.get_default_dtype() == torch.float64
    assert ask(names) == ask(names) == answer
    assert capsys.readouterr().out == "it runs\n" * runs
    with pytest.raises(KeyError):
        names["missing"]
    torch.set_default_dtype(torch.float32)
