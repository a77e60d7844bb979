"""The claims of ``precision_and_randomness.py`` on other models, and exact texts."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.testing import assert_close

LOW = {torch.float16: "Half", torch.bfloat16: "BFloat16"}


@pytest.fixture(scope="module")
def page(taught):
    return taught("trust/precision_and_randomness")


@pytest.fixture(autouse=True)
def single_precision():
    """Start from float32, whatever a tutorial has set."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(default)


def with_norm(norm, *first):
    body = first or (nn.Linear(10, 6),)
    return nn.Sequential(*body, norm, nn.Flatten(), nn.LazyLinear(4)).eval()


CASES = {
    "LayerNorm": (with_norm(nn.LayerNorm(6)), torch.rand(7, 10)),
    "BatchNorm1d": (with_norm(nn.BatchNorm1d(6)), torch.rand(7, 10)),
    "BatchNorm2d": (
        with_norm(nn.BatchNorm2d(6), nn.Conv2d(2, 6, 3)),
        torch.rand(7, 2, 4, 5),
    ),
    "InstanceNorm2d": (
        with_norm(nn.InstanceNorm2d(6, affine=True), nn.Conv2d(2, 6, 3, bias=False)),
        torch.rand(7, 2, 4, 5),
    ),
}
for model, X in CASES.values():
    model(X)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", LOW)
def test_only_torch_func_raises_for_a_norm_under_autocast(name, dtype, page):
    model, X = CASES[name]
    exact = page["autograd_loop"](copy.deepcopy(model).double(), X.double())
    text = f"^expected scalar type {LOW[dtype]} but found Float$"
    with pytest.raises(RuntimeError, match=text):
        page["under_autocast"](dtype, page["vmap_jacrev"], model, X)
    for method in ("autograd loop", "is_grads_batched"):
        J = page["under_autocast"](dtype, page["methods"][method], model, X)
        assert 1e-5 < page["largest_error"](J, exact) < 0.1
    if name.startswith("BatchNorm"):
        J = page["under_autocast"](dtype, page["methods"]["BackPACK"], model, X)
        assert 1e-5 < page["largest_error"](J, exact) < 0.1


@pytest.mark.parametrize("dtype", LOW)
def test_a_norm_of_float32_values_and_a_group_norm_do_not_raise(dtype, page):
    X = torch.rand(7, 10)
    first = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 4))
    group = nn.Sequential(nn.Linear(10, 6), nn.GroupNorm(2, 6), nn.Linear(6, 4))
    norm = page["SinglePrecisionNorm"](6)
    wrapped = nn.Sequential(nn.Linear(10, 6), norm, nn.Linear(6, 4))
    for model in (first, group, wrapped):
        exact = page["vmap_jacrev"](model, X)
        J = page["under_autocast"](dtype, page["vmap_jacrev"], model, X)
        assert 1e-5 < page["largest_error"](J, exact) < 0.1


def test_outcome_is_an_error_or_a_text(page):
    model, X = CASES["LayerNorm"]
    exact = page["vmap_jacrev"](model, X)
    with warnings.catch_warnings(action="error"):
        texts = {
            name: page["outcome"](method, model, X, exact)
            for name, method in page["methods"].items()
        }
    assert texts["vmap(jacrev)"] == "expected scalar type Half but found Float"
    assert texts["BackPACK"] == "'Parameter' object has no attribute 'grad_batch'"
    assert texts["autograd loop"].startswith("error ")


def test_relative_errors_see_an_error(page):
    exact = {"a": torch.ones(3, 4, dtype=torch.float64), "b": torch.rand(2)}
    J = {"a": exact["a"].float() * 1.25, "b": exact["b"]}
    assert page["relative_errors"](J, exact) == {"a": 0.25, "b": 0}
    assert page["largest_error"](J, exact) == 0.25


@pytest.mark.parametrize("operations", [("conv",), ("rnn",), ("conv", "rnn")])
def test_old_switch_after_new_ones(operations):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        for operation in operations:
            getattr(cudnn, operation).fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = cudnn.allow_tf32
    finally:
        cudnn.allow_tf32 = before
    assert cudnn.allow_tf32 is before is True
    assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32"


def test_page_leaves_the_switches_as_they_are_by_default(page):
    """Also that the page runs to its end: its last cells make ``total``."""
    _ = page["total"]
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


# Dropout


@pytest.fixture
def dropout():
    """Two layers of dropout, the first on the inputs, and other sizes."""
    layers = nn.Dropout(0.3), nn.Linear(8, 11), nn.Dropout(0.5), nn.ELU()
    model = nn.Sequential(*layers, nn.Linear(11, 3)).double()
    return model, torch.rand(6, 8, dtype=torch.float64)


def recipe(model, X, **options):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params, x):
        return torch.func.functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0), **options)(params, X)


def test_dropout_raises_by_default(dropout):
    text = "^vmap: called random operation while in randomness error mode. Please "
    with pytest.raises(RuntimeError, match=text):
        recipe(*dropout)


@pytest.mark.parametrize("seed", [0, 5])
def test_one_seed_one_set_of_masks(seed, dropout, page):
    def seeded(method, *args, **options):
        torch.manual_seed(seed)
        return method(*args, **options)

    truth = seeded(page["autograd_loop"], *dropout)
    for name in ("is_grads_batched", "BackPACK"):
        assert_close(seeded(page["methods"][name], *dropout), truth)
    assert_close(seeded(recipe, *dropout, randomness="different"), truth)
    for options in (
        {"randomness": "same"},
        {"randomness": "different", "chunk_size": 4},
    ):
        other = seeded(recipe, *dropout, **options)
        assert page["largest_error"](other, truth) > 0.1


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_same_is_one_mask(chunk_size, page):
    layers = nn.Linear(8, 30), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(30, 3)
    model, X = nn.Sequential(*layers).double(), torch.rand(5, 8, dtype=torch.float64)
    J = recipe(model, X, randomness="same", chunk_size=chunk_size)
    kept = page["kept_units"](J)
    assert kept.shape == (5, 3, 30)
    assert len(kept.flatten(0, 1).unique(dim=0)) == 1
    mask = page["FixedDropout"](kept[0, 0].double(), 0.5)
    fixed = nn.Sequential(*layers[:2], mask, layers[3])
    assert_close(J, page["autograd_loop"](fixed, X))
    J = recipe(model, X, randomness="different", chunk_size=chunk_size)
    assert len(page["kept_units"](J)[:, 0].unique(dim=0)) == 5


@pytest.mark.parametrize("size", [24, 32])
def test_gradient_of_a_convolutions_bias_rounds_more_than_J(size, page):
    model, X = page["conv_net"](2, 9, 14), torch.rand(10, 2, size, size)
    exact = copy.deepcopy(model).double()
    (truth,) = torch.autograd.grad(exact(X.double()).sum(), exact[2].bias)
    (gradient,) = torch.autograd.grad(model(X).sum(), model[2].bias)
    total = page["vmap_jacrev"](model, X)["2.bias"].sum((0, 1))
    off = [((t - truth).norm() / truth.norm()).item() for t in (total, gradient)]
    assert off[0] < 1e-6 < off[1] < 1e-3
