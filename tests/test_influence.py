"""The functions of ``influence.py``, on other data and seeds than the page's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close


@pytest.fixture(scope="module")
def names(taught):
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield taught("use/influence")
    torch.set_default_dtype(default)
    torch.set_num_threads(threads)


def make(seed, N=11, D=5, C=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()
    return model, torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))


@pytest.mark.parametrize("seed", [3, 4])
def test_linear_layers_are_exact(seed, names):
    torch.manual_seed(seed)
    N, D, C, decay = 13, 4, 2, 0.7
    X, Y = torch.randn(N, D).double(), torch.randn(N, C).double()
    ridge = {"alpha": decay, "fit_intercept": False, "solver": "svd"}
    linear = nn.Linear(D, C, bias=False).double()
    fitted = Ridge(**ridge).fit(X.numpy(), Y.numpy())
    e = torch.from_numpy(fitted.predict(X.numpy())) - Y
    rows = names["flat"](names["vmap_jacrev"](linear, X))
    L = torch.eye(C).double().expand(N, C, C)
    steps = names["steps_without"](rows, L, e, decay)
    for n in range(N):
        keep = np.arange(N) != n
        other = Ridge(**ridge).fit(X[keep].numpy(), Y[keep].numpy())
        assert_close(steps[n], torch.from_numpy(other.coef_ - fitted.coef_).flatten())


@pytest.mark.parametrize("decay", [0.1, 3.0])
def test_steps_solve_the_system_without_the_sample(decay, names):
    model, X, y = make(seed=5)
    e, L = names["derivatives"](model(X), y)
    rows = names["flat"](names["vmap_jacrev"](model, X))
    steps = names["steps_without"](rows, L, e, decay)
    for n in range(len(X)):
        keep = torch.arange(len(X)) != n
        G = sum(J.T @ H @ J for J, H in zip(rows[keep], L[keep]))
        G = G + decay * torch.eye(rows.shape[2]).double()
        assert_close(G @ steps[n], rows[n].T @ e[n])


def test_derivatives_are_those_of_the_loss(names):
    model, X, y = make(seed=6)
    fs = model(X).detach()
    e, L = names["derivatives"](fs, y)
    for n in range(len(X)):

        def loss(f, n=n):
            return cross_entropy(f, y[n])

        assert_close(e[n], torch.func.grad(loss)(fs[n]))
        assert_close(L[n], torch.func.jacrev(torch.func.jacrev(loss))(fs[n]))


def test_projection_is_one_seeded_matrix(names):
    model, X, _ = make(seed=7)
    jacobian = names["vmap_jacrev"](model, X)
    P = sum(p.numel() for p in model.parameters())
    eye = dict(zip(jacobian, torch.eye(P).double().split([20, 4, 12, 3], 1)))
    R = names["project"]({k: b[:, None] for k, b in eye.items()}, 6, seed=1)[:, 0]
    assert_close(names["project"](jacobian, 6, 1), names["flat"](jacobian) @ R)
    assert not torch.allclose(
        names["project"](jacobian, 6, 2), names["flat"](jacobian) @ R
    )
    wide = names["project"]({k: b[:, None] for k, b in eye.items()}, 20000, seed=3)[
        :, 0
    ]
    assert ((wide @ wide.T) - torch.eye(P)).abs().max() < 0.05


def test_single_precision(names):
    model, X, y = make(seed=9)
    e, L = names["derivatives"](model(X), y)
    rows = names["flat"](names["vmap_jacrev"](model, X))
    steps = names["steps_without"](rows, L, e, 2.0)
    small = names["steps_without"](rows.float(), L.float(), e.float(), 2.0)
    assert_close(small, steps.float(), rtol=1e-4, atol=1e-5)
    jacobian = {"p": rows.float()}
    assert names["project"](jacobian, 6, 1).dtype == torch.float32


def test_another_seed_predicts_what_training_again_does(names):
    guesses, change = names["retraining_study"](seed=11, count=10)
    assert names["correlation"](guesses["influence"], change) > 0.8


def test_training_ends_at_an_optimum(names):
    model, X, y = make(seed=10)
    names["optimum"](model, X, y, decay=0.3)
    squares = sum(p.square().sum() for p in model.parameters())
    objective = cross_entropy(model(X), y, reduction="sum") + 0.15 * squares
    grads = torch.autograd.grad(objective, list(model.parameters()))
    assert max(grad.abs().max() for grad in grads) < 1e-3


def test_the_universal_jacobian_takes_the_place_of_the_recipe(names, taught):
    model, X, _ = make(seed=12)
    batched_jacobian = taught("scale/universal_jacobian")["batched_jacobian"]
    assert_close(dict(batched_jacobian(model, X)), names["vmap_jacrev"](model, X))


def test_kernel_gives_the_same_step(names, taught):
    model, X, y = make(seed=13)
    e, L = names["derivatives"](model(X), y)
    rows = names["flat"](names["vmap_jacrev"](model, X))
    steps = names["steps_without"](rows, L, e, 0.9)
    ntk = taught("scale/neural_tangent_kernel")["ntk"]
    K = ntk(model, X).flatten(0, 1).flatten(1) / 0.9
    n, C = 4, rows.shape[1]
    keep = torch.arange(len(K)) // C != n
    blocks = torch.block_diag(*L[torch.arange(len(X)) != n])
    inner = torch.eye(len(blocks)).double() + blocks @ K[keep][:, keep]
    weights = torch.zeros(len(K)).double()
    weights[~keep] = e[n]
    middle = K[keep][:, ~keep] @ e[n]
    weights[keep] = -torch.linalg.solve(inner, blocks @ middle)
    assert_close(steps[n], weights @ rows.flatten(0, 1) / 0.9)


def test_rows_from_disk_sum_to_the_same_matrix(names, taught, tmp_path):
    model, X, y = make(seed=14)
    _, L = names["derivatives"](model(X), y)
    J = names["vmap_jacrev"](model, X)
    files = {
        name: torch.from_numpy(
            np.memmap(tmp_path / name, "float64", "w+", shape=tuple(block.shape))
        )
        for name, block in J.items()
    }
    memory = taught("scale/jacobians_without_memory")
    memory["write_jacobian"](model, X, files, size=(4, 2))
    G = 1.5 * torch.eye(sum(p.numel() for p in model.parameters())).double()
    for n in range(0, len(X), 4):
        rows = names["flat"]({name: file[n : n + 4] for name, file in files.items()})
        G += names["gauss_newton"](rows, L[n : n + 4], decay=0)
    assert_close(G, names["gauss_newton"](names["flat"](J), L, decay=1.5))


def test_page_shows_what_it_claims(names):
    each = [names["correlation"](g["influence"], c) for g, c in names["studies"]]
    assert min(each) > 0.9
    for rival in "gradients", "own loss":
        rivals = [names["correlation"](g[rival], c) for g, c in names["studies"]]
        assert np.mean(each) > np.mean(rivals)
    harmful, random = names["right"]
    assert harmful > len(names["wrong"]) / 3 and harmful > 3 * random
    means = [np.mean(names["found"][k]) for k in names["sizes"]]
    assert means == sorted(means)
    assert names["each"] < 0.8  # with a weak decay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_the_steps(dtype, names):
    model, X, y = make(seed=8, N=20)
    names["optimum"](model, X, y, 0.5)
    e, L = names["derivatives"](model(X), y)
    rows = names["flat"](names["vmap_jacrev"](model, X))
    X_test, y_test = X[:4].sin(), y[4:8]
    g = names["gradient"](model, X_test, y_test)
    expected = names["steps_without"](rows, L, e, 0.5) @ g
    args = (X.to(dtype), y, X_test.to(dtype), y_test, 0.5)
    scores = names["influence"](model.to(dtype), *args)
    assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_scores_of_the_last_layer_alone(names):
    model, X, y = make(seed=9, N=20)
    names["optimum"](model, X, y, 0.5)
    last, hidden = model[-1], model[:-1](X).detach()
    expected = names["influence"](last, hidden, y, hidden[:4], y[:4], 0.5)
    _ = model[:-1].requires_grad_(False)
    assert_close(names["influence"](model, X, y, X[:4], y[:4], 0.5), expected)


def test_the_last_layer_of_a_relu_network_has_an_optimum(names):
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    X, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
    _ = model[:-1].requires_grad_(False)
    names["optimum"](model, X, y, 1.0)
    scores = names["influence"](model, X, y, X[:6].cos(), y[:6], 1.0)
    assert scores.isfinite().all() and (scores != 0).any()


def test_a_model_that_is_not_at_its_optimum_is_refused(names):
    model, X, y = make(seed=10)
    with pytest.raises(ValueError, match="not at its optimum: a gradient of"):
        names["influence"](model, X, y, X, y, 1.0)


@pytest.mark.parametrize("labels", [torch.tensor(1), torch.tensor([1, 0])])
def test_labels_of_another_shape_are_refused(labels, names):
    model, X, y = make(seed=11)
    names["optimum"](model, X, y, 1.0)
    with pytest.raises(ValueError, match=r"labels must have the shape \[N\], but have"):
        names["influence"](model, X, y, X[:3], labels, 1.0)


@pytest.mark.parametrize(
    "y", [torch.rand(9, 1), torch.rand(9), torch.ones(9, 1).long()]
)
def test_what_is_no_label_is_refused_by_the_training(y, names):
    model, X = nn.Linear(4, 3), torch.rand(9, 4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"y must be labels \[N\], but is \[9"):
        names["optimum"](model, X, y, 10.0)
    assert all(map(torch.equal, before, model.parameters()))


class Keeps(nn.Linear):
    def forward(self, X):
        self.kept = super().forward(X)
        return self.kept


def test_a_kept_tensor_and_hooks_stay_and_change_nothing(names):
    model, X = (
        nn.Sequential(Keeps(13, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        torch.randn(15, 13).double(),
    )
    y, y_test = torch.tensor([0, 1, 2] * 5), torch.tensor([2, 1])
    names["optimum"](model, X, y, 1.0)

    def result():
        return names["influence"](model, X, y, X[:2], y_test, 1.0)

    plain = result()
    model(X)
    kept = model[0].kept
    hook = model[2].register_full_backward_hook(lambda layer, to, of: (7 * to[0],))
    assert_close(result(), plain)
    assert model[0].kept is kept and hook.id in model[2]._backward_hooks
