"""The functions of ``batched_jacobians.py``, on models that its page does not show."""

import copy

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from conftest import EXAMPLES
from torch import nn
from torch.func import functional_call, jacrev, vmap


def cnn():
    layers = nn.Conv2d(2, 3, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers), torch.rand(5, 2, 6, 5)


def deep():
    layers = nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 8, bias=False), nn.ELU()
    return nn.Sequential(*layers, nn.Linear(8, 2)), torch.rand(7, 6)


def frozen():
    model, X = deep()
    model[0].weight.requires_grad_(False)
    return model, X


def one_sample():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(1, 4)


def one_output():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), torch.rand(5, 4)


MODELS = cnn, deep, frozen, one_sample, one_output


@pytest.fixture(scope="module")
def names(taught):
    return taught("batched_jacobians")


@pytest.fixture(params=["batch_grad", "sqrt_ggn"])
def backpack_method(request, names):
    return names[request.param]


@pytest.fixture(params=["autograd_loop", "batch_grad", "sqrt_ggn"])
def method(request, names):
    """Return a method that takes a model, for which BackPACK extends a copy."""
    if request.param == "autograd_loop":
        return names[request.param]
    return lambda model, X: names[request.param](extend(copy.deepcopy(model)), X)


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def reference(model, X):
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def f(params, x):
        return functional_call(model, params, (x[None],))[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def state(model):
    """Return all that a method could leave behind on a model."""
    parts = [*model.modules(), *model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    return [sorted(vars(part)) for part in parts], hooks, grads, model.training


@pytest.mark.parametrize("make", MODELS)
def test_equals_torch_func_and_leaves_the_model(make, method):
    model, X = make()
    before, values = state(model), copy.deepcopy(model.state_dict())
    torch.testing.assert_close(method(model, X), reference(model, X))
    assert state(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert not X.requires_grad


def test_extended_model_serves_again_and_keeps_no_jacobian(backpack_method):
    model, X = deep()
    extended = extend(copy.deepcopy(model))
    for inputs in X, X[:3] + 1:
        J = backpack_method(extended, inputs)
        torch.testing.assert_close(J, reference(model, inputs))
    assert not any(vars(p) for p in extended.parameters())
    assert all(p.grad is None for p in extended.parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_batch_grad_takes_tokens(names):
    layers = nn.Embedding(9, 4), nn.Flatten(), nn.ReLU(), nn.Linear(12, 2)
    model, X = nn.Sequential(*layers), torch.randint(9, (5, 3))
    J = names["batch_grad"](extend(copy.deepcopy(model)), X)
    torch.testing.assert_close(J, reference(model, X))


def test_loop_gives_zeros_for_an_unused_parameter(names):
    model, X = deep()
    model.register_parameter("unused", nn.Parameter(torch.rand(3)))
    J = names["autograd_loop"](model, X)["unused"]
    torch.testing.assert_close(J, torch.zeros(7, 2, 3))


def test_single_precision_stays_single(method):
    model, X = deep()
    model, X = model.float(), X.float()
    torch.testing.assert_close(method(model, X), reference(model, X))


@pytest.mark.parametrize("shape", [(6, 5, 2), (6,), (12, 5)])
def test_other_outputs_raise(shape, backpack_method):
    model = nn.Sequential(nn.Linear(4, 10), nn.Unflatten(1, (5, 2)))
    if len(shape) == 1:
        model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    if len(shape) == 2:
        model = nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.Linear(2, 5)
        )
    message = r"model\(X\) has shape \[" + ", ".join(map(str, shape)) + r"\], not \[N=6"
    with pytest.raises(ValueError, match=message):
        backpack_method(extend(model), torch.rand(6, 4))


def test_unsupported_layer_raises(names):
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match="GELU"):
        names["sqrt_ggn"](extend(model), torch.rand(5, 4))


def in_the_text(error):
    """Return whether the page says what an error says, in one line or over two."""
    text = (EXAMPLES / "batched_jacobians.py").read_text()
    return error in " ".join(text.replace("\n#", " ").split())


@pytest.mark.parametrize(
    ("error", "differentiate_X", "retain_graph", "retain_stored"),
    [
        ("Trying to backward through the graph a second time", True, False, True),
        ("'Linear' object has no attribute 'output'", True, True, False),
        ("'Parameter' object has no attribute 'grad_batch'", False, True, True),
    ],
)
def test_forgotten_details_raise_what_the_page_says(
    error, differentiate_X, retain_graph, retain_stored
):
    model, X = deep()
    fs = extend(model)(X.requires_grad_())
    params = list(model.parameters())
    inputs = [X, *params] if differentiate_X else params
    with pytest.raises((AttributeError, RuntimeError), match=error):
        for c in range(2):
            with backpack(BatchGrad(), retain_graph=retain_stored):
                torch.autograd.grad(fs[:, c].sum(), inputs, retain_graph=retain_graph)
            assert all(p.grad_batch.shape == (7, *p.shape) for p in params)
    assert in_the_text(error)


def test_inputs_without_a_gradient_warn_as_the_page_says():
    model, X = deep()
    fs, warning = extend(model)(X), "Full backward hook is firing"
    with backpack(BatchGrad()), pytest.warns(UserWarning, match=warning):
        fs.sum().backward()
    assert in_the_text(warning)


def test_copy_of_a_kept_activation_raises_what_the_page_says():
    model, X = deep()
    _ = copy.deepcopy(model)
    model.kept = model(X)
    error = "Only Tensors created explicitly by the user"
    with pytest.raises(RuntimeError, match=error):
        copy.deepcopy(model)
    assert in_the_text(error)


@pytest.mark.filterwarnings("ignore:Extension saving to grad_batch")
def test_layer_called_without_the_batch_raises(names):
    class Shared(nn.Module):
        """The layer sees one row for all samples: its gradient has no batch axis."""

        def __init__(self):
            super().__init__()
            self.row = nn.Linear(3, 2)

        def forward(self, X):
            return X[:, :2] + self.row(X[:1, :3])

    with pytest.raises(RuntimeError, match=r"shape '\[5, 2, 3\]' is invalid"):
        names["batch_grad"](extend(Shared()), torch.rand(5, 4))
