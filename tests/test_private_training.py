"""The functions of ``private_training.py`` against Opacus, on other data and seeds."""

import copy
import math

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

MODELS = {
    "two layers": lambda: [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)],
    "no bias": lambda: [nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)],
    "one layer": lambda: [nn.Linear(6, 3)],
    "deep": lambda: [
        *(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5), nn.SiLU()),
        *(nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3)),
    ],
}


@pytest.fixture(scope="module")
def names(taught):
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield taught("use/private_training")
    torch.set_default_dtype(default)
    torch.set_num_threads(threads)


def make(model, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*MODELS[model]()).double()
    return model, 3 * torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))


def gradients(model, X, y):
    """Return the gradient [N, P] of each sample's loss, from one backward pass each."""
    rows = []
    for n in range(len(X)):
        loss = cross_entropy(model(X[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bound", [0.1, 2.0, 1e9])
def test_sum_of_clipped_gradients(model, bound, names):
    model, X, y = make(model, seed=3)
    expected = gradients(model, X, y)
    assert_close(names["sample_gradients"](model, X, y), expected)
    total, norms = names["clipped_gradient"](model, X, y, bound)
    assert_close(norms, expected.norm(dim=1))
    clipped = torch.stack([g * min(1.0, bound / g.norm().item()) for g in expected])
    assert_close(torch.cat([t.flatten() for t in total]), clipped.sum(0))
    assert [t.shape for t in total] == [p.shape for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_one_sample_moves_the_sum_by_the_bound_at_most(names):
    model, X, y = make("deep", seed=4)
    X[2] *= 1e4
    whole, _ = names["clipped_gradient"](model, X, y, 0.5)
    for n in range(len(X)):
        keep = torch.arange(len(X)) != n
        rest, _ = names["clipped_gradient"](model, X[keep], y[keep], 0.5)
        moved = torch.cat([(a - b).flatten() for a, b in zip(whole, rest)])
        assert moved.norm() < 0.5 + 1e-9


def test_empty_batch_and_zero_gradient(names):
    model, X, y = make("two layers", seed=5)
    total, norms = names["clipped_gradient"](model, X[:0], y[:0], 1.0)
    assert norms.shape == (0,)
    assert not any(t.any() for t in total)


def test_bad_models_raise(names):
    _, X, y = make("one layer", seed=6)
    clip = names["clipped_gradient"]
    with pytest.raises(TypeError, match="no rule for LayerNorm"):
        clip(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double(), X, y, 1.0)
    shared = nn.Linear(6, 6).double()
    with pytest.raises(ValueError, match="layers share a parameter"):
        clip(nn.Sequential(shared, nn.Tanh(), shared), X, y, 1.0)
    places = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match=r"an input is not \[N, I\]"):
        clip(places, X.unflatten(1, (2, 3)), y, 1.0)


def conv_net():
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 3))


@pytest.mark.parametrize("samples", [1, 3, 7, 100])
@pytest.mark.parametrize("frozen", [(), ("0.weight", "4.bias")])
def test_chunks_of_any_model(samples, frozen, names):
    torch.manual_seed(9)
    model, X, y = conv_net(), 9 * torch.randn(7, 2, 5, 5), torch.randint(3, (7,))
    model = model.float().requires_grad_(True)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    free = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(7):
        loss = cross_entropy(model.double()(X[[n]].double()), y[[n]])
        grads = torch.autograd.grad(loss, free)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    rows, model = torch.stack(rows), model.float()
    bound = rows.norm(dim=1).median().item()
    total, norms = names["clipped_in_chunks"](model, X.float(), y, bound, samples)
    assert [t.shape for t in total] == [p.shape for p in free]
    assert norms.dtype == torch.float32
    clipped = torch.stack([g * min(1.0, bound / g.norm().item()) for g in rows]).sum(0)
    off = torch.cat([t.flatten() for t in total]).double() - clipped
    assert off.norm() < 1e-5 * clipped.norm()
    assert_close(norms.double(), rows.norm(dim=1), rtol=1e-5, atol=0)
    assert all(p.grad is None for p in model.parameters())


class Keeps(nn.Linear):
    def forward(self, X):
        self.kept = super().forward(X)
        return self.kept


@pytest.mark.parametrize("function", ["clipped_gradient", "clipped_in_chunks"])
def test_a_kept_tensor_and_hooks_stay_and_change_nothing(names, function):
    torch.manual_seed(2)
    model, X = nn.Sequential(Keeps(6, 3)).double(), torch.rand(5, 6).double()
    y, options = torch.tensor([0, 1, 2, 1, 0]), {"bound": 0.1}
    options |= {"samples": 2} if function == "clipped_in_chunks" else {}
    plain, _ = names[function](model, X, y, **options)
    model(X)
    kept = model[0].kept
    hook = model[0].register_full_backward_pre_hook(lambda layer, of: (7 * of[0],))
    found, _ = names[function](model, X, y, **options)
    assert_close(list(found), list(plain))
    assert model[0].kept is kept and hook.id in model[0]._backward_pre_hooks


def test_chunks_of_no_samples_and_of_samples_that_mix(names):
    model, X, y = conv_net(), torch.rand(4, 2, 5, 5), torch.tensor([0, 1, 2, 1])
    total, norms = names["clipped_in_chunks"](model, X[:0], y[:0], 1.0, 2)
    assert norms.shape == (0,) and not any(t.any() for t in total)
    mixing = nn.Sequential(nn.BatchNorm2d(2), *model)
    before = copy.deepcopy(mixing.state_dict())
    with pytest.raises(RuntimeError, match="BatchNorm|running_mean|in-place"):
        names["clipped_in_chunks"](mixing, X, y, 1.0, 2)
    assert_close(dict(mixing.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"bound": 0.0}, "bound=0.0 and samples=2: all must be positive"),
        ({"bound": float("nan")}, "bound=nan"),
        ({"samples": -1}, "samples=-1: all must be positive"),
        ({"model": conv_net().requires_grad_(False)}, "0 trained parameters"),
    ],
)
def test_what_cannot_be_clipped_raises(names, bad, text):
    X, y = torch.rand(4, 2, 5, 5), torch.tensor([0, 1, 2, 1])
    good = {"model": conv_net(), "X": X, "y": y, "bound": 1.0, "samples": 2}
    with pytest.raises(ValueError, match=text):
        names["clipped_in_chunks"](**(good | bad))
    linear, X = nn.Sequential(nn.Linear(6, 3)), torch.rand(4, 6)
    if "bound" in bad:
        with pytest.raises(ValueError, match="must be positive"):
            names["clipped_gradient"](linear, X, y, bad["bound"])


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_opacus(model, names):
    model, X, y = make(model, seed=7)
    expected = names["sample_gradients"](model, X, y)
    factors = {"sum": 1, "mean": len(X)}  # of a mean loss, by its default
    for reduction, factor in factors.items():
        wrapped = GradSampleModule(model, loss_reduction=reduction)
        cross_entropy(wrapped(X.requires_grad_()), y, reduction="sum").backward()
        samples = [p.grad_sample.flatten(1) for p in wrapped.parameters()]
        assert_close(torch.cat(samples, 1), factor * expected)
        wrapped.to_standard_module().zero_grad()


@pytest.mark.parametrize(
    "case",
    [(0.01, 1.1, 1000, 1e-5), (1 / 6, 3.3, 200, 1e-4), (0.25, 5.0, 50, 1e-3)],
)
def test_epsilon_is_that_of_opacus(case, names):
    q, sigma, steps, delta = case
    accountant = RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    orders = list(range(2, 129))
    expected = accountant.get_epsilon(delta, alphas=orders)
    assert math.isclose(names["epsilon"](*case, orders), expected, rel_tol=1e-10)


def test_norms_of_the_kernel_page_are_the_same(names, taught):
    model, X, y = make("deep", seed=8)
    fs = model(X)
    losses = cross_entropy(fs, y, reduction="sum")
    (e,) = torch.autograd.grad(losses, fs, retain_graph=True)
    squared_norms = taught("scale/neural_tangent_kernel")["squared_norms"]
    _, norms = names["clipped_gradient"](model, X, y, 1.0)
    assert_close(squared_norms(model, X, e), norms.square())


def test_more_noise_costs_less(names):
    epsilon = names["epsilon"]
    assert epsilon(0.1, 3.0, 100, 1e-5) < epsilon(0.1, 2.0, 100, 1e-5)
    assert epsilon(0.1, 2.0, 100, 1e-5) < epsilon(0.1, 2.0, 200, 1e-5)
    assert epsilon(0.1, 2.0, 100, 1e-5) < epsilon(0.2, 2.0, 100, 1e-5)
    assert epsilon(0.1, 2.0, 100, 1e-4) < epsilon(0.1, 2.0, 100, 1e-5)


@pytest.mark.parametrize("target", [0.5, 2.0, 20.0])
def test_noise_for_a_target(target, names):
    sigma = names["noise_for"](target, 0.05, 300, 1e-5)
    assert 0.999 * target < names["epsilon"](0.05, sigma, 300, 1e-5) <= target


@pytest.mark.parametrize(
    "bad", [(0, 1, 1, 0.1), (1, 1, 1, 0.1), (0.1, 0, 1, 0.1), (0.1, 1, 0, 0.1)]
)
def test_bad_numbers_raise(bad, names):
    with pytest.raises(ValueError, match="out of range"):
        names["epsilon"](*bad)
    with pytest.raises(ValueError, match="no noise from"):
        names["noise_for"](1e-9, 0.1, 100, 1e-5)


def test_training_on_other_data_and_seed(names):
    torch.manual_seed(8)
    X = torch.randn(600, 64, dtype=torch.float64)
    y = 4 * (X[:, 0] > 0).long()
    options = {"bound": 0.5, "q": 0.2, "steps": 60, "lr": 2}
    model = names["train"](X[:500], y[:500], 9, 1.0, **options)
    assert (model(X[500:]).argmax(1) == y[500:]).double().mean() > 0.7


def test_page_shows_what_it_claims(names):
    found = {name: sum(values) / len(values) for name, values in names["found"].items()}
    assert found["epsilon 1"] < found["epsilon 3"] < found["epsilon 8"]
    assert found["epsilon 8"] < found["no privacy"]
    assert found["epsilon 3, noise for a mean loss"] < found["epsilon 1"] - 0.3
    assert names["few"] < found["epsilon 1"] - 0.3
    assert names["moves"]["clipped"] < 1 + 1e-9 < names["moves"]["inverted clipping"]


def test_choice_looks_at_no_test_digit(names):
    names["found"]
    page = names.results  # what the run of the page made
    assert page["accuracy"].__globals__["labels"] is page["labels"]
    page["labels"][1200:] = -1
    best = page["chosen"](page["sigmas"][3], *page["grid"])
    assert best == (page["bound"], page["lr"])
