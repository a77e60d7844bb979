"""The functions of ``levenberg_marquardt.py`` on other problems, models and seeds."""

import copy

import pytest
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close


@pytest.fixture(scope="module")
def page(taught):
    return taught("use/levenberg_marquardt")


class Decay(nn.Module):
    """Residuals of a curve with two parameters; the last column of X is the target."""

    def __init__(self, start):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, X):
        return self.p[0] * (-self.p[1] * X[:, :1]).exp() - X[:, 1:]


class Fit(nn.Module):
    """Residuals ``[N, 3]`` of a network; the last columns of X are the targets."""

    def __init__(self, width, dtype=torch.float64):
        super().__init__()
        layers = nn.Linear(4, width), nn.GELU(), nn.Linear(width, 3)
        self.net = nn.Sequential(*layers).to(dtype)

    def forward(self, X):
        return self.net(X[:, :4]) - X[:, 4:]


def decay(seed):
    torch.manual_seed(seed)
    t = torch.linspace(0, 3, 25)[:, None]
    return torch.cat([t, 2.5 * (-1.3 * t).exp() + 0.1 * torch.randn(25, 1)], dim=1)


def recorder(model, X):
    losses = []
    return losses, lambda: losses.append(model(X).square().sum().item())


@pytest.mark.parametrize("N, P", [(7, 30), (30, 7)])
@pytest.mark.parametrize("mu", [1e-3, 2.0])
def test_step_solves_the_normal_equations(page, N, P, mu):
    torch.manual_seed(1)
    J, r = torch.randn(N, P), torch.randn(N)
    normal = torch.linalg.solve(J.T @ J + mu * torch.eye(P), -J.T @ r)
    assert_close(page["damped_step"](J, r, mu), normal)


def test_rows_are_those_of_autograd(page):
    torch.manual_seed(2)
    model, X = page["Residual"](nn.Sequential(nn.Linear(1, 5), nn.Tanh())), None
    model.net.append(nn.Linear(5, 1))
    X = torch.rand(7, 1)
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def residuals(theta):
        sizes = [p.numel() for p in model.parameters()]
        parts = zip(model.named_parameters(), theta.split(sizes))
        params = {name: part.view(p.shape) for (name, p), part in parts}
        return torch.func.functional_call(model, params, (X,)).flatten()

    assert_close(page["flat_jacobian"](model, X), jacobian(residuals, theta))


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("start", [[1.0, 0.1], [6.0, 4.0]])
def test_ends_where_scipy_ends(page, seed, start):
    X = decay(seed)
    model = Decay(start)
    losses, log = recorder(model, X)
    page["levenberg_marquardt"](model, X, 40, log=log)

    def residuals(p):
        return p[0] * (-p[1] * X[:, 0]).exp().numpy() - X[:, 1].numpy()

    tolerances = dict.fromkeys(["ftol", "xtol", "gtol"], 1e-14)
    fit = least_squares(residuals, start, method="lm", **tolerances)
    assert_close(model.p.detach(), torch.tensor(fit.x), rtol=1e-6, atol=1e-6)
    assert losses == sorted(losses, reverse=True)


def test_refuses_at_the_minimum_and_leaves_the_parameters(page):
    X = decay(5)
    model = Decay([1.0, 0.1])
    page["levenberg_marquardt"](model, X, 100)
    before = copy.deepcopy(model.state_dict())
    history, refused = page["levenberg_marquardt"](model, X, 9, tries=4)
    assert (history, refused) == ([], 4)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_refuses_what_is_no_number(page):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, X):
            return self.p.sqrt() * X - 0.01 * X

    model, X = Root(), torch.linspace(1, 2, 5)[:, None]
    _, refused = page["levenberg_marquardt"](model, X, 30, mu=1e-6)
    assert refused > 0
    assert_close(model.p.detach(), torch.tensor([1e-4]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype, end", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_fits_several_outputs(page, dtype, end):
    torch.manual_seed(6)
    X, model = torch.randn(11, 7).to(dtype), Fit(20, dtype)
    losses, log = recorder(model, X)
    history, _ = page["levenberg_marquardt"](model, X, 40, log=log)
    assert len(history) == len(losses) and losses == sorted(losses, reverse=True)
    assert losses[-1] < end
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_leaves_frozen_parameters(page):
    torch.manual_seed(7)
    X, model = torch.randn(11, 7), Fit(6)
    model.net[0].requires_grad_(False)
    frozen = copy.deepcopy(model.net[0].state_dict())
    losses, log = recorder(model, X)
    page["levenberg_marquardt"](model, X, 30, log=log)
    assert_close(dict(model.net[0].state_dict()), dict(frozen), rtol=0, atol=0)
    a = torch.cat([model.net[:2](X[:, :4]), torch.ones(11, 1)], dim=1)
    best = a @ torch.linalg.lstsq(a, X[:, 4:]).solution - X[:, 4:]
    assert abs(losses[-1] - best.square().sum().item()) < 1e-8


def test_names_a_wrong_shape(page):
    class Flat(Fit):
        def forward(self, X):
            return super().forward(X).flatten()

    model = Flat(5)
    with pytest.raises(ValueError, match=r"shape \[33\], not \[N=11, C\]"):
        page["levenberg_marquardt"](model, torch.randn(11, 7), 1)


def test_the_solution_leaves_no_residual(page):
    class Exact(nn.Module):
        def forward(self, x):
            return torch.sin(torch.pi * x) / (x * (1 - x))

    X = torch.linspace(0.1, 0.9, 9)[:, None]
    assert_close(page["Residual"](Exact())(X), torch.zeros(9, 1))
    assert page["Residual"](nn.Identity())(X).abs().max() > 0.1


@pytest.mark.parametrize("seed", [8, 9])
def test_solves_the_equation_from_other_starts_and_points(page, seed):
    model, X = page["pinn"](seed), torch.linspace(0, 1, 41)[:, None]
    assert page["error"](model) > 0.1
    page["levenberg_marquardt"](model, X, 30)
    assert page["error"](model) < 1e-4


def test_the_universal_jacobian_takes_the_place_of_the_recipe(page, taught):
    model, X = page["pinn"](seed=10), torch.rand(7, 1)
    batched_jacobian = taught("scale/universal_jacobian")["batched_jacobian"]
    assert_close(dict(batched_jacobian(model, X)), page["vmap_jacrev"](model, X))


def test_ntk_takes_the_place_of_the_product(page, taught):
    torch.manual_seed(11)
    X, model = torch.randn(9, 7).double(), Fit(6)
    J = page["flat_jacobian"](model, X)
    K = taught("scale/neural_tangent_kernel")["ntk"](model, X)
    assert_close(K.flatten(0, 1).flatten(1), J @ J.T)
