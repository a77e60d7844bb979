"""The functions of ``training_predicted.py``, on data that its page does not show."""

import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.testing import assert_close


@pytest.fixture(scope="module")
def names(taught):
    return taught("use/training_predicted")


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def iris():
    """Return 14 flowers with one-hot targets, and 11 more."""
    data = load_iris()
    X = torch.tensor(data.data)[torch.randperm(150)]
    return X[:14], torch.eye(3)[torch.randint(3, (14,))], X[14:25]


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def kernels(names, model, X, Z):
    J, J_test = names["vmap_jacrev"](model, X), names["vmap_jacrev"](model, Z)
    return names["jacobian_kernel"](J, J), names["jacobian_kernel"](J_test, J)


def test_kernel_is_the_inner_product_of_gradients(names):
    X, _, Z = iris()
    model = network()
    _, K_test = kernels(names, model, X, Z)
    assert K_test.shape == (11, 3, 14, 3)
    params = list(model.parameters())
    for m, c, n, d in [(0, 1, 2, 0), (10, 2, 13, 1), (4, 0, 4, 2)]:
        left = torch.autograd.grad(model(Z)[m, c], params)
        right = torch.autograd.grad(model(X)[n, d], params, materialize_grads=True)
        expected = sum((a * b).sum() for a, b in zip(left, right))
        assert_close(K_test[m, c, n, d], expected)


@pytest.mark.parametrize("N", [5, 14])  # K has full rank, and has not
def test_prediction_is_exact_for_a_linear_model(names, N):
    X, targets, Z = iris()
    X, targets = X[:N], targets[:N]
    model, steps = nn.Linear(4, 3), [1, 2, 50]
    K, K_test = kernels(names, model, X, Z)
    error, start = (targets - model(X)).detach(), model(Z).detach()
    lr = names["longest_step"](K)
    change = names["predicted_change"](K, K_test, error, lr, steps)
    for _ in range(50):  # by hand, apart from the page's training
        with torch.no_grad():
            residual = targets - model(X)
            model.weight += lr * residual.T @ X
            model.bias += lr * residual.sum(0)
    assert_close(start + change[-1], model(Z).detach())
    assert change.shape == (3, 11, 3)


def test_trained_outputs_are_those_of_gradient_descent(names):
    X, targets, Z = iris()
    model, steps = nn.Linear(4, 3), [1, 3, 20]
    K, K_test = kernels(names, model, X, Z)
    error, start = (targets - model(X)).detach(), model(Z).detach()
    lr = names["longest_step"](K)
    change = names["predicted_change"](K, K_test, error, lr, steps)
    trained = names["trained_outputs"](model, X, targets, Z, lr, steps)
    assert_close(trained, start + change)
    assert_close(trained[-1], model(Z).detach())


@pytest.mark.parametrize("seed", [11, 12])
def test_wide_network_is_predicted_on_other_data(names, seed):
    torch.manual_seed(seed)
    X, targets, Z = iris()
    X, Z = (X - X.mean(0)) / X.std(0), (Z - X.mean(0)) / X.std(0)
    gaps = []
    for width in 8, 1024:
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        K, K_test = kernels(names, model, X, Z)
        error, start = (targets - model(X)).detach(), model(Z).detach()
        lr = names["longest_step"](K)
        change = names["predicted_change"](K, K_test, error, lr, [200])[0]
        trained = names["trained_outputs"](model, X, targets, Z, lr, [200])[0]
        gaps.append((start + change - trained).norm() / (trained - start).norm())
    assert gaps[1] < 0.05 < gaps[0]


def test_nothing_is_learned_in_no_step_and_all_in_infinitely_many(names):
    X, targets, _ = iris()
    X, targets = X[:4], targets[:4]  # fewer rows than parameters
    model = network()
    K, _ = kernels(names, model, X, X)
    error = (targets - model(X)).detach()
    lr = names["longest_step"](K)
    change = names["predicted_change"](K, K, error, lr, [0, torch.inf])
    assert_close(change, torch.stack([torch.zeros(4, 3), error]))


def test_long_steps_raise(names):
    X, targets, Z = iris()
    K, K_test = kernels(names, network(), X, Z)
    lr = names["longest_step"](K)
    for bad in 1.2 * lr, 0, -lr:
        with pytest.raises(ValueError, match="is not between 0 and"):
            names["predicted_change"](K, K_test, targets, bad, [1])


def test_ntk_takes_the_place_of_the_kernel_from_jacobians(names, taught):
    X, _, Z = iris()
    model = network()
    K, K_test = kernels(names, model, X, Z)
    ntk = taught("scale/neural_tangent_kernel")["ntk"]
    assert_close(ntk(model, X), K)
    assert_close(ntk(model, Z, X), K_test)


def test_arc_cosine_ntk_is_the_mean_over_directions(names):
    # Two Gaussian numbers w in the plane of x and z, whose length integrates to
    # E[r^2] = 2: what is left is a mean over the angle, exact on a fine grid.
    X, Z = torch.randn(3, 2), torch.randn(4, 2)
    angle = torch.arange(0, 2 * torch.pi, 2e-5)
    w = torch.stack([angle.cos(), angle.sin()])
    hidden, hidden_Z = (X @ w).relu(), (Z @ w).relu()
    last = 2 * hidden @ hidden_Z.T / len(angle)
    first = (hidden > 0).double() @ (hidden_Z > 0).double().T / len(angle)
    expected = last + 2 * first * (X @ Z.T) / 2
    assert_close(names["arc_cosine_ntk"](X, Z), expected, rtol=1e-4, atol=1e-4)
    assert names["arc_cosine_ntk"](torch.zeros(1, 2), Z).eq(0).all()


def test_eigenvectors_are_those_of_the_gauss_newton_matrix(names):
    X, _, _ = iris()
    model = network()
    model[0].bias.requires_grad_(False)
    K, _ = kernels(names, model, X, X)
    values, vectors = names["gauss_newton_eigenvectors"](model, X, K, 4)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: v.shape[1:] for name, v in vectors.items()} == {
        name: p.shape for name, p in params.items()
    }
    gauss_newton = 0
    for f in model(X).flatten():
        grads = torch.autograd.grad(f, params.values(), retain_graph=True)
        row = torch.cat([g.flatten() for g in grads])
        gauss_newton = gauss_newton + torch.outer(row, row)
    flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)
    assert_close(flat @ gauss_newton, values[:, None] * flat)
    assert_close(flat @ flat.T, torch.eye(4))
    assert_close(values, torch.linalg.eigvalsh(gauss_newton)[-4:].flip(0))
    assert all(p.grad is None for p in model.parameters())


def test_eigenvectors_below_rounding_raise(names):
    X, _, _ = iris()
    model = nn.Linear(4, 3)  # 15 parameters for 42 rows
    K, _ = kernels(names, model, X, X)
    names["gauss_newton_eigenvectors"](model, X, K, 15)
    with pytest.raises(ValueError, match="k = 16, but only 15 eigenvalues"):
        names["gauss_newton_eigenvectors"](model, X, K, 16)


def test_page_shows_what_it_claims(names):
    errors, linear, same = names["results"].mean(1).T
    assert (errors[1:] < errors[:-1]).all() and (same[1:] >= same[:-1]).all()
    assert errors[-1] < linear[-1]
    double, kernel, single, single_kernel = names["ranks"]
    assert double == kernel > single_kernel
