"""The questions page: its lines run, and the errors that it names are raised."""

import os
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import ROOT, SITE
from torch import nn
from torch.testing import assert_close

SOURCE = (ROOT / "docs" / "questions.rst").read_text()
FIRST, *ENTRIES = re.split(r"\n(?=[^\n]+\n-{5,}\n)", SOURCE)
START = re.search(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", FIRST)[1]
TITLES = [entry.partition("\n")[0] for entry in ENTRIES]


def blocks(directive, entry):
    found = re.findall(rf"\.\. {directive}\n\n?((?:   .*\n|\n)+)", entry + "\n")
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Return the names that the page starts from, with the downloads at hand."""
    monkeypatch.chdir(tmp_path)  # some lines write files
    monkeypatch.setattr(sys, "path", [str(SITE / "take"), *sys.path])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in (alone | {"MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
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


def entry_blocks(title):
    (entry,) = [entry for entry in ENTRIES if entry.startswith(title)]
    return blocks("code-block:: python", entry)


def pooled_cnn(C):
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C)
    )


@pytest.mark.parametrize("large", ["outputs of layers", "J"])
def test_each_way_lowers_the_peak_where_the_entry_says_so(large, start):
    small, plan, chunked, written = entry_blocks("``jacrev`` runs out of memory")
    if large == "J":
        model, X = nn.Sequential(nn.Linear(64, 99), nn.ReLU(), nn.Linear(99, 5)), (64,)
    else:
        model, X = pooled_cnn(5), (3, 20, 20)
    params = {name: p.detach() for name, p in model.named_parameters()}
    start |= {"model": model, "X": torch.rand(20, *X), "N": 20, "params": params}
    exec(plan, start)  # also imports what the other blocks import
    exec(written, start)
    size = sum(block.nbytes for block in start.pop("J").values())
    peak_bytes = sys.modules["memory_plan"].peak_bytes

    def peak(block):
        code = compile(block, "entry", "exec")
        return peak_bytes(lambda: exec(code, dict(start))) / size

    whole = "jacrev(lambda params: functional_call(model, params, X))(params)"
    if large == "J":
        assert 0.9 < start["ratio"] < 1.5
        assert peak(small) < 1.2 and peak(written) < 1.5 < peak(chunked)
    else:
        assert start["ratio"] > 10
        assert 5 * peak(small) < peak(whole) and 3 * peak(chunked) < peak(small)


def test_shards_of_two_processes_add_up(start, tmp_path):
    lines = textwrap.dedent(START), "_ = torch.manual_seed(0)\n", textwrap.dedent(START)
    save = "torch.save((J, JTu), f'{rank}.pt')\n"
    code = "".join([*lines, entry_blocks("Shard a Jacobian")[0], save])
    (tmp_path / "file.py").write_text(code)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")
    }
    options = {"cwd": tmp_path, "env": environment, "timeout": 120, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    torchrun = subprocess.run([sys.executable, *run, "file.py"], **options)
    assert torchrun.returncode == 0, torchrun.stdout
    (first, summed), (second, same) = [
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    ]
    torch.manual_seed(0)
    exec(textwrap.dedent(START), start)
    exec("J = vmap(jacrev(f), (None, 0))(params, X)", start)
    for name, block in start["J"].items():
        assert len(first[name]) == 8
        assert_close(torch.cat([first[name], second[name]]), block)
        assert_close(summed[name], block.sum((0, 1)))
        assert_close(summed[name], same[name])


def test_both_ways_to_the_spectrum_agree(start):
    exact, loss, streamed = entry_blocks("Eigenvalues and eigenvectors")
    start["model"], start["X"] = start["model"].double(), start["X"].double()
    start["params"] = {k: p.detach() for k, p in start["model"].named_parameters()}
    exec(exact, start)
    rows, values, of_ggn = start["rows"], start["values"], start["of_ggn"]
    of_ntk = start["of_ntk"].flatten(1)
    assert_close(of_ggn @ (rows.T @ rows), values[:, None] * of_ggn)
    assert_close(of_ntk @ (rows @ rows.T), values[:, None] * of_ntk)
    rank, expected = start["rank"], torch.linalg.matrix_rank(rows)
    assert rank == expected < len(rows)
    exec(streamed, start)
    assert_close(start["values"].flip(0), values)
    assert start["rank"] == expected
    top = torch.cat([block.flatten() for block in start["of_ggn"].values()])
    assert_close((top @ of_ggn[0]).abs(), torch.ones((), dtype=top.dtype))
    exec(loss, start)
    fs, y = start["model"](start["X"]).detach(), torch.zeros(15, dtype=torch.long)
    hessian = torch.func.hessian(nn.functional.cross_entropy)
    L = torch.stack([hessian(f, label) for f, label in zip(fs, y)])
    J = torch.cat([block.flatten(2) for block in start["J"].values()], 2)
    ggn = torch.einsum("ncp,ncd,ndq->pq", J, L, J)
    assert_close(start["rows"].T @ start["rows"], ggn)


def test_derivative_of_a_complex_module_is_the_conjugate_of_autograd(start):
    *_, lines = entry_blocks("``RuntimeError: jacrev: Expected all outputs to be real")
    exec(lines, start)
    fs = start["model"](start["Z"])
    one = torch.ones((), dtype=fs.dtype)
    rows = torch.autograd.grad(fs[4, 2], start["model"].parameters(), one)
    for block, row in zip(start["derivative"].values(), rows, strict=True):
        assert_close(block[4, 2], row.conj())
    assert_close(start["derivative"]["weight"][4, 2, 2], start["Z"][4])


def test_real_inputs_and_complex_outputs_are_as_from_autograd(start):
    _, lines, _ = entry_blocks(
        "``RuntimeError: jacrev: Expected all outputs to be real"
    )
    exec(lines, start)
    fs, params = start["model"](start["X"]), list(start["model"].parameters())
    for place, part in enumerate((fs.real, fs.imag)):
        rows = torch.autograd.grad(part[4, 0], params, retain_graph=True)
        for block, row in zip(start["J"].values(), rows, strict=True):
            assert_close(torch.view_as_complex(block)[4, 0, place], row)


def test_module_hooks_leave_the_jacobian_as_it_is(start):
    exec("J = vmap(jacrev(f), (None, 0))(params, X)", start)
    expected = start["J"]
    for lines in entry_blocks("Wrong numbers after ``register_hook``"):
        exec(lines, start)
        assert_close(dict(start["J"]), expected)


def test_kernel_and_conjugate_gradients_solve_the_damped_system(start):
    blocks = entry_blocks("Only ``J v``")
    for block in blocks:
        exec(block, start)
        if "solved" in start and "by_kernel" not in start:
            start["by_kernel"] = torch.cat([b.flatten() for b in start["w"].values()])
    exec("J = vmap(jacrev(f), (None, 0))(params, X)", start)
    rows = torch.cat([block.flatten(2) for block in start["J"].values()], 2)
    rows, flat = rows.flatten(0, 1).double(), torch.from_numpy(start["flat"]).double()
    assert_close(flat, rows.T @ start["u"].flatten().double(), rtol=1e-4, atol=1e-5)
    matrix = rows.T @ rows + 0.1 * torch.eye(len(flat), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, flat)
    assert start["failed"] == 0
    for w in torch.from_numpy(start["w"]), start["by_kernel"]:
        assert_close(w.double(), expected, rtol=0, atol=1e-3 * expected.norm())


def test_influence_of_a_regression_is_that_of_fitting_again(start):
    """For a linear model the changes are exact."""
    train, changes, _ = entry_blocks("Which training sample caused this output?")
    trained, new = changes.strip().split("\n\n")
    torch.manual_seed(0)
    X, X_new = torch.rand(15, 10).double(), torch.rand(4, 10).double()
    Y, A = torch.rand(15).double(), torch.cat([X, torch.ones(15, 1)], 1).double()

    def fitted(keep):
        matrix = A[keep].T @ A[keep] + 1.0 * torch.eye(11).double()
        return torch.linalg.solve(matrix, A[keep].T @ Y[keep])

    said, theta = [], fitted(range(15))
    names = start | {"model": nn.Linear(10, 1).double(), "X": X, "Y": Y, "X_new": X_new}
    names["print"] = said.append
    torch.set_default_dtype(torch.float64)
    exec(train.replace("torch.rand(N)", "Y"), names)
    exec(
        "def f(params, x):\n    return functional_call(model, params, x[None])[0]",
        names,
    )
    exec(trained, names)
    on_training = names["changes"]
    exec(new.replace("torch.rand(4, 10)", "X_new"), names)
    assert said[0] < 1e-3
    for n in range(15):
        change = fitted([m for m in range(15) if m != n]) - theta
        assert_close(on_training[:, n], A @ change, rtol=0, atol=1e-4)
        expected = X_new @ change[:10] + change[10]
        assert_close(names["changes"][:, n], expected, rtol=0, atol=1e-4)
        assert change.norm() > 1e-3
