"""The taught functions on models of real sizes, in float32, against float64."""

import copy
from itertools import product

import pytest
import torch
from field import FIELD
from torch import autograd

BYTES = 5e7  # of a Jacobian: if it were larger, we take fewer samples
MIXING = "nodes of a graph"  # each sample influences the others
PAGES = {
    "batched_jacobian": "scale/universal_jacobian",
    "check_jacobian": "trust/check_a_jacobian",
    "jacobians": "compute/torch_func_jacobians",
    "ntk": "scale/neural_tangent_kernel",
    "squared_norms": "scale/neural_tangent_kernel",
    "jacobian_chunks": "scale/jacobians_without_memory",
}
# Where there is an error in place of a result, what it says.
ERRORS = {
    ("jacobians", "GRU"): "output with shape",  # PyTorch's, as vmap raises it
    ("jacobians", "PINN, autograd.grad"): "inside of a function being transformed",
    ("jacobians", MIXING): "index",  # of a node in another chunk
    ("jacobian_chunks", MIXING): "index",
}


@pytest.fixture(scope="module", autouse=True)
def functions(taught):
    """Return the taught functions by name, and work in float32 on two threads."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    found = {name: taught(page)[name] for name, page in PAGES.items()}
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(2)
    yield found
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FIELD)
def case(request, functions):
    """Return the model with its inputs, J of all samples, and the truth for a few."""
    torch.manual_seed(0)
    model, X = FIELD[request.param]()
    row = 4 * sum(p.numel() for p in model.parameters()) * model(X).shape[1]
    X = X[: int(BYTES / row)]
    kept = list(range(len(X))) if request.param == MIXING else [0, len(X) - 1]
    truth = definition(copy.deepcopy(model), X[kept])
    return request.param, model, X, kept, truth, functions["batched_jacobian"](model, X)


def definition(model, X):
    """Return ``{name: J}`` in float64, from a backward pass for each output."""
    fs = model.double()(X.double() if X.is_floating_point() else X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = product(*map(range, fs.shape))
    options = {"retain_graph": True, "materialize_grads": True}
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def far_off(found, wanted, by=1e-3):
    """Return the names of the blocks that differ by more than so much of their norm."""
    assert found.keys() == wanted.keys()
    return [
        name
        for name, block in wanted.items()
        if not (found[name] - block).norm() <= by * block.norm()
    ]


def kernel_and_norms(J):
    """Return the NTK, the squared norms of the rows, and those of sums of the rows."""
    blocks = [block.reshape(*block.shape[:2], -1) for block in J.values()]
    rows = torch.cat(blocks, dim=2)
    K = torch.einsum("ncp,mdp->ncmd", rows, rows)
    return K, rows.square().sum(2), rows.sum(1).square().sum(1)


def result(name, function, model, X, truth):
    """Return what the function returns and what it should, each by name."""
    if name == "jacobians":
        return function(model, X), truth
    K, norms, norms_of_sums = kernel_and_norms(truth)
    if name == "ntk":
        found = {"K": function(model, X), "traced": function(model, X, traced=True)}
        return found, {"K": K, "traced": torch.einsum("ncmc->nm", K)}
    ones = torch.ones_like(norms, dtype=torch.float32)
    found = {"rows": function(model, X), "sums": function(model, X, ones)}
    return found, {"rows": norms, "sums": norms_of_sums}


def test_jacobian_is_right(case):
    _, _, _, kept, truth, J = case
    assert all(block.dtype == torch.float32 for block in J.values())
    assert not far_off({name: block[kept] for name, block in J.items()}, truth)


@pytest.mark.parametrize("name", ["jacobians", "ntk", "squared_norms"])
def test_other_functions_are_right(name, case, functions):
    title, model, X, kept, truth, _ = case
    call = name, functions[name], model, X[kept], truth
    if (name, title) in ERRORS:
        with pytest.raises((RuntimeError, IndexError), match=ERRORS[name, title]):
            result(*call)
    else:
        assert not far_off(*result(*call))


def test_chunks_are_right(case, functions):
    title, model, X, kept, truth, J = case
    C = next(iter(J.values())).shape[1]
    chunks = functions["jacobian_chunks"](model, X, (len(X) // 2 + 1, C // 2 + 1))
    if title == MIXING:
        with pytest.raises(IndexError, match=ERRORS["jacobian_chunks", title]):
            next(chunks)
        return
    for n, c, chunk in chunks:
        assert not far_off(chunk, {name: block[n, c] for name, block in J.items()})


def test_right_jacobian_passes_and_each_corrupted_block_is_caught(case, functions):
    _, model, X, _, _, J = case
    check = functions["check_jacobian"]
    assert check(model, X, J).keys() == J.keys()

    order = [1, 0, *range(2, len(X))]
    first = next(iter(J))
    for change, corrupted in {
        "two samples swapped": {name: block[order] for name, block in J.items()},
        "1 % off": {name: 1.01 * block for name, block in J.items()},
        "zero": {k: 0 * block if block.ndim == 3 else block for k, block in J.items()},
        "first block 36 % off": J | {first: 0.64 * J[first]},
    }.items():
        wrong = far_off(corrupted, J)
        if not wrong:  # as there are no biases
            continue
        with pytest.raises(AssertionError, match="wrong Jacobian") as caught:
            check(model, X, corrupted)
        _, _, errors = str(caught.value).partition("roundings: ")
        named = [error.rpartition(" ")[0] for error in errors.split(", ")]
        assert set(wrong) <= set(named), change
