"""``batched_jacobian`` of ``universal_jacobian.py``, on what its page lacks."""

import copy
import inspect
import re
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

quick = hypothesis.settings(
    deadline=None, max_examples=60, derandomize=True, database=None
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
def page(taught):
    return taught("scale/universal_jacobian")


@pytest.fixture(scope="module", params=["structure", "whole batch"])
def way(request, page):
    """Send tiny models the way of large ones, or the way of tiny ones."""
    names = inspect.unwrap(page["batched_jacobian"]).__globals__
    before, names["SMALL"] = names["SMALL"], 0 if request.param == "structure" else 1e99
    yield request.param
    names["SMALL"] = before


@pytest.fixture(scope="module")
def jacobian(page, way):
    return page["batched_jacobian"]


@pytest.fixture(scope="module")
def loop(page):
    return page["autograd_loop"]


def mlp(*widths):
    layers = []
    for pair in zip(widths, widths[1:]):
        layers += [nn.Linear(*pair), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def state(model, X):
    """Return all that a call could leave behind."""
    tensors = {"X": X.clone()} | {k: t.clone() for k, t in model.state_dict().items()}
    flags = [X.requires_grad, X.grad, torch.is_grad_enabled()]
    flags += [(p.requires_grad, p.grad) for p in model.parameters()]
    for module in model.modules():
        hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
        flags.append((module.training, list(vars(module)), hooks))
    return tensors, flags


def assert_same(after, before):
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


# Models


def test_is_right_on_the_matrix_and_leaves_the_model(taught, jacobian, way):
    matrix = taught("trust/layer_support")
    methods = set()
    for name, case in matrix["cases"].items():
        model, X = case()
        model(X)  # an embedding with max_norm changes its weight in each forward pass
        torch.manual_seed(1)
        expected = matrix["reference"](copy.deepcopy(model), X)
        before = state(model, X)
        torch.manual_seed(1)
        result = jacobian(model, X)
        after = torch.rand(1)
        assert_close(dict(result), expected, msg=lambda text, name=name: name + text)
        assert_same(state(model, X), before)
        torch.manual_seed(1)
        model(X)
        assert torch.rand(1) == after, f"{name}: other random numbers than model(X)"
        assert list(result.method) == list(result) == list(expected)
        methods |= set(result.method.values())
    assert {"Conv2d", "whole batch"} <= methods
    assert ("MultiheadAttention" in methods) == (way == "structure")


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
    for width, following in zip(widths, widths[1:]):
        layers.append(nn.Linear(width, following, bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from(NORMS))(following))
        if draw(st.booleans()):
            square = nn.Linear(following, following)
            again = [square] if draw(st.booleans()) else []
            layers.append(Skip(square, nn.ReLU(inplace=True), *again))
    model = nn.Sequential(*layers, nn.Linear(widths[-1], draw(st.integers(1, 4))))
    for p in model.parameters():
        nn.init.normal_(p.requires_grad_(draw(st.integers(0, 4)) > 0))
    model[0].weight.requires_grad_()
    return model.train(draw(st.booleans())), widths[0], draw(st.integers(1, 5))


@hypothesis.given(stacks())
@quick
def test_random_stacks(jacobian, loop, stack):
    model, width, N = stack
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    hypothesis.assume(N > 1 or not model.training or not norms)
    X = torch.randn(N, width)
    torch.manual_seed(1)
    expected = loop(copy.deepcopy(model), X)
    torch.manual_seed(1)
    assert_close(dict(jacobian(model, X)), expected)


@st.composite
def convolutions(draw):
    d, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    groups = draw(st.integers(1, 2))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    options = {"kernel_size": sizes(1, 3), "dilation": sizes(1, 2), "groups": groups}
    options |= {"bias": draw(st.booleans()), "stride": sizes(1, 3)}
    if transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
        options |= {"padding": sizes(0, 2)}
        largest = map(max, options["stride"], options["dilation"])
        options["output_padding"] = tuple(draw(st.integers(0, n - 1)) for n in largest)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        modes = ["zeros", "circular", "reflect", "replicate"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        options["padding"] = draw(st.sampled_from([sizes(0, 2), "same", "valid"]))
        if options["padding"] == "same":
            options["stride"] = (1,) * d
    return kind(*channels, **options), torch.randn(2, channels[0], *sizes(3, 6))


@hypothesis.given(convolutions())
@quick
def test_random_convolutions(jacobian, loop, way, convolution):
    layer, X = convolution
    try:
        outputs = layer(X)
    except RuntimeError:  # the kernel or the padding is larger than the input
        hypothesis.reject()
    hypothesis.assume(0 < outputs[0].numel() < 200)
    model = nn.Sequential(layer, nn.Flatten())
    result = jacobian(model, X)
    assert_close(dict(result), loop(model, X))
    if way == "structure":
        assert set(result.method.values()) == {type(layer).__name__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, jacobian, loop, way):
    norm = nn.GroupNorm(1, 4)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), mlp(8, 3))
    model, X = model.to(dtype), torch.rand(5, 2, 3, 4).to(dtype)
    result = jacobian(model, X)
    assert {block.dtype for block in result.values()} == {dtype}
    if way == "structure":
        assert set(result.method.values()) == {"Conv2d", "GroupNorm", "Linear"}
    expected = loop(model.double(), X.double())
    eps = torch.finfo(dtype).eps
    for name, block in result.items():
        assert_close(block.double(), expected[name], rtol=0.1, atol=20 * eps)


class Double(torch.autograd.Function):
    """Its backward pass reads a number, which ``vmap`` cannot."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent if cotangent.sum().item() else 2 * cotangent


class Lambda(nn.Module):
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, p in parameters.items():
            self.register_parameter(name, nn.Parameter(p))

    def forward(self, *args):
        return self.function(*args)


def test_operations_that_vmap_does_not_know(jacobian, loop):
    model, X = (
        nn.Sequential(mlp(4, 3), Lambda(Double.apply), mlp(3, 2)),
        torch.rand(5, 4),
    )
    assert_close(dict(jacobian(model, X)), loop(model, X))
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), mlp(6, 2))
    words = torch.randint(7, (5, 2))
    dense = nn.Sequential(nn.Embedding(7, 3), *model[1:])
    dense[0].weight = model[0].weight
    assert_close(dict(jacobian(model, words)), loop(dense, words))


def warned(x, w):
    warnings.warn("soon", DeprecationWarning, stacklevel=2)
    return x * w


def only_whole_batches(x, w):
    assert len(x) == 5, "the model wants the whole batch"
    return x * w


def adds_in_place(x, w):
    return x.add_(w)


def in_single(x, w):
    return (x.float() * w.float()).double()


@pytest.mark.filterwarnings("ignore:soon")
@pytest.mark.parametrize(
    "function", [warned, only_whole_batches, adds_in_place, in_single]
)
def test_modules_that_cannot_run_on_a_sample_alone(function, jacobian, loop):
    middle = Lambda(lambda x: function(x, middle.w), w=torch.rand(3))
    model, X = nn.Sequential(mlp(4, 3), middle, mlp(3, 2)), torch.rand(5, 4)
    assert_close(dict(jacobian(model, X)), loop(model, X))


def test_mixed_types(jacobian, loop):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = mlp(4, 3).float(), mlp(3, 2)

        def forward(self, X):
            return self.last(torch.tanh(self.first(X.float())).double())

    model, X = Mixed(), torch.rand(5, 4)
    result = jacobian(model, X)
    assert result["first.0.weight"].dtype == torch.float32
    assert_close(dict(result), loop(model, X))


@pytest.mark.parametrize("grad", [True, False])
def test_samples_that_mix_under_no_grad(grad, jacobian, loop):
    layers = nn.BatchNorm1d(6), nn.Tanh(), Lambda(lambda x: x - x.mean(0))
    model, X = nn.Sequential(mlp(4, 6), *layers, mlp(6, 2)), torch.rand(5, 4)
    expected = loop(copy.deepcopy(model), X)
    with torch.set_grad_enabled(grad):
        assert_close(dict(jacobian(model, X)), expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e160])
def test_scales_do_not_blind_the_check(scale, jacobian, loop):
    layers = nn.BatchNorm1d(6), nn.Tanh(), mlp(6, 2), Lambda(lambda x: scale * x)
    model, X = nn.Sequential(mlp(4, 6), *layers), torch.rand(5, 4)
    expected = loop(copy.deepcopy(model), X)
    result = jacobian(model, X)
    for name in ("0.0.weight", "3.0.weight"):
        assert_close(result[name] / scale, expected[name] / scale)


def test_a_small_part_of_the_gradient_is_checked(jacobian, loop):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = mlp(4, 2), mlp(4, 3, 2)

        def forward(self, X):
            small = self.small(X)
            return 1e8 * self.large(X) + small - small.mean(0)

    model, X = Parts().float(), torch.rand(5, 4).float()
    expected = loop(model, X)
    result = jacobian(model, X)
    for name in ("small.0.weight", "small.2.weight"):
        assert_close(result[name], expected[name], rtol=1e-3, atol=1e-4)


def test_pruned_and_reparametrized_layers(jacobian, loop):
    model = nn.Sequential(mlp(4, 6), nn.LayerNorm(6), mlp(6, 2))
    prune.random_unstructured(model[0][0], "weight", 0.5)
    prune.random_unstructured(model[1], "weight", 0.4)
    X = torch.rand(5, 4)
    assert_close(dict(jacobian(model, X)), loop(model, X))


def test_random_numbers_are_drawn_once(jacobian):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, 0.5, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0].flatten(1)

    model, X = Noisy(), torch.rand(5, 3, 4)
    torch.manual_seed(1)
    model(X)
    after = torch.rand(1)
    torch.manual_seed(1)
    jacobian(model, X)
    assert torch.rand(1) == after


def test_buffers_that_a_checkpoint_changes_again_are_put_back(jacobian):
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = body, nn.Linear(6, 2)

        def forward(self, X):
            return self.last(checkpoint(self.body, X, use_reentrant=False))

    model, X = Checkpointed(), torch.rand(5, 4)
    before = state(model, X)
    jacobian(model, X)
    assert_same(state(model, X), before)


def test_weight_that_no_layer_reads(jacobian, loop):
    layer = nn.Linear(4, 3)
    model = Lambda(lambda X: (layer(X), X @ layer.weight.T)[1])
    model.layer = layer
    X = torch.rand(5, 4)
    assert_close(dict(jacobian(model, X)), loop(model, X))


def test_keyword_arguments_and_no_grad(jacobian, loop):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            mask = x[..., 0] > 0.5
            keys = {"key": x, "value": x, "key_padding_mask": mask}
            return self.attention(x, **keys, need_weights=False)[0].flatten(1)

    X = torch.rand(5, 3, 4)
    X[:, 0, 0] = 0
    model = Masked()
    with torch.no_grad():
        result = jacobian(model, X.requires_grad_())
    assert not any(block.requires_grad for block in result.values())
    assert_close(dict(result), loop(model, X.detach()))


def test_attributes_are_put_back(jacobian):
    class Counter(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = super().forward(x)
            return self.last

    model = Counter(4, 3)
    before = list(vars(model))
    jacobian(model, torch.rand(5, 4))
    assert list(vars(model)) == before and model.calls == 0


# The check


@pytest.mark.parametrize("rule", ["factors", "pull", "normalized", "from_module"])
def test_a_wrong_rule_costs_time_not_truth(rule, page, loop, monkeypatch):
    def scaled(result):
        if isinstance(result, torch.Tensor):
            return 1.01 * result
        if isinstance(result, dict):
            return {name: 1.01 * block for name, block in result.items()}
        return [1.01 * part for part in result]

    names = inspect.unwrap(page["batched_jacobian"]).__globals__
    original = names[rule]
    monkeypatch.setitem(names, "SMALL", 0)
    monkeypatch.setitem(names, rule, lambda *args: scaled(original(*args)))
    model = nn.Sequential(mlp(4, 6, 3), nn.LayerNorm(3), nn.PReLU(3))
    X = torch.randn(5, 4)
    result = page["batched_jacobian"](model, X)
    assert_close(dict(result), loop(model, X))
    assert "whole batch" in result.method.values()


def test_the_last_way_is_the_definition(page, loop, monkeypatch):
    names = inspect.unwrap(page["batched_jacobian"]).__globals__
    monkeypatch.setitem(names, "SMALL", 1e99)
    monkeypatch.setattr(page["Check"], "fails", lambda *args: True)
    model, X = mlp(4, 6, 3), torch.randn(5, 4)
    result = page["batched_jacobian"](model, X)
    assert_close(dict(result), loop(model, X))
    assert set(result.method.values()) == {"one by one"}


# Memory


def test_out_is_written_and_returned(jacobian, loop):
    model, X = mlp(4, 6, 3), torch.rand(8, 4)
    whole = {
        n: torch.full((8, 3, *p.shape), torch.nan) for n, p in model.named_parameters()
    }
    for start in (0, 4):
        part = {name: block[start : start + 4] for name, block in whole.items()}
        result = jacobian(model, X[start : start + 4], out=part)
        assert all(result[name] is part[name] for name in part)
    assert_close(whole, loop(model, X))


def lacks_a_name(out):
    out.pop("0.bias")


def changes(name, change):
    def spoil(out):
        out[name] = change(out[name])

    return spoil


def shares(out):
    memory = torch.zeros(5 * 3 * (6 * 4 + 6) - 1)
    out["0.weight"] = memory[: 5 * 3 * 6 * 4].view(5, 3, 6, 4)
    out["0.bias"] = memory[-5 * 3 * 6 :].view(5, 3, 6)


BAD_OUT = {
    "must have the names": lacks_a_name,
    r"out\['0.bias'\] must be \[5, 3, 6\], .* but is \[5, 3, 5\]": changes(
        "0.bias", lambda block: block[..., :-1]
    ),
    r"out\['0.bias'\] must be .* torch.float64, .* torch.float32": changes(
        "0.bias", torch.Tensor.float
    ),
    r"out\['0.bias'\] must be a tensor, but is list": changes(
        "0.bias", torch.Tensor.tolist
    ),
    "must be contiguous": changes("0.bias", lambda block: block.mT.contiguous().mT),
    "must be contiguous, without": changes("0.bias", torch.Tensor.requires_grad_),
    r"out\['0.weight'\] and out\['0.bias'\] share memory": shares,
}


@pytest.mark.parametrize("message", BAD_OUT)
def test_bad_out_raises_and_changes_nothing(message, jacobian):
    model, X = mlp(4, 6, 3), torch.rand(5, 4)
    out = {name: torch.zeros(5, 3, *p.shape) for name, p in model.named_parameters()}
    BAD_OUT[message](out)
    before = state(model, X)
    with pytest.raises(ValueError, match=message):
        jacobian(model, X, out=out)
    assert not any(torch.as_tensor(block).any() for block in out.values())
    assert_same(state(model, X), before)


def test_out_in_memory_of_a_gradient_raises(jacobian):
    model, X = mlp(4, 3), torch.rand(5, 4)
    out = {name: torch.zeros(5, 3, *p.shape) for name, p in model.named_parameters()}
    model[0].bias.grad = out["0.bias"][0, 0]
    with pytest.raises(ValueError, match=r"0.bias.* share memory"):
        jacobian(model, X, out=out)
    with pytest.raises(ValueError, match="out must be a dict, but is list"):
        jacobian(model, X, out=[out])


@pytest.mark.parametrize("owner", ["X", "0.weight", "1.running_mean"])
def test_out_in_memory_of_the_model_raises(owner, jacobian):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    X = torch.rand(5, 4)
    arena = torch.zeros(5 * 3 * 3 + 20)
    if owner == "X":
        X = arena[:20].view(5, 4)
    elif owner == "0.weight":
        model[0].weight = nn.Parameter(arena[:12].view(3, 4))
    else:
        model[1].running_mean = arena[:3]
    out = {name: torch.zeros(5, 3, *p.shape) for name, p in model.named_parameters()}
    out["0.bias"] = arena[2 : 2 + 45].view(5, 3, 3)
    with pytest.raises(ValueError, match=rf"{re.escape(owner)}.* share memory"):
        jacobian(model, X, out=out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_memory_is_a_normal_tensor(dtype, page):
    like = torch.empty(0, dtype=dtype)
    block = page["allocate"]((3, 2**20, 2), like)
    assert block.shape == (3, 2**20, 2) and block.dtype == dtype
    row = block[1].fill_(1)
    del block
    assert row.sum(dtype=torch.float64) == 2**21
    assert_close(copy.deepcopy(row), row)


# Bad input


def cut(x):
    return x.detach()


def in_place(x):
    y = x.exp()
    y.add_(1)
    return y


SINGLE = torch.rand(5, 4, dtype=torch.float32)
CUT = nn.Sequential(nn.Linear(4, 3), Lambda(cut))
CHANGED = nn.Sequential(nn.Linear(4, 3), Lambda(in_place))
INTEGER = nn.Sequential(nn.Linear(4, 3), Lambda(torch.Tensor.long))
BAD = {
    r"X must be a tensor \[N, ...\] with N > 0, but is \[0, 4\]": (
        mlp(4, 3),
        torch.rand(0, 4),
    ),
    "X must be a tensor .* but is list": (mlp(4, 3), [1.0]),
    "X is torch.float32, but the parameter 0.weight is torch.float64": (
        mlp(4, 3),
        SINGLE,
    ),
    "X is on meta, but the parameter 0.weight on cpu": (mlp(4, 3), SINGLE.to("meta")),
    "no parameter of the model requires": (mlp(4, 3).requires_grad_(False), SINGLE),
    "no parameter of the model": (nn.Sequential(nn.ReLU()), SINGLE),
    r"a tensor \[N=5, C\], but is tuple": (Lambda(lambda x: (x, x), p=SINGLE), SINGLE),
    r"a tensor \[N=5, C\], but is \[5, 2, 2\]": (
        nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))),
        SINGLE.double(),
    ),
    r"a tensor \[N=5, C\], but is \[5\]": (
        nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
        SINGLE.double(),
    ),
    r"a tensor \[N=5, C\], but is \[5, 3\], torch.int64": (INTEGER, SINGLE.double()),
    r"differentiate 1 \(Lambda\), called on \[5, 3\]: element 0": (
        CUT,
        SINGLE.double(),
    ),
    r"differentiate 1 \(Lambda\), called on \[5, 3\]: one of the": (
        CHANGED,
        SINGLE.double(),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises_and_changes_nothing(message, jacobian):
    model, X = copy.deepcopy(BAD[message])
    if "tuple" not in message:
        model.double()
    before = state(model, SINGLE)
    with pytest.raises((ValueError, RuntimeError), match=message):
        jacobian(model, X)
    assert_same(state(model, SINGLE), before)


def test_an_error_of_the_model_is_passed_on_and_changes_nothing(jacobian):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(2, 3))
    X = torch.rand(5, 4)
    before = state(model, X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jacobian(model, X)
    assert_same(state(model, X), before)
