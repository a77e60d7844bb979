"""``batched_jacobian`` of ``universal_jacobian.py``, on what its page lacks."""

import copy
import inspect
import warnings
from itertools import pairwise, product

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from backpack import extend
from torch import autograd, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

quick = hypothesis.settings(
    deadline=None, max_examples=30, derandomize=True, database=None
)


@pytest.fixture(autouse=True)
def settings():
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def names(taught):
    """Return the names that the function sees, to replace some of them."""
    function = taught("scale/universal_jacobian")["batched_jacobian"]
    return inspect.unwrap(function).__globals__


@pytest.fixture(scope="module")
def jacobian(names):
    return names["batched_jacobian"]


@pytest.fixture(params=["large", "small"])
def size(request, names, monkeypatch):
    """Take outer products for tiny layers, too, or for none of these tiny models."""
    monkeypatch.setitem(names, "LARGE", 0 if request.param == "large" else 2**17)
    return request.param


class Own(nn.Module):
    """A model of a function of itself and X, with what it needs."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, X):
        return self.function(self, X)


def mlp(*widths):
    pairs = [[nn.Linear(*sizes), nn.ReLU(inplace=True)] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def definition(model, X):
    """Return the Jacobian by its definition. The model may change, but not X."""
    fs = model(X.detach().clone())
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack([g.to_dense() for g in block]) for block in zip(*rows)]
    return {k: b.unflatten(0, fs.shape).detach() for k, b in zip(params, blocks)}


def state(model, X):
    """Return all that a call could leave behind."""
    tensors = {"X": X} | dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: t.detach().clone() for name, t in tensors.items()}
    flags = [id(t) for t in tensors.values()]
    flags += [(t.requires_grad, t.grad) for t in tensors.values()]
    flags += [torch.is_grad_enabled(), list(warnings.filters)]
    for module in model.modules():
        for key, value in vars(module).items():
            kept = isinstance(value, (dict, list, set, int, float, str, type(None)))
            flags.append((key, copy.copy(value) if kept else id(value)))
    return values, flags


def assert_same(after, before):
    assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)
    assert str(after[1]) == str(before[1])


def assert_right(jacobian, model, X, expected):
    """Check the Jacobian, its ``out=`` and ``method=``, and what the calls leave."""
    before, random = state(model, X), torch.get_rng_state()
    J = jacobian(model, X)
    assert_same(state(model, X), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert_close(dict(J), expected)
    assert not any(block.requires_grad for block in J.values())
    for block in J.values():
        block.fill_(torch.nan)
    again = jacobian(model, X, out=J, method=J.method)
    assert_same(state(model, X), before)
    assert_close(dict(J), expected)
    assert all(again[name] is J[name] for name in J) and again.method == J.method


# Models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_right_on_the_matrix_and_leaves_the_model(dtype, taught, jacobian, size):
    matrix, tolerance = taught("trust/layer_support"), {}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-3, "atol": 1e-4}
    torch.set_default_dtype(dtype)
    methods = set()
    for name, case in matrix["cases"].items():
        model, X = case()
        model, X = model.to(dtype), X.to(dtype) if X.is_floating_point() else X
        torch.manual_seed(1)
        expected = matrix["autograd_loop"](copy.deepcopy(model), X)
        before = state(model, X)
        torch.manual_seed(1)
        J = jacobian(model, X)
        assert_same(state(model, X), before)
        assert_close(dict(J), expected, msg=lambda t, n=name: n + t, **tolerance)
        assert list(J) == list(expected)
        methods.add(J.method)
    wanted = {"vmap(jacrev)", "sample by sample", "definition"}
    assert methods == wanted | ({"linear layers"} if size == "large" else set())


class Skip(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.PReLU, lambda: nn.Softmax(-1), nn.Dropout)
NORMS = (nn.LayerNorm, nn.BatchNorm1d, lambda width: nn.GroupNorm(1, width))


@st.composite
def stacks(draw):
    """Return a random model of layers, norms, skips and repetitions, and its inputs."""
    widths = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    layers = []
    for width, following in pairwise(widths):
        layers.append(nn.Linear(width, following, bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from(NORMS))(following))
        if draw(st.booleans()):
            square = nn.Linear(following, following)
            again = nn.Linear(following, following)
            if draw(st.booleans()):
                again.weight = square.weight
            layers.append(Skip(square, nn.ReLU(inplace=True), again))
    model = nn.Sequential(*layers, nn.Linear(widths[-1], draw(st.integers(1, 4))))
    for p in model.parameters():
        nn.init.normal_(p.requires_grad_(draw(st.integers(0, 4)) > 0))
    model[0].weight.requires_grad_()
    return model.train(draw(st.booleans())), widths[0], draw(st.integers(1, 5))


@hypothesis.given(stacks(), st.sampled_from([0, 40, 2**16]))
@quick
def test_random_stacks(jacobian, names, stack, large):
    model, width, N = stack
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    hypothesis.assume(N > 1 or not model.training or not norms)
    X = torch.randn(N, width)
    torch.manual_seed(1)
    expected = definition(copy.deepcopy(model), X)
    torch.manual_seed(1)
    before, names["LARGE"] = names["LARGE"], large
    try:
        assert_close(dict(jacobian(model, X)), expected)
    finally:
        names["LARGE"] = before


def read_by_name(m, X):
    return F.linear(torch.tanh(m.layer(X)), m.layer.weight) + m.layer.bias


def twice(m, X):
    return m.layer(torch.tanh(m.layer(X)))


def by_position(m, X):
    return m.last(torch.tanh(m.layer(X.unflatten(1, (2, 2)))).flatten(1))


def without_gradient(m, X):
    with torch.no_grad():
        still = m.layer(X)
    return m.last(X) + still


def in_place(m, X):
    return m.layer(X.mul_(2)).add_(1)


def derivative(m, X):
    """A residual as of a PINN, with a gradient inside."""
    X = X.requires_grad_()
    u = m.last(torch.tanh(m.layer(X)))
    (slope,) = autograd.grad(u.sum(), X, create_graph=True)
    return u + slope[:, :1]


def complex_power(m, X):
    return (torch.exp(1j * X) @ m.w).abs() ** 2


def complex_layer(m, X):
    return m.layer(torch.exp(1j * X)).abs() ** 2


def by_type(m, X):
    return m.last(torch.tanh(m.layer(X.float())).double())


def read_a_number(m, X):
    return m.layer(X) * (2 if m.layer(X).sum().item() > 0 else 3)


def whole_batches(m, X):
    assert len(X) == 6, "the model wants the whole batch"
    return m.layer(X)


def warns(m, X):
    warnings.warn("soon", DeprecationWarning, stacklevel=2)
    return m.layer(X)


def checkpointed(m, X):
    return m.last(checkpoint(m.layer, X, use_reentrant=False))


def mixes(m, X):
    return m.last(torch.tanh(m.layer(X) - 1e-3 * m.layer(X).mean(0)))


def ignores(m, X):
    return m.last(X) + m.layer.bias[:3].detach()


def own(function, **members):
    return Own(
        function, **{"layer": nn.Linear(4, 4), "last": nn.Linear(4, 3)} | members
    )


def sharing_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def pruned():
    model = nn.Sequential(mlp(4, 5), nn.LayerNorm(5), mlp(5, 3))
    prune.random_unstructured(model[0][0], "weight", 0.5)
    prune.random_unstructured(model[1], "weight", 0.4)
    return model


def weight_of(shape, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


MODELS = {
    "registered twice": shared,
    "a parameter without axes": lambda: own(
        lambda m, X: m.last(X) * m.w, w=weight_of([])
    ),
    "read outside its layer": lambda: own(read_by_name),
    "called twice": lambda: own(twice),
    "sharing a weight": sharing_a_weight,
    "called on positions": lambda: own(by_position, layer=nn.Linear(2, 2)),
    "under no_grad inside": lambda: own(without_gradient, last=nn.Linear(4, 4)),
    "in place on X": lambda: own(in_place),
    "a gradient inside": lambda: own(derivative, last=nn.Linear(4, 1)),
    "complex": lambda: own(complex_power, w=weight_of([4, 3], torch.cdouble)),
    "complex layer": lambda: own(
        complex_layer, layer=nn.Linear(4, 3, dtype=torch.cdouble)
    ),
    "two types": lambda: own(by_type, layer=nn.Linear(4, 4).float()),
    "reads a number": lambda: own(read_a_number),
    "whole batches only": lambda: own(whole_batches),
    "warns": lambda: own(warns),
    "checkpoint": lambda: own(checkpointed),
    "samples that mix a little": lambda: own(mixes),
    "unused": lambda: own(ignores),
    "frozen": lambda: nn.Sequential(mlp(4, 5, 3), mlp(3, 3).requires_grad_(False)),
    "batch norm, training": lambda: nn.Sequential(mlp(4, 5), nn.BatchNorm1d(5)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "pruned": pruned,
    "one output": lambda: mlp(4, 5, 1),
}


@pytest.mark.filterwarnings("ignore:soon")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, jacobian, size):
    X = torch.rand(6, 4)
    torch.manual_seed(1)
    expected = definition(MODELS[name](), X)
    torch.manual_seed(1)
    assert_right(jacobian, MODELS[name](), X, expected)


def with_a_hook():
    model = mlp(4, 5, 3)
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    return model


AT_ONCE = {
    with_a_hook: "linear layers",
    sharing_a_weight: "vmap(jacrev)",
    shared: "vmap(jacrev)",
}


@pytest.mark.parametrize("make", AT_ONCE)
def test_the_first_method_is_right(make, jacobian, names, monkeypatch):
    monkeypatch.setitem(names, "LARGE", 0)
    assert jacobian(make(), torch.rand(6, 4)).method == AT_ONCE[make]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts(context, jacobian, size):
    model, X = mlp(4, 5, 3), torch.rand(6, 4)
    expected = definition(model, X)
    with context():
        assert_right(jacobian, model, X.requires_grad_(), expected)
        X = X.clone()  # in inference mode, such a tensor cannot require a gradient
    assert_close(dict(jacobian(model, X)), expected)


def test_hooks(jacobian, size):
    plain, X = mlp(4, 5, 3), torch.rand(6, 4)
    model = copy.deepcopy(plain)
    for p in model.parameters():
        p.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
    assert_right(jacobian, model, X, definition(plain, X))
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    plain[0].register_forward_hook(lambda layer, args, output: 2 * output)
    assert_right(jacobian, model, X, definition(plain, X))


def test_hooks_of_modules(jacobian, size):
    plain, X = mlp(4, 5, 3), torch.rand(6, 4)
    model = copy.deepcopy(plain)
    model[2].register_full_backward_hook(lambda layer, grads, _: (grads[0] / 2,))
    model[2].register_full_backward_pre_hook(lambda layer, grads: (grads[0] / 3,))
    hooked, expected = definition(model, X), definition(plain, X)
    with pytest.raises(AssertionError):
        assert_close(hooked, expected)
    assert_right(jacobian, model, X, expected)
    assert_close(definition(model, X), hooked)


def test_models_extended_with_backpack(jacobian, size, taught):
    plain, X = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.rand(6, 4),
    )
    extended, expected = extend(copy.deepcopy(plain)), definition(plain, X)
    assert_right(jacobian, extended, X, expected)
    assert_close(taught("batched_jacobians")["batch_grad"](extended, X), expected)
    assert_right(jacobian, extended, X, expected)


def test_models_that_are_another_function_in_each_call(jacobian, size):
    def counted(m, X):
        m.calls += 1
        return m.last(torch.tanh(m.layer(X))) * m.calls

    model, X = own(counted, calls=0), torch.rand(6, 4)
    J = jacobian(model, X)
    assert J.method == "definition" and model.calls == 0
    assert_close(dict(J), definition(model, X))


def test_kept_activations(jacobian, size):
    def keep(m, X):
        m.last_output = m.last(X)
        m.kept.append(m.last_output)
        return m.last_output

    model, X = own(keep, kept=[], last_output=None), torch.rand(6, 4)
    expected = definition(copy.deepcopy(model), X)
    for _ in range(2):
        assert_right(jacobian, model, X, expected)
        model(X)
    assert len(model.kept) == 2 and model.last_output.sum().requires_grad


def test_models_that_set_their_parameters(jacobian, size):
    def act_norm(m, X):
        if not m.ready:
            m.shift.data, m.ready = X.detach().mean(0), True
        return m.last(X - m.shift)

    model = own(act_norm, shift=nn.Parameter(torch.zeros(4)), ready=False)
    X = torch.rand(6, 4)
    assert_right(jacobian, model, X, definition(copy.deepcopy(model), X))
    assert not model.ready and not model.shift.any()
    words = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), mlp(8, 3))
    X = torch.randint(9, (6, 2))
    assert_right(jacobian, words, X, definition(copy.deepcopy(words), X))


def test_weight_norm_after_a_forward_pass(jacobian):
    with warnings.catch_warnings(action="ignore"):
        layer = nn.utils.weight_norm(nn.Conv1d(2, 3, 2))
    model, X = nn.Sequential(layer, nn.Flatten()), torch.rand(6, 2, 3)
    expected = definition(model, X)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert_right(jacobian, model, X, expected)


def test_sparse_gradients(jacobian):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), mlp(8, 3))
    X = torch.randint(9, (6, 2))
    assert_right(jacobian, model, X, definition(model, X))
    assert jacobian(model, X).method == "vmap(jacrev)"


def test_random_models_draw_as_the_model_does(jacobian):
    model, X = nn.Sequential(mlp(4, 5), nn.Dropout(0.5), mlp(5, 3)), torch.rand(6, 4)
    torch.manual_seed(1)
    expected = definition(model, X)
    torch.manual_seed(1)
    J = jacobian(model, X)
    assert J.method == "definition"
    assert_close(dict(J), expected)


def test_frozen_layers_are_not_computed_by_structure(names, monkeypatch):
    monkeypatch.setitem(names, "LARGE", 0)
    model = mlp(4, 5, 3)
    model[0].weight.requires_grad_(False)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert names["forward"](model, leaves, torch.rand(6, 4))[1] == [model[2]]


class Masked(nn.Linear):
    """A layer that masks its weight in each call, as masked convolutions do."""

    mask = torch.arange(4) < 3

    def forward(self, X):
        self.weight.data *= self.mask
        return super().forward(X)


def test_parameters_that_are_written_in_each_call(jacobian, size):
    model, X = nn.Sequential(Masked(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.rand(6, 4)
    before = state(model, X)
    J = jacobian(model, X)
    assert J.method == "sample by sample"
    assert_same(state(model, X), before)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(model.state_dict())
    plain[0].weight.data *= Masked.mask
    assert_close(dict(J), definition(plain, X))


def test_data_parallel_raises(jacobian):
    model, X = nn.DataParallel(mlp(4, 5, 3)), torch.rand(6, 4)
    with pytest.raises(ValueError, match=r"pass the model inside, model\.module"):
        jacobian(model, X)
    assert jacobian(model.module, X)


WRAPPERS = {
    "trace": torch.jit.trace,
    "script": lambda model, X: torch.jit.script(model),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_that_cannot_be_called_with_other_parameters(wrapper, jacobian, size):
    X = torch.rand(6, 4)
    model = WRAPPERS[wrapper](mlp(4, 5, 3), X)
    before = model(X)
    with pytest.raises(RuntimeError, match="stateless API can't be used with"):
        jacobian(model, X)
    assert_close(model(X), before)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype, jacobian, size):
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.Tanh(), nn.Flatten(), mlp(8, 3)
    model, X = nn.Sequential(*layers).to(dtype), torch.rand(5, 2, 3, 4).to(dtype)
    J = jacobian(model, X)
    assert {block.dtype for block in J.values()} == {dtype}
    for name, block in definition(model.double(), X.double()).items():
        error = (J[name].double() - block).norm() / block.norm()
        assert error < 20 * torch.finfo(dtype).eps, name


def pooled_cnn():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    pooled = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers, *pooled), torch.rand(32, 3, 24, 24)


def shifted_norm():
    layers = nn.LayerNorm(32), nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 5)
    return nn.Sequential(*layers), 1000 + torch.rand(64, 32) / 100


def sigmoids():
    layers = [[nn.Linear(20, 20), nn.Sigmoid()] for _ in range(8)]
    return nn.Sequential(*sum(layers, []), nn.Linear(20, 5)), torch.rand(32, 20)


def wide_mlp():
    return mlp(64, 128, 10), torch.rand(32, 64)


def attention():
    """Return a kernel of which vmap warns that it is slow, which is no failure."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(96, 5)), torch.rand(16, 6, 16)


FIELD = {
    attention: "vmap(jacrev)",
    pooled_cnn: "vmap(jacrev)",
    shifted_norm: "vmap(jacrev)",
    sigmoids: "vmap(jacrev)",
    wide_mlp: "linear layers",
}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("make", FIELD)
def test_right_blocks_are_not_thrown_away(make, precision, jacobian):
    torch.set_default_dtype(torch.float32)
    model, X = make()
    torch.set_float32_matmul_precision(precision)
    try:
        assert jacobian(model, X).method == FIELD[make]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e160])
def test_scales_do_not_blind_the_check(scale, jacobian, size):
    norm = nn.BatchNorm1d(6), nn.Tanh(), mlp(6, 2)
    model, X = nn.Sequential(mlp(4, 6), *norm), torch.rand(5, 4)
    expected = definition(copy.deepcopy(model), X)
    scaled = Own(lambda m, X: scale * m.model(X), model=model)
    J = jacobian(scaled, X)
    for name in ("0.0.weight", "3.0.weight"):
        assert_close(J["model." + name] / scale, expected[name])


def test_a_small_part_of_the_gradient_is_checked(jacobian, size):
    def parts(m, X):
        small = m.small(X)
        return 1e8 * m.large(X) + small - small.mean(0)

    model = Own(parts, large=mlp(4, 2), small=mlp(4, 3, 2))
    X = torch.rand(5, 4)
    expected, J = definition(model, X), jacobian(model.float(), X.float())
    for name in ("small.0.weight", "small.2.weight"):
        assert_close(J[name].double(), expected[name], rtol=1e-3, atol=1e-4)


# The check


def swapped(block):
    return block.roll(1, 0)


def scaled(block):
    return 1.001 * block


def zeroed(block):
    return 0 * block


@pytest.mark.parametrize("spoil", [swapped, scaled, zeroed])
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrong_blocks_cost_time_not_truth(
    spoil, name, dtype, names, monkeypatch, jacobian, size
):
    original = names["from_vmap"]

    def spoiled(*args):
        blocks = original(*args)
        if isinstance(blocks[name], tuple):
            delta, a = blocks[name]
            blocks[name] = spoil(delta), a
        else:
            blocks[name] = spoil(blocks[name])
        return blocks

    monkeypatch.setitem(names, "from_vmap", spoiled)
    model, X = mlp(4, 6, 3).to(dtype), torch.randn(5, 4).to(dtype)
    J = jacobian(model, X)
    assert J.method == "sample by sample"
    assert_close(dict(J), definition(model, X))


def test_a_wrong_sum_costs_time_not_truth(names, monkeypatch, jacobian, size):
    def wrong(u, block):
        total, norm = original(u, block)
        return 1.001 * total, norm

    original = names["weighted_sum"]
    monkeypatch.setitem(names, "weighted_sum", wrong)
    model, X = mlp(4, 6, 3), torch.randn(5, 4)
    J = jacobian(model, X)
    assert J.method == "definition"
    assert_close(dict(J), definition(model, X))


# Memory and methods


def test_parts_of_memory(jacobian, size):
    model, X = mlp(4, 6, 3), torch.rand(8, 4)
    params = dict(model.named_parameters())
    whole = {
        name: torch.full((8, 3, *p.shape), torch.nan) for name, p in params.items()
    }
    for start in (0, 4):
        part = {name: block[start : start + 4] for name, block in whole.items()}
        jacobian(model, X[start : start + 4], out=part)
    assert_close(whole, definition(model, X))


def test_each_method_can_be_asked_for(names, jacobian, size):
    model, X = mlp(4, 6, 3), torch.rand(5, 4)
    for method in names["METHODS"]:
        J = jacobian(model, X, method=method)
        assert J.method == method
        assert_close(dict(J), definition(model, X))
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = state(norm, X)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        jacobian(norm, X, method="vmap(jacrev)")
    assert_same(state(norm, X), before)


def lacking(out):
    del out["0.bias"]


def changed(change):
    def spoil(out):
        out["0.bias"] = change(out["0.bias"])

    return spoil


BAD_OUT = {
    "a Jacobian is a dict of .*, but this is": lacking,
    r"the block of 0.bias must be .*\[5, 3, 6\].* is .*\[5, 3, 5\]": changed(
        lambda block: block[..., :-1]
    ),
    "the block of 0.bias must be .*float64.* is .*float32": changed(torch.Tensor.float),
    "the block of 0.bias must be .*cpu.* is .*meta": changed(lambda b: b.to("meta")),
}


@pytest.mark.parametrize("message", BAD_OUT)
@pytest.mark.parametrize("method", [None, "vmap(jacrev)"])
def test_bad_out_raises_and_changes_nothing(message, method, jacobian):
    model, X = mlp(4, 6, 3), torch.rand(5, 4)
    out = {name: torch.zeros(5, 3, *p.shape) for name, p in model.named_parameters()}
    BAD_OUT[message](out)
    before = state(model, X)
    with pytest.raises(ValueError, match=message):
        jacobian(model, X, out=out, method=method)
    assert not any(block.any() for block in out.values() if block.device.type == "cpu")
    assert_same(state(model, X), before)


# Bad input


def hidden_first(m, X):
    return m.last(checkpoint(m.layer, X, use_reentrant=True))


def hidden_middle(m, X):
    return m.last(checkpoint(m.layer, m.first(X), use_reentrant=True))


def hidden_words(m, X):
    return m.last(checkpoint(m.words, (X * 9).long(), use_reentrant=True).mean(1))


def flat(m, X):
    return m.last(X).flatten(0, 0)[:, 0]


def changed_in_place(m, X):
    y = m.last(X).exp()
    y.add_(1)
    return y


def with_nan(X):
    return X.where(X < X.max(), torch.nan)


def same(X):
    return X


BAD = {
    r"X must be a tensor .* with N > 0, but is \[0, 4\]": (own(twice), lambda X: X[:0]),
    r"X must be a tensor .* with N > 0, but is \[\]": (own(twice), lambda X: X[0, 0]),
    "X must be a tensor .* but is list": (own(twice), torch.Tensor.tolist),
    "no parameter of the model requires": (nn.Sequential(nn.ReLU()), same),
    "no parameter of .* requires a": (mlp(4, 3).requires_grad_(False), same),
    r"tensor \[N=5, C\], but is tuple": (own(lambda m, X: (m.last(X),)), same),
    r"tensor \[N=5, C\], but is \[5\]": (own(flat), same),
    r"tensor \[N=5, C\], but is \[5, 3, 1\]": (
        own(lambda m, X: m.last(X)[..., None]),
        same,
    ),
    r"tensor \[N=5, C\], but is \[3, 5\]": (own(lambda m, X: m.last(X).T), same),
    r"model\(X\) is not finite": (own(twice), with_nan),
    "does not require grad": (own(lambda m, X: m.last(X).detach()), same),
    "modified by an inplace operation": (own(changed_in_place), same),
    "must have the same dtype": (mlp(4, 3), torch.Tensor.float),
    "shapes cannot be multiplied": (nn.Sequential(nn.BatchNorm1d(4), mlp(3, 4)), same),
    "incompatible with .grad": (own(hidden_first), same),
    "checkpoint is incompatible": (own(hidden_middle, first=nn.Linear(4, 4)), same),
    "None of the inputs have": (own(hidden_words, words=nn.Embedding(9, 4)), same),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises_and_changes_nothing(message, jacobian, size):
    model, change = BAD[message]
    model, inputs = copy.deepcopy(model).double(), torch.rand(5, 4)
    X = change(inputs)
    before = state(model, inputs)
    with pytest.raises((ValueError, RuntimeError, UserWarning), match=message):
        jacobian(model, X)
    assert_same(state(model, inputs), before)


def test_bad_method_raises(jacobian):
    with pytest.raises(ValueError, match="method must be one of .* but is 'fastest'"):
        jacobian(mlp(4, 3), torch.rand(5, 4), method="fastest")


class Decides(nn.Linear):
    """Another function if the largest value of the batch is above 3."""

    def forward(self, X):
        fs = super().forward(X)
        largest = X.abs().max().item()
        return fs * 3 / largest if largest > 3 else fs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_method_of_another_batch_that_is_wrong_for_this_one_raises(jacobian, dtype):
    model, X = Decides(4, 3).to(dtype), torch.rand(6, 4, dtype=dtype)
    first = jacobian(model, X)
    assert first.method == "sample by sample"
    again = jacobian(model, X, method=first.method)
    assert_close(dict(again), dict(first))
    X[2] *= 9
    with pytest.raises(ValueError, match="a sample alone has another output: leave"):
        jacobian(model, X, method=first.method)
    J = jacobian(model, X)
    assert J.method == "definition"
    wanted = (
        3 / X.abs().max() * X[:, None, None, :] * torch.eye(3, dtype=dtype)[..., None]
    )
    assert_close(J["weight"], wanted.expand(6, 3, 3, 4))
