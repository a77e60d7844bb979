"""The functions of the pages on error bars and on classifiers, on other data."""

import copy
from collections import ChainMap

import numpy
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.testing import assert_close


@pytest.fixture(scope="module")
def page(taught):
    return ChainMap(taught("use/error_bars"), taught("use/classifier_confidence"))


def net(*widths):
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(layers[0], nn.GELU(), *layers[1:]).double()


def dense_jacobian(model, X):
    """Return ``[N, C, P]``, made by another part of autograd."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in params.values()]
    theta = torch.cat([p.flatten() for p in params.values()])

    def outputs(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        values = (part.view(shape) for part, shape in zip(parts, shapes))
        return functional_call(model, dict(zip(params, values)), (X,))

    return jacobian(outputs, theta), theta


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_bars_are_those_of_the_posterior(page, seed, frozen):
    torch.manual_seed(seed)
    model, X, X_new = net(4, 5, 3), torch.randn(11, 4), torch.randn(7, 4)
    Y = model(X).detach() + 0.3 * torch.randn(11, 3)
    model[0].weight.requires_grad_(not frozen)
    before = copy.deepcopy(model.state_dict())
    sd, ridge = page["error_bars"](model, X, Y, X_new)
    J, theta = dense_jacobian(model, X)
    J_new, _ = dense_jacobian(model, X_new)
    H = ridge.lambda_ * torch.eye(len(theta))
    H += ridge.alpha_ * torch.einsum("ncp,ncq->pq", J, J)
    variance = (J_new @ H.inverse() * J_new).sum(2) + 1 / ridge.alpha_
    assert_close(sd, variance.sqrt())
    target = torch.einsum("ncp,nc->p", J, Y - model(X).detach() + J @ theta)
    mean = ridge.alpha_ * torch.linalg.solve(H, target)
    assert_close(torch.from_numpy(ridge.coef_).norm(), mean.norm())  # turned by Q
    assert ridge.n_features_in_ == min(J[..., 0].numel(), len(theta))  # and not P
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_evidence_is_at_its_maximum(page):
    torch.manual_seed(3)
    model, X = net(3, 6, 2), torch.randn(40, 3)
    Y = model(X).detach() + 0.5 * torch.randn(40, 2)
    _, ridge = page["error_bars"](model, X, Y, X)
    J, theta = dense_jacobian(model, X)
    target = (Y - model(X).detach() + J @ theta).flatten()
    K = torch.einsum("np,mp->nm", J.flatten(0, 1), J.flatten(0, 1))

    def evidence(prior, noise):
        normal = torch.distributions.MultivariateNormal(
            torch.zeros(80), prior * K + noise * torch.eye(80)
        )
        return normal.log_prob(target)

    best = [1 / ridge.lambda_, 1 / ridge.alpha_]
    for factors in (1.5, 1), (1 / 1.5, 1), (1, 1.5), (1, 1 / 1.5):
        other = [b * factor for b, factor in zip(best, factors)]
        assert evidence(*best) > evidence(*other)


def test_keeps_the_dtype_and_names_wrong_shapes(page):
    torch.manual_seed(4)
    model, X, Y = net(4, 5, 3).float(), torch.randn(9, 4).float(), torch.randn(9, 3)
    sd, _ = page["error_bars"](model, X, Y.float(), X[:2])
    assert sd.shape == (2, 3) and sd.dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[9\], model\(X\) \[9, 3\]"):
        page["error_bars"](model, X, Y[:, 0].float(), X)


def test_covers_for_other_seeds(page):
    results = []
    for seed in 21, 22, 23:
        torch.manual_seed(seed)
        X, Y, X_test, Y_test = page["split"](seed)
        model = page["regression"](X, Y)
        sd, _ = page["error_bars"](model, X, Y, X_test)
        fs, residual = model(X_test).detach(), (Y - model(X)).detach().std()
        plain, laplace = (page["score"](Y_test, fs, bar) for bar in (residual, sd))
        assert plain[0] < 0.85 and 0.9 < laplace[0] < 1 and laplace[1] < plain[1]
        results.append(laplace[0])
    assert abs(torch.stack(results).mean() - 0.95) < 0.04


def test_score_is_that_of_a_normal_distribution(page):
    torch.manual_seed(5)
    fs, sd = torch.randn(5000, 1), torch.rand(5000, 1) + 0.5
    Y = fs + sd * torch.randn(5000, 1)
    coverage, nll = page["score"](Y, fs, sd)
    assert_close(nll, -torch.distributions.Normal(fs, sd).log_prob(Y).mean())
    assert abs(coverage - 0.95) < 0.01


def laplace_softmax(page, model, X, X_new, *args, **options):
    H = page["softmax_ggn"](model, X)
    return page["laplace_softmax"](model, H, X_new, *args, **options)


@pytest.mark.parametrize("N", [8, 150])  # in one chunk, and in three
def test_ggn_is_the_hessian_of_the_linear_model(page, N):
    torch.manual_seed(6)
    model, X = net(3, 4, 5), torch.randn(N, 3)
    J, theta = dense_jacobian(model, X)
    fs, y = model(X).detach(), torch.arange(N) % 5

    def loss(change):
        return cross_entropy(fs + J @ change, y, reduction="sum")

    H = page["softmax_ggn"](model, X)
    assert_close(H, hessian(loss, torch.zeros_like(theta)))


def test_new_samples_in_chunks_are_all_samples(page):
    torch.manual_seed(0)
    model, X, X_new = net(4, 5, 3), torch.randn(9, 4), torch.randn(70, 4)
    H = page["softmax_ggn"](model, X)
    before = H.clone()
    fs, J, _ = page["linearized"](model, X_new)
    drawn = page["draws_of_parameters"](H + 0.5 * torch.eye(len(H)), 500)
    found = page["laplace_softmax"](model, H, X_new, 0.5)
    assert_close(found, page["confidence"](J, fs, drawn))
    assert_close(H, before, rtol=0, atol=0)


def test_confidence_is_the_integral(page):
    drawn = page["draws_of_parameters"]
    torch.manual_seed(7)
    model, X = net(3, 4, 2), torch.randn(6, 3)
    J, theta = dense_jacobian(model, X)
    fs = 3 * model(X).detach()
    S = torch.randn(len(theta), len(theta))
    scale = torch.linspace(0.5, 0.01, len(theta))  # far from a multiple of the identity
    S = scale[:, None] * (S @ S.T) * scale
    difference = J[:, 0] - J[:, 1]
    sd = (difference @ S * difference).sum(1).sqrt()
    points, weights = map(torch.tensor, numpy.polynomial.hermite_e.hermegauss(60))
    logits = (fs[:, 0] - fs[:, 1])[:, None] + sd[:, None] * points
    exact = (logits.sigmoid() * weights).sum(1) / weights.sum()
    assert_close(
        page["confidence"](J, fs, drawn(S.inverse(), 40000))[:, 0],
        exact,
        rtol=0,
        atol=0.003,
    )
    sure = drawn(1e20 * S.inverse(), 500)
    assert_close(page["confidence"](J, fs, sure), fs.softmax(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_softmax_is_averaged_over_the_posterior(page, frozen):
    torch.manual_seed(10)
    model, X, X_new = net(3, 4, 2), torch.randn(9, 3), 4 * torch.randn(6, 3)
    model[0].weight.requires_grad_(not frozen)
    before = copy.deepcopy(model.state_dict())
    options = {"precision": 0.7, "draws": 40000}
    found = laplace_softmax(page, model, X, X_new, **options)
    J, theta = dense_jacobian(model, X)
    fs, y = model(X).detach(), torch.arange(9) % 2

    def loss(change):
        data = cross_entropy(fs + J @ change, y, reduction="sum")
        return data + 0.35 * (theta + change).square().sum()

    S = hessian(loss, torch.zeros_like(theta)).inverse()
    J, _ = dense_jacobian(model, X_new)
    fs, difference = model(X_new).detach(), J[:, 0] - J[:, 1]
    sd = (difference @ S * difference).sum(1).sqrt()
    assert sd.max() > 1
    points, weights = map(torch.tensor, numpy.polynomial.hermite_e.hermegauss(60))
    logits = (fs[:, 0] - fs[:, 1])[:, None] + sd[:, None] * points
    exact = (logits.sigmoid() * weights).sum(1) / weights.sum()
    assert_close(found[:, 0], exact, rtol=0, atol=0.005)
    assert_close(found.sum(1), torch.ones(6))
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_strong_prior_leaves_the_softmax(page):
    torch.manual_seed(11)
    model, X, X_new = net(3, 4, 5), torch.randn(9, 3), torch.randn(6, 3)
    found = laplace_softmax(page, model, X, X_new, precision=1e20)
    assert_close(found, model(X_new).detach().softmax(1))


def test_single_precision(page):
    torch.manual_seed(12)
    model, X, X_new = net(4, 30, 3), torch.randn(20, 4), 3 * torch.randn(7, 4)
    Y = model(X).detach() + 0.3 * torch.randn(20, 3)
    single = copy.deepcopy(model).float()
    x, x_new = X.float(), X_new.float()
    sd, _ = page["error_bars"](model, X, Y, X_new)
    small, _ = page["error_bars"](single, x, Y.float(), x_new)
    assert_close(small, sd.float(), rtol=1e-4, atol=0)
    p = laplace_softmax(page, model, X, X_new, 0.1)
    small = laplace_softmax(page, single, x, x_new, 0.1)
    assert_close(small, p.float(), rtol=1e-4, atol=1e-5)


class Returns(nn.Linear):
    """A linear layer of which ``change`` makes something else than ``[N, C]``."""

    def __init__(self, change):
        super().__init__(4, 3, dtype=torch.float64)
        self.change = change

    def forward(self, X):
        return self.change(super().forward(X))


X, X_NEW, Y = torch.ones(9, 4).double(), torch.ones(2, 4).double(), torch.ones(9, 3)
BARS, GGN, SOFTMAX = "error_bars", "softmax_ggn", "laplace_softmax"
BAD = [
    ([BARS], {"X_new": X_NEW[0]}, r"X has shape \[9, 4\], X_new \[4\]: both must"),
    ([BARS], {"X_new": X_NEW[:, :3]}, r"X has shape \[9, 4\], X_new \[2, 3\]"),
    ([BARS], {"X_new": X_NEW[:0]}, r"X_new \[0, 4\]: both must hold samples"),
    ([BARS], {"X": X[:0]}, r"X has shape \[0, 4\]"),
    ([BARS, GGN], {"model": Returns(lambda fs: fs[:, 0])}, r"=9, C\], but is \[9\]"),
    ([BARS, GGN], {"model": Returns(lambda fs: fs[:1])}, r"=9, C\], but is \[1, 3\]"),
    ([BARS, GGN], {"model": Returns(lambda fs: (fs,))}, r"=9, C\], but is tuple"),
    ([BARS, GGN], {"model": net(4, 3).requires_grad_(False)}, "no parameter of the"),
    ([BARS], {"Y": Y[:, :1]}, r"Y has shape \[9, 1\], model\(X\) \[9, 3\]"),
    ([BARS], {"Y": Y[:8]}, r"Y has shape \[8, 3\], model\(X\) \[9, 3\]"),
    ([GGN], {"model": net(4, 1)}, r"model\(X\) has shape \[9, 1\]: softmax needs"),
    ([GGN], {"X": X[:0]}, "X holds no samples"),
    ([SOFTMAX], {"X_new": X_NEW[:0]}, "X_new holds no samples"),
    ([SOFTMAX], {"H": torch.eye(4)}, r"H must be \[15, 15\], but is \[4, 4\]"),
    ([SOFTMAX], {"precision": 0}, "precision=0 and draws=500 must be positive"),
    ([SOFTMAX], {"precision": float("nan")}, "precision=nan and draws=500 must be"),
    ([SOFTMAX], {"draws": 0}, "precision=0.1 and draws=0 must be positive"),
]
GOOD = {
    BARS: {"X": X, "Y": Y, "X_new": X_NEW},
    GGN: {"X": X},
    SOFTMAX: {"H": torch.eye(15), "X_new": X_NEW, "precision": 0.1},
}


@pytest.mark.parametrize(
    ("function", "bad", "text"), [(f, *case) for fs, *case in BAD for f in fs]
)
def test_bad_arguments_are_named(page, function, bad, text):
    with pytest.raises(ValueError, match=text):
        page[function](**({"model": net(4, 3)} | GOOD[function] | bad))


@pytest.mark.parametrize("N, D, C", [(7, 3, 5), (4, 6, 2)])
def test_last_layer_needs_no_jacobian(page, N, D, C):
    torch.manual_seed(8)
    model, X, X_new = net(3, D, C), torch.randn(N, 3), torch.randn(11, 3)
    phi, fs = page["last_inputs"](model, model[-1], X), model(X).detach()
    phi_new, fs_new = page["last_inputs"](model, model[-1], X_new), model(X_new)
    _ = model[:-1].requires_grad_(False)
    J, _ = dense_jacobian(model, X_new)  # weight [C, D], then bias [C]
    J = torch.cat([J[..., :-C].unflatten(2, (C, D)), J[..., -C:, None]], 3).flatten(2)
    y = torch.arange(N) % C
    B = sum(hessian(lambda f: cross_entropy(f[None], y[:1]), f) for f in fs) / N
    S = torch.kron(B, phi.T @ phi) + 0.4 * torch.eye(C * (D + 1))
    covariance = torch.einsum("ncp,pq,ndq->ncd", J, S.inverse(), J)
    factors = page["kronecker_factors"](phi, fs)
    variance, U = page["kronecker_variance"](factors, phi_new, 0.4), factors[1]
    assert_close(U.T @ covariance @ U, variance.diag_embed())
    found = page["kronecker_softmax"](factors, phi_new, fs_new, 0.4, draws=20000)
    normal = torch.distributions.MultivariateNormal(fs_new.detach(), covariance)
    assert_close(found, normal.sample((20000,)).softmax(2).mean(0), atol=0.02, rtol=0)
    floats = phi_new.float(), fs_new.float()
    single = page["kronecker_softmax"](factors, *floats, 0.4, draws=20000)
    assert single.dtype == torch.float32
    assert_close(single.double(), found, atol=0.02, rtol=0)


def test_tokens_are_samples(page):
    model, X = net(3, 4, 5), torch.rand(6, 2, 3)
    phi = page["last_inputs"](model, model[-1], X)
    assert_close(phi, page["last_inputs"](model, model[-1], X.flatten(0, 1)))
    with pytest.raises(
        ValueError, match=r"logits \[6, 2, 5\] do not fit phi \[12, 5\]"
    ):
        page["kronecker_factors"](phi, model(X))


def test_the_universal_jacobian_takes_the_place_of_the_recipe(page, taught):
    torch.manual_seed(9)
    model, X = net(3, 5, 4), torch.randn(7, 3)
    batched_jacobian = taught("scale/universal_jacobian")["batched_jacobian"]
    J = page["vmap_jacrev"](model, X)
    assert_close(dict(batched_jacobian(model, X)), J)
    ntk = taught("scale/neural_tangent_kernel")["ntk"]
    rows = torch.cat([block.flatten(2) for block in J.values()], 2).flatten(0, 1)
    assert_close(ntk(model, X).flatten(0, 1).flatten(1), rows @ rows.T)


def test_laplace_is_better_than_the_softmax_on_unseen_flowers(page):
    assert page["choice"] not in (0.1, 100)  # neither end
    assert page["losses"]["Laplace"] < 0.7 * page["losses"]["softmax"]


@pytest.mark.parametrize("kind", ["full_backward_hook", "backward_hook"])
@pytest.mark.filterwarnings("ignore:.*non-full backward hooks")
def test_hooks_of_modules_change_no_bar(page, kind):
    torch.manual_seed(0)
    model, X, X_new = net(4, 5, 3), torch.randn(11, 4), torch.randn(7, 4)
    Y = model(X).detach() + 0.3 * torch.randn(11, 3)
    bars, fit = page["error_bars"](model, X, Y, X_new)
    probabilities = laplace_softmax(page, model, X, X_new, 0.5)
    register = getattr(model[2], f"register_{kind}")
    hook = register(lambda layer, to_inputs, to_outputs: (to_inputs[0] / 2,))
    assert_close(page["error_bars"](model, X, Y, X_new)[0], bars)
    assert_close(laplace_softmax(page, model, X, X_new, 0.5), probabilities)
    assert hook.id in model[2]._backward_hooks
