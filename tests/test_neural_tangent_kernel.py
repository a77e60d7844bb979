"""Kernel, factors and norms, on models that the page lacks, and bad input."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import autograd, nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

N, M, C = 5, 4, 3


@pytest.fixture(scope="module")
def names(taught):
    return taught("scale/neural_tangent_kernel")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(4)
    yield
    torch.set_default_dtype(before)


def rows(names, model, X):
    """Return J as real numbers ``[N, C, P]``, from the definition."""
    J = names["autograd_loop"](model, X)
    blocks = [torch.view_as_real(b) if b.is_complex() else b for b in J.values()]
    return torch.cat([block.reshape(*block.shape[:2], -1) for block in blocks], dim=2)


def inner(left, right):
    return torch.einsum("ncp,mdp->ncmd", left, right)


class Own(nn.Module):
    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, X):
        return self.function(self, X)


def flat(*layers, shape):
    model = nn.Sequential(*layers, nn.Flatten()).double()
    model.append(nn.Linear(model(torch.rand(2, *shape)).shape[1], C))
    return model


def pruned():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def hooked():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    for p in model.parameters():
        p.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    return model


def partly_frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


MODELS = {
    "strides, dilation, padding": (
        partial(
            flat,
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2, bias=False),
            shape=(2, 7, 6),
        ),
        (2, 7, 6),
    ),
    "groups, circular, same": (
        partial(
            flat,
            nn.Conv2d(2, 4, 3, groups=2),
            nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(3, 2, 3, padding="same"),
            shape=(2, 6, 5),
        ),
        (2, 6, 5),
    ),
    "sequence": (partial(flat, nn.Linear(4, 6), nn.GELU(), shape=(7, 4)), (7, 4)),
    "recurrent": (
        lambda: Own(lambda m, X: m.a(X)[0][:, -1], a=nn.GRU(4, C, batch_first=True)),
        (6, 4),
    ),
    "weight outside of its layer": (
        lambda: Own(lambda m, X: m.a(X) + X.tanh() @ m.a.weight.T, a=nn.Linear(4, C)),
        (4,),
    ),
    "complex": (
        lambda: Own(
            lambda m, X: (torch.exp(1j * X) @ m.w).abs() ** 2 + m.b(X),
            w=nn.Parameter(torch.randn(4, C, dtype=torch.cdouble)),
            b=nn.Linear(4, C),
        ),
        (4,),
    ),
    "scalar": (
        lambda: Own(
            lambda m, X: m.a(X) * m.t, a=nn.Linear(4, C), t=nn.Parameter(torch.rand(()))
        ),
        (4,),
    ),
    "pruned": (pruned, (4,)),
    "hooks of parameters": (hooked, (4,)),
    "partly frozen": (partly_frozen, (4,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_kernel_and_norms_are_right_and_leave_the_model(name, names):
    make, shape = MODELS[name]
    torch.manual_seed(5)
    plain = make()
    torch.manual_seed(5)
    model, X, Z = make(), torch.rand(N, *shape), torch.rand(M, *shape)
    for p in plain.parameters():
        p._backward_hooks = None
    J, J_Z = rows(names, plain, X), rows(names, plain, Z)
    before = [t.clone() for t in (X, *model.state_dict().values())]
    assert_close(names["ntk"](model, X), inner(J, J))
    assert_close(names["ntk"](model, X, Z), inner(J, J_Z))
    traced = torch.einsum("ncmc->nm", inner(J, J_Z))
    assert_close(names["ntk"](model, X, Z, traced=True), traced)
    assert_close(names["squared_norms"](model, X), J.square().sum(2))
    u = torch.rand(N, C)
    of_sums = torch.einsum("nc,ncp->np", u, J).square().sum(1)
    assert_close(names["squared_norms"](model, X, u), of_sums)
    assert_close([X, *model.state_dict().values()], before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["strides, dilation, padding", "sequence"])
def test_factors_from_few_samples_at_once_are_the_same(name, names, monkeypatch):
    make, shape = MODELS[name]
    model, X = make(), torch.rand(N, *shape)
    expected = names["ntk"](model, X)
    monkeypatch.setitem(names["jacobian_factors"].__globals__, "AT_ONCE", 1)
    assert_close(names["ntk"](model, X), expected)


def test_pixels_of_all_samples_are_never_there_at_once(names, taught, monkeypatch):
    conv = nn.Conv2d(2, 9, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, X = nn.Sequential(*conv, nn.Linear(9, 20)), torch.rand(60, 2, 50, 50)
    monkeypatch.setitem(names["jacobian_factors"].__globals__, "AT_ONCE", 2**19)
    peak = taught("scale/jacobians_without_memory")["peak_bytes"]
    contracted = peak(names["contracted"], model, X)
    assert peak(names["ntk"], model, X) < 0.5 * contracted


def test_cost_bounds_the_peak_of_one_batch_and_of_two(names, taught):
    peak = taught("scale/jacobians_without_memory")["peak_bytes"]
    conv = nn.Conv2d(3, 16, 3, stride=2), nn.Tanh(), nn.Conv2d(16, 24, 3, stride=2)
    pooled = nn.Conv2d(3, 16, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)
    for layers, width in (conv, 24 * 36), (pooled, 16):
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 5))
        X, Z = torch.rand(150, 3, 28, 28), torch.rand(40, 3, 28, 28)
        for others in [], [Z]:
            cost = names["ntk_cost"](model, X[:32], len(X), *map(len, others))
            found = peak(names["ntk"], model, X, *others)
            assert found <= cost["bytes"] < 3 * found + 400e6
            assert cost["seconds"] > 0


def test_every_case_of_layer_support(names, taught):
    cases = taught("trust/layer_support")["cases"]
    for name, case in cases.items():
        model, X = case()
        torch.manual_seed(1)
        model(X)  # an embedding with max_norm changes its weight
        torch.manual_seed(1)
        J = rows(names, model, X)
        torch.manual_seed(1)
        K = names["ntk"](model, X)
        assert_close(K, inner(J, J), msg=lambda text, name=name: f"{name}: {text}")


def test_structure_serves_wide_layers(names):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, C))
    factors, blocks = names["jacobian_factors"](model, torch.rand(N, 20))
    assert set(factors) == {("0.weight", "0.bias"), ("2.weight", "2.bias")}
    assert not blocks
    dense = names["jacobian_factors"](model, torch.rand(N, 20), structure=False)
    assert not dense[0] and set(dense[1]) == set(dict(model.named_parameters()))


def test_parameters_that_are_written_in_each_call(names):
    def masked(m, X):
        m.layer.weight.data *= torch.arange(4) < 3
        return m.layer(X)

    model, X = Own(masked, layer=nn.Linear(4, C)), torch.rand(N, 4)
    K = names["ntk"](model, X)
    assert_close(K, inner(*[rows(names, model, X)] * 2))


class Mean(nn.Module):
    """Linear layers for each position, and the mean over positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(15, 20), nn.Linear(20, 6)

    def forward(self, X):
        return self.last(torch.tanh(self.first(X)).mean(1))


def test_sets_with_other_numbers_of_positions(names):
    model, X, Z = Mean(), torch.rand(N, 4, 15), torch.rand(M, 3, 15)
    assert names["jacobian_factors"](model, X)[0].keys() == {
        ("first.weight", "first.bias"),
        ("last.weight", "last.bias"),
    }
    J, J_Z = rows(names, model, X), rows(names, model, Z)
    assert_close(names["ntk"](model, X, Z), inner(J, J_Z))
    assert_close(names["ntk"](model, Z, X), inner(J_Z, J))
    assert_close(names["ntk"](model, X), inner(J, J))


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_tiles_make_up_the_kernel(samples, names):
    model, X = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)),
        torch.rand(N, 4),
    )
    K = names["ntk"](model, X)
    whole, traced = torch.empty(N, C, N, C), torch.empty(N, N)
    names["write_ntk"](model, X, whole, samples)
    names["write_ntk"](model, X, traced, samples)
    assert_close(whole, K)
    assert_close(traced, torch.einsum("ncmc->nm", K))
    with pytest.raises(ValueError, match=r"out is \[5, 3\], not"):
        names["write_ntk"](model, X, torch.empty(N, C), samples)


def test_wrong_factors_cost_time_not_truth(names):
    function, right = names["jacobian_factors"], names["by_position"]

    def broken(layer, delta, a):
        delta, a = right(layer, delta, a)
        return 1.01 * delta, a

    model, X = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, C)), None
    X = torch.rand(N, 20)
    J = rows(names, model, X)
    right.__globals__["by_position"] = broken
    try:
        factors, _ = function(model, X)
        assert not factors
        assert_close(names["ntk"](model, X), inner(J, J))
    finally:
        right.__globals__["by_position"] = right


def test_real_sizes_in_float32_keep_their_factors(names):
    torch.set_default_dtype(torch.float32)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    last = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    pooled = nn.Sequential(*convs, *last), torch.rand(8, 3, 32, 32)
    wide = nn.Sequential(nn.Linear(200, 90), nn.ReLU(), nn.Linear(90, 10))
    for model, X in pooled, (wide, torch.rand(8, 200)):
        double = copy.deepcopy(model).double()
        J = rows(names, double, X.double())
        error = names["ntk"](model, X).double() - inner(J, J)
        assert error.norm() < 1e-5 * inner(J, J).norm()
    assert len(names["jacobian_factors"](wide, X)[0]) == 2


def keep(m, X):
    m.kept = m.a(X)
    return m.kept


def test_models_that_have_run_and_keep_tensors_of_the_graph(names):
    with warnings.catch_warnings(action="ignore"):
        normed = nn.utils.weight_norm(nn.Linear(4, C))
    for model in Own(keep, a=nn.Linear(4, C)), normed:
        X = torch.rand(N, 4)
        fs = model(X)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
        K, norms = names["ntk"](model, X), names["squared_norms"](model, X)
        fs.sum().backward()  # its graph is as it was
        J = rows(names, model, X)
        assert_close(K, inner(J, J))
        assert_close(norms, J.square().sum(2))


def residual(m, X):
    """A residual as of a PINN, with a gradient inside."""
    u = m.b(torch.tanh(m.a(X)))
    (slope,) = autograd.grad(u.sum(), X, create_graph=True)
    return u + slope[:, :1]


def test_gradient_inside(names):
    model, X = Own(residual, a=nn.Linear(4, 7), b=nn.Linear(7, C)), torch.rand(N, 4)
    J = rows(names, model, X.clone().requires_grad_())
    assert_close(names["ntk"](model, X), inner(J, J))
    out = torch.empty(N, C, N, C)
    names["write_ntk"](model, X, out, 2)
    assert_close(out, inner(J, J))


def test_sparse_gradients(names):
    words = nn.Embedding(9, 4)
    model, X = nn.Sequential(words, nn.Flatten(), nn.Linear(8, C)), torch.arange(8)
    X = X.view(4, 2)
    J = rows(names, model, X)
    words.sparse = True
    assert_close(names["ntk"](model, X), inner(J, J))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_inside(mode, names):
    model, X = partly_frozen(), torch.rand(N, 4)
    J, out = rows(names, model, X), torch.empty(N, C, N, C)
    with mode():
        assert_close(names["ntk"](model, X.clone()), inner(J, J))
        names["write_ntk"](model, X.clone(), out, 2)
        assert_close(names["squared_norms"](model, X.clone()), J.square().sum(2))
    assert_close(out, inner(J, J))


def test_embedding_of_many_words_has_factors(names):
    """Its blocks would take 15 times as many numbers."""
    model = nn.Sequential(nn.Embedding(4000, 16), nn.Flatten(), nn.Linear(48, C))
    factors, blocks = names["jacobian_factors"](model, torch.randint(4000, (N, 3)))
    assert set(factors) == {("0.weight",), ("2.weight", "2.bias")} and not blocks
    numbers = sum(t.numel() for pair in factors.values() for t in pair)
    assert 15 * numbers < N * C * sum(p.numel() for p in model.parameters())


def test_one_type_under_autocast(names):
    torch.set_default_dtype(torch.float32)
    wide = nn.Linear(4, 30), nn.LayerNorm(30), nn.Linear(30, 20), nn.Linear(20, C)
    model, X = nn.Sequential(*wide), torch.rand(N, 4)
    J = rows(names, model, X)
    with torch.autocast("cpu", torch.bfloat16):
        factors, blocks = names["jacobian_factors"](model, X)
        K = names["ntk"](model, X)
    tensors = [*sum(factors.values(), []), *blocks.values()]
    assert {tensor.dtype for tensor in [*tensors, K]} == {torch.bfloat16}
    assert (K - inner(J, J)).norm() < 0.05 * inner(J, J).norm()


def act_norm(m, X):
    if not m.ready:
        m.shift.data, m.ready = X.detach().mean(0), True
    return m.a(X - m.shift)


def test_tiles_of_a_model_that_its_first_batch_sets_raise(names):
    shift, out = nn.Parameter(torch.zeros(4)), torch.zeros(N, N)
    model = Own(act_norm, a=nn.Linear(4, C), shift=shift, ready=False)
    X = torch.rand(N, 4)
    with pytest.raises(ValueError, match="samples influence each other"):
        names["write_ntk"](model, X, out, 2)
    assert not (out.any() or shift.any() or model.ready)
    J = rows(names, copy.deepcopy(model), X)
    assert_close(names["ntk"](model, X), inner(J, J))
    assert not (shift.any() or model.ready)


BAD = {
    "is not real and finite": (nn.Linear(4, C), torch.full((N, 4), torch.inf)),
    "must be a tensor \\[N, ...\\]": (nn.Linear(4, C), torch.rand(0, 4)),
    "must be a tensor \\[N=5, C\\]": (
        nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
        torch.rand(5, 4),
    ),
    "no parameter": (nn.Linear(4, C).requires_grad_(False), torch.rand(5, 4)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises(message, names):
    model, X = BAD[message]
    for function in ("ntk", "squared_norms"):
        with pytest.raises(ValueError, match=message):
            names[function](copy.deepcopy(model).double(), X.double())


def test_reentrant_checkpoint_raises(names):
    model = Own(lambda m, X: checkpoint(m.a, X, use_reentrant=True), a=nn.Linear(4, C))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        names["ntk"](model, torch.rand(N, 4))
