"""Checkpoints and what loops keep, on other models."""

import copy
import gc
import warnings

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import autograd, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

N, C = 5, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")
UNUSED = "The differentiated Tensor at index 0 appears to not have been used in the"
HOOKS = (
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks. "
    "Please open an issue with your use case."
)
REENTRANT = (
    "When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad() or "
    "passing an `inputs` parameter to .backward(). To resolve this error, you can "
    "either set use_reentrant=False, or call .backward() without passing the `inputs` "
    "argument."
)


@pytest.fixture(scope="module")
def page(taught):
    return taught("scale/checkpoints_and_growing_memory")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(before)


def recipe(model):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params, x):
        return torch.func.functional_call(model, params, x[None])[0]

    return torch.func.vmap(torch.func.jacrev(f), (None, 0)), params


class Recomputed(nn.Module):
    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.last, self.reentrant = part, nn.Linear(7, C), reentrant

    def forward(self, X):
        X = checkpoint(self.part, X, use_reentrant=self.reentrant)
        return self.last(X.flatten(1))


def recomputed(reentrant=False):
    return Recomputed(nn.Sequential(nn.Linear(4, 7), nn.Sigmoid()), reentrant)


def test_checkpoints_without_reentry(page):
    model, X = recomputed(), torch.rand(N, 4)
    plain = nn.Sequential(model.part, model.last)
    expected = list(page["autograd_loop"](plain, X).values())
    extended = copy.deepcopy(model)
    for layer in (*extended.part, extended.last):
        extend(layer)
    for method in "autograd_loop", "grads_batched", "sample_by_sample":
        assert_close(list(page[method](model, X).values()), expected)
    assert_close(list(page["batch_grad"](extended, X).values()), expected)
    with pytest.raises(RuntimeError) as error:
        page["vmap_jacrev"](model, X)
    assert str(error.value) == HOOKS


def test_reentrant_checkpoints(page, taught):
    model, X = recomputed(reentrant=True), torch.rand(N, 4)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        J = page["autograd_loop"](model, X)
    X.requires_grad_()
    with warnings.catch_warnings(action="error"):
        silent = page["autograd_loop"](model, X)
    for blocks in J, silent:
        assert not blocks["part.0.weight"].any() and blocks["last.weight"].any()
    with pytest.raises(RuntimeError, match=UNUSED):
        page["grads_batched"](model, X)
    with pytest.raises(RuntimeError) as error:
        autograd.grad(model(X).sum(), [X, *model.parameters()])
    assert str(error.value) == REENTRANT
    with pytest.raises(RuntimeError, match="must override the setup_context static"):
        page["vmap_jacrev"](model, X)
    # What the page says of another: it raises and returns no zeros.
    batched_jacobian = taught("scale/universal_jacobian")["batched_jacobian"]
    for inputs in X, X.detach():
        with pytest.raises((RuntimeError, UserWarning)):
            batched_jacobian(model, inputs)


def test_kept_bytes_counts_what_stays(page):
    kept = []

    def step():
        kept.append(torch.zeros(125))
        torch.zeros(999)

    assert page["kept_bytes"](step) == [1000 * i for i in range(1, 7)]
    assert page["kept_bytes"](lambda: torch.zeros(125).sum().item()) == [0] * 6


@pytest.fixture
def convolutions():
    layers = nn.Conv1d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 18, C)
    return nn.Sequential(*layers), torch.rand(N, 2, 20, requires_grad=True)


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize(
    "cause", ["create_graph", "parameters", "retained", "grad_batch", "backward"]
)
def test_what_grows_and_what_does_not(cause, mended, convolutions, page):
    model, X = convolutions
    inputs, kept = [X, *model.parameters()], []
    extended = extend(copy.deepcopy(model))

    def step():
        if cause == "create_graph":
            row = autograd.grad(model(X)[2, 1], inputs, create_graph=True)[1].norm()
            kept.append(row.item() if mended else row)
        elif cause == "parameters":
            jacobian, params = recipe(model)
            params = params if mended else dict(model.named_parameters())
            kept.append(jacobian(params, X.detach())["0.weight"].norm())
        elif cause == "retained":
            fs = model(X)
            autograd.grad(fs.sum(), inputs, retain_graph=not mended)
            kept.append(fs)
        elif cause == "grad_batch":
            with backpack(BatchGrad()):
                fs = extend(extended)(X)
                autograd.grad(fs[:, 1].sum(), [X, *extended.parameters()])
            block = extended[3].weight.grad_batch
            kept.append(block.norm().item() if mended else block)
        else:
            net = nn.Sequential(nn.Linear(20, 9), nn.Tanh())
            fs = net(X).sum()
            if mended:
                autograd.grad(fs, list(net.parameters()), create_graph=True)
            else:
                with warnings.catch_warnings(action="ignore"):
                    fs.backward(create_graph=True)

    gc.collect()
    gc.freeze()  # as on the page: what is there need not be looked at again
    steps = page["kept_bytes"](step)
    gc.unfreeze()
    grown = [after - before for before, after in zip(steps[1:], steps[2:])]
    # An output [N, C] is kept by intention, and a norm is one number.
    assert max(grown) <= N * C * 8 if mended else min(grown) > 1000


def test_extend_adds_hooks_once(convolutions):
    model, _ = convolutions
    counts = {tuple(len(m._forward_hooks) for m in extend(model)) for _ in range(4)}
    assert counts == {(1, 1, 0, 1)} or counts == {(1, 1, 1, 1)}
