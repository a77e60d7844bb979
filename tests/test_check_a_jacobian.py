"""``check_jacobian``, on models and inputs that its page lacks."""

import copy
import math
import warnings
from itertools import accumulate

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

quick = hypothesis.settings(
    deadline=None, max_examples=25, derandomize=True, database=None
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work on one thread: for small models, more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def single_precision():
    """Start from float32, whatever a tutorial has set."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="module")
def page(taught):
    return taught("trust/check_a_jacobian")


@pytest.fixture(scope="module")
def check(page):
    return page["check_jacobian"]


@pytest.fixture(scope="module")
def loop(page):
    return lambda model, X: page["autograd_loop"](copy.deepcopy(model), X)


@pytest.fixture
def case(loop):
    """A model with batch norm in training mode, its inputs and its true Jacobian."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    X = torch.rand(6, 4)
    return model, X, loop(model, X)


def caught(check, *args, **options):
    try:
        check(*args, **options)
    except AssertionError:
        return True
    return False


# The matrix


def test_agrees_with_the_loop_on_the_layer_matrix(taught, check, loop, page):
    """The true Jacobian passes, and another one, by ``vmap`` or by hand, does not."""
    torch.set_default_dtype(torch.float64)
    verdicts = []
    for name, make in taught("trust/layer_support")["cases"].items():
        model, X = make()
        torch.manual_seed(1)  # the numbers that a model draws are those of the check
        truth = loop(model, X)
        torch.manual_seed(1)
        assert not caught(check, model, X, truth), name
        largest = max(truth, key=lambda k: truth[k].norm())
        torch.manual_seed(1)
        wrong = truth | {largest: 1.001 * truth[largest]}
        # The signs of an orthogonal layer are parameters that it rounds to integers.
        assert caught(check, model, X, wrong) or name == "orthogonal", name
        try:
            with warnings.catch_warnings(action="ignore"):
                torch.manual_seed(1)
                jacobian = page["vmap_jacrev"](copy.deepcopy(model), X)
        except RuntimeError:
            continue
        right = all(torch.allclose(jacobian[k], J) for k, J in truth.items())
        torch.manual_seed(1)
        assert caught(check, model, X, jacobian) != right, name
        verdicts.append(right)
    assert len(verdicts) > 80
    assert 2 <= verdicts.count(False) < 20


# Real sizes, in float32


def cnn(*layers, width=8):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    body = nn.Conv2d(3, width, 3, padding=1), *layers, nn.ReLU()
    return nn.Sequential(*body, *head), torch.rand(16, 3, 24, 24)


def deep(layer, activation, depth):
    layers = [nn.Sequential(layer(), activation()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(24, 5)), torch.randn(32, 24)


def attention():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    layers = nn.Embedding(40, 16), layer, nn.Flatten(), nn.Linear(16 * 6, 5)
    return nn.Sequential(*layers), torch.randint(40, (12, 6))


def shifted(layer):
    return nn.Sequential(layer, nn.Linear(24, 5)), 1000 + torch.randn(32, 24)


REAL = {
    "pooled CNN": cnn,
    "CNN of two": lambda: cnn(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "batch norm": lambda: cnn(nn.BatchNorm2d(8)),
    "group norm": lambda: cnn(nn.GroupNorm(2, 8)),
    "MLP": lambda: deep(lambda: nn.Linear(24, 24), nn.ReLU, 3),
    "eight sigmoids": lambda: deep(lambda: nn.Linear(24, 24), nn.Sigmoid, 8),
    "transformer": attention,
    "layer norm": lambda: shifted(nn.LayerNorm(24)),
    "batch norm, mean 1000": lambda: shifted(nn.BatchNorm1d(24)),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("seed", [1, 2])
def test_real_sizes(name, seed, check, loop):
    torch.manual_seed(seed)
    model, X = REAL[name]()
    truth = loop(model, X)
    assert check(model, X, truth).keys() == truth.keys()
    block = next(iter(truth))
    J = truth[block]
    changes = [torch.cat([J[:2].flip(0), J[2:]]), 0.64 * J, torch.zeros_like(J)]
    if "mean 1000" not in name and name != "layer norm":  # where 1 % is a rounding
        changes.append(1.01 * J)
    for wrong in changes:
        with pytest.raises(AssertionError, match=rf"roundings: {block} [\d.e+]+$"):
            check(model, X, truth | {block: wrong})


@pytest.mark.parametrize("N", [64, 4096])
def test_samples_that_mix_a_little_are_caught_at_any_number(N, check, page):
    """The norm of J grows with ``N``, and what is lost in it does not."""

    class Centered(nn.Sequential):
        def forward(self, X):
            return super().forward(X - 1e-3 * X.mean(0))

    model, X = Centered(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), torch.rand(N, 8)
    J = page["vmap_jacrev"](model, X)
    with pytest.raises(AssertionError, match="0.weight"):
        check(model, X, J)


def test_works_with_another_default_device(check, loop):
    model, X = deep(lambda: nn.Linear(24, 24), nn.Tanh, 2)
    jacobian = loop(model, X)
    torch.set_default_device("meta")
    try:
        check(model, X, jacobian)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rounded_products_are_no_false_alarm(precision, check, page, monkeypatch):
    model, X = deep(lambda: nn.Linear(24, 24), nn.Tanh, 3)
    J = page["vmap_jacrev"](model, X)
    if precision == "medium":  # as hardware does that has it
        J = {name: block.bfloat16().float() for name, block in J.items()}
    assert caught(check, model, X, J) == (precision == "medium")
    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(model, X, J)
        first = "0.0.weight"
        assert caught(check, model, X, J | {first: J[first].flip(0)})
    finally:
        torch.set_float32_matmul_precision(default)


# Random models, in float64

sizes = st.lists(st.integers(1, 6), min_size=2, max_size=4)
middles = st.sampled_from(
    [nn.Tanh, nn.ReLU, nn.SiLU, lambda: nn.Softmax(0), lambda: nn.LayerNorm(5)]
)


@st.composite
def models(draw):
    """Return a random stack of layers, its inputs, and a random generator."""
    widths, N = draw(sizes), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layers = []
    for width, following in zip(widths, widths[1:]):
        layers += [nn.Linear(width, 5, bias=draw(st.booleans())), draw(middles)()]
        layers += [nn.Linear(5, following)]
    return nn.Sequential(*layers).double(), torch.randn(N, widths[0]).double()


def entry(J):
    place = J.flatten().abs().argmax().item()
    J.flatten()[place] *= 1.01


def swap(J):
    J[:2] = J[:2].flip(0).clone()


def scale(J):
    J *= 1.01


def transpose(J):
    if J.shape[0] == J.shape[1]:
        J.copy_(J.transpose(0, 1).clone())
    if J.ndim == 4 and J.shape[2] == J.shape[3]:
        J.copy_(J.mT.clone())


@quick
@hypothesis.given(models(), st.sampled_from([entry, swap, scale, transpose]))
def test_random_models(check, loop, drawn, change):
    model, X = drawn
    jacobian = loop(model, X)
    errors = check(model, X, jacobian)
    assert errors.keys() == jacobian.keys()
    name = max(jacobian, key=lambda name: jacobian[name].norm())
    J = jacobian[name].clone()
    change(J)
    error = (J - jacobian[name]).norm() / jacobian[name].norm()
    hypothesis.assume(error > 1e-6)
    with pytest.raises(AssertionError, match=rf"in roundings: {name} [\d.e+]+$"):
        check(model, X, jacobian | {name: J})


# What is wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_jacobian_that_is_not_finite_is_wrong(value, case, check):
    model, X, jacobian = case
    jacobian["0.weight"][1, 2, 3, 0] = value
    with pytest.raises(AssertionError, match="0.weight (nan|inf)"):
        check(model, X, jacobian)


def test_names_all_that_is_wrong_and_no_more(case, check):
    model, X, jacobian = case
    assert list(check(model, X, jacobian)) == [
        name for name, _ in model.named_parameters()
    ]
    jacobian["2.weight"] *= 2
    jacobian["2.bias"] = torch.zeros_like(jacobian["2.bias"])
    with pytest.raises(AssertionError, match=r": 2.weight [\d.e+]+, 2.bias [\d.e+]+$"):
        check(model, X, jacobian)


def test_another_seed_takes_other_weights(case, check):
    model, X, jacobian = case
    seeds = [max(check(model, X, jacobian, seed=s).values()) for s in range(3)]
    assert len(set(seeds)) == 3


class Hidden(nn.Module):
    """Hides its parameters from ``autograd.grad`` by a reentrant checkpoint."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        first = nn.Embedding(9, 4) if place == "integers" else nn.Linear(4, 4)
        self.first, self.middle, self.last = first, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, X):
        if self.place == "middle":
            X = checkpoint(self.middle, self.first(X), use_reentrant=True)
        else:
            if self.place == "detached":
                X = X.detach()
            X = self.middle(checkpoint(self.first, X, use_reentrant=True))
        return self.last(X)


@pytest.mark.parametrize("place", ["first", "middle", "detached", "integers"])
def test_reentrant_checkpoints_raise(place, check):
    model = Hidden(place)
    X = torch.randint(9, (6,)) if place == "integers" else torch.rand(6, 4)
    zeros = {k: p.new_zeros(6, 3, *p.shape) for k, p in model.named_parameters()}
    text = "use_reentrant=True|None of the inputs have requires_grad"
    with pytest.raises((RuntimeError, UserWarning), match=text):
        check(model, X, zeros)


# Bad input


def bad_inputs():
    J = {"weight": torch.zeros(4, 2, 2, 3), "bias": torch.zeros(4, 2, 2)}
    model, X = nn.Linear(3, 2), torch.zeros(4, 3)
    frozen = nn.Linear(3, 2)
    frozen.bias.requires_grad_(False)

    class Pair(nn.Linear):
        def forward(self, X):
            return super().forward(X), X

    flat, rows = nn.Sequential(model, nn.Flatten(0)), nn.Unflatten(1, (1, 2))
    names = r"a dict of \['weight', 'bias'\], but this is "
    own = {"weight": J["weight"]}
    yield "missing", model, X, own, names + r"\['weight'\]"
    yield "unknown", model, X, J | {"scale": J["bias"]}, names + r".*'scale'"
    yield "frozen", frozen, X, J, r"a dict of \['weight'\], but .*'bias'"
    text = r"block of weight must be .*\[4, 2, 2, 3\].*, but is .*\[2, 4, 2, 3\]"
    yield "shape", model, X, J | {"weight": torch.zeros(2, 4, 2, 3)}, text
    text = r"block of bias must be .*\[4, 2, 2\].*, but is .*\[4, 2\]"
    yield "ndim", model, X, J | {"bias": torch.zeros(4, 2)}, text
    yield "dtype", model, X, J | {"bias": J["bias"].double()}, "bias .*float64"
    yield "device", model, X, J | {"bias": J["bias"].to("meta")}, "bias .*meta"
    yield "a tensor", model, X, J["bias"], "a dict of .*, but this is Tensor"
    yield "no X", model, X.tolist(), J, r"X must be a tensor \[N, ...\].*, but is list"
    yield "a number", model, X[0, 0], J, r"X must be a tensor .* but is \[\]"
    yield "no samples", model, X[:0], J, r"with N > 0, but is \[0, 3\]"
    yield "output [N]", flat, X, J, r"tensor \[N=4, C\], but is \[8\]"
    three = nn.Sequential(model, rows)
    yield "output [N, 1, C]", three, X, J, r"tensor \[N=4, C\], but is \[4, 1, 2\]"
    yield "tuple", Pair(3, 2), X, J, r"tensor \[N=4, C\], but is tuple"
    nothing = nn.Linear(3, 2).requires_grad_(False)
    yield "all frozen", nothing, X, {}, "no parameter of the model requires a gradient"
    yield "not finite", model, X / 0, J, r"model\(X\) is not finite"


BAD = list(bad_inputs())


@pytest.mark.parametrize("bad", BAD, ids=[name for name, *_ in BAD])
def test_bad_input(bad, check):
    _, model, X, jacobian, text = bad
    with pytest.raises(ValueError, match=text):
        check(model, X, jacobian)


# Inputs that are good


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode, case, check):
    model, X, jacobian = case
    with mode():
        check(model, X.clone(), jacobian)
        jacobian["0.weight"] = 1.01 * jacobian["0.weight"]
        assert caught(check, model, X, jacobian)


def test_reads_any_layout(case, check):
    model, X, jacobian = case
    strided = {
        k: J.transpose(0, 1).contiguous().transpose(0, 1) for k, J in jacobian.items()
    }
    reversed_ = {k: J.mT.contiguous().mT for k, J in jacobian.items()}
    graph = {k: J.clone().requires_grad_() for k, J in jacobian.items()}
    for layout in (strided, reversed_, graph):
        check(model, X, layout)
    assert caught(check, model, X, {k: 2 * J for k, J in strided.items()})


def test_hooks_of_parameters_do_not_count(check, loop):
    model, X = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.rand(6, 4),
    )
    jacobian = loop(model, X)
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    check(model, X, jacobian)


def test_hooks_of_modules_do_not_count(check, loop):
    model, X = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.rand(6, 4)
    jacobian = loop(model, X)
    model[1].register_full_backward_hook(lambda layer, grads, _: (grads[0] / 2,))
    check(model, X, jacobian)
    assert caught(check, model, X, loop(model, X))


class Counts(nn.Linear):
    """Another function in each call, without random numbers."""

    calls = 0

    def forward(self, X):
        self.calls += 1
        return super().forward(X) * (1 + 0.1 * self.calls)


def test_a_count_of_calls_hides_no_error(check, loop):
    model, X = Counts(4, 3), torch.rand(6, 4)
    jacobian = loop(model, X)
    check(model, X, jacobian)
    assert caught(check, model, X, {k: 1.05 * J for k, J in jacobian.items()})


def test_sparse_gradients(check, loop):
    embed = nn.Embedding(9, 4)
    model, words = nn.Sequential(embed, nn.Flatten(), nn.Linear(8, 3)), torch.arange(8)
    jacobian = loop(model, words.view(4, 2))
    embed.sparse = True
    check(model, words.view(4, 2), jacobian)
    jacobian["0.weight"][1] = 0
    assert caught(check, model, words.view(4, 2), jacobian)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.scale, self.unused = nn.Parameter(torch.rand(())), nn.Linear(2, 2)
        self.out.bias.requires_grad_(False)

    def forward(self, words):
        return self.out(self.embed(words).mean(1)) * self.scale


def test_integers_scalars_unused_and_frozen_parameters(check, loop):
    model, words = Words(), torch.randint(9, (5, 2))
    jacobian = loop(model, words)
    assert check(model, words, jacobian)["unused.weight"] == 0
    jacobian["scale"][3, 1] += 1
    with pytest.raises(AssertionError, match="roundings: scale"):
        check(model, words, jacobian)


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.cdouble))

    def forward(self, X):
        return (torch.exp(1j * X) @ self.weight).abs() ** 2


def test_complex_parameters(check, loop):
    model, X = Waves(), torch.rand(6, 4, dtype=torch.double)
    jacobian = loop(model, X)
    check(model, X, jacobian)
    assert caught(check, model, X, {"weight": jacobian["weight"].conj()})


# State


class Writes(nn.Module):
    """Changes all that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=0.1)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("largest", torch.zeros(()))
        self.calls, self.ready, self.activations = 0, False, []
        self.by_name, self.seen = {}, set()

    def forward(self, X):
        self.calls += 1
        words = X.long()
        X.add_(1)
        self.largest = X.max()
        self.kept = self.norm(self.embed(words))
        if not self.ready:  # as ActNorm does
            self.shift.data = self.kept.mean(0).detach()
            self.ready = True
        self.activations.append(self.kept)
        self.by_name["kept"] = self.kept
        self.seen.add(self.calls)
        return self.out(self.kept + self.shift)


def snapshot(model, X):
    state = [copy.copy(vars(module)) for module in model.modules()]
    simple = int, bool, list, dict, set
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
        "grads": [p.grad.clone() for p in model.parameters()],
        "attributes": [
            {k: repr(v) if isinstance(v, simple) else id(v) for k, v in s.items()}
            for s in state
        ],
        "kept": [len(model.activations), len(model.by_name), len(model.seen)],
        "requires": [p.requires_grad for p in model.parameters()],
        "X": X.clone(),
        "X.grad": X.grad,
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("ends", ["passes", "wrong", "shape", "model raises"])
@pytest.mark.parametrize("enabled", [True, False])
def test_leaves_everything_as_it_was(ends, enabled, check, loop):
    model, X = Writes(), torch.arange(5.0)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    handle = model.out.register_forward_hook(lambda *_: None)
    model.out.eval()
    jacobian = loop(model, X.clone())
    if ends == "wrong":
        jacobian["out.bias"] = 2 * jacobian["out.bias"]
    if ends == "shape":
        jacobian["out.bias"] = jacobian["out.bias"][:1]
    before = snapshot(model, X)
    with torch.set_grad_enabled(enabled):
        if ends == "model raises":
            with pytest.raises(IndexError):
                check(model, X + 9, jacobian)
        elif ends == "passes":
            check(model, X, jacobian)
            check(model, X, jacobian)
        else:
            with pytest.raises((AssertionError, ValueError)):
                check(model, X, jacobian)
    after = snapshot(model, X)
    assert after.pop("attributes") == before.pop("attributes")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not hasattr(model, "kept")
    handle.remove()


def test_a_training_step_goes_on_after_a_check(check, loop):
    """Activations that the model keeps carry the graph of the model's own pass."""
    model, X = Writes(), torch.arange(5.0)
    jacobian = loop(model, X.clone())
    loss = model(X.clone()).sum()
    _ = caught(check, model, X, jacobian)  # batch norm has other statistics by now
    loss.backward()
    model(X.clone()).sum().backward()
    assert len(model.activations) == 2


def test_warns_of_nothing(case, check):
    with warnings.catch_warnings(action="error"):
        check(*case)


def test_copies_no_jacobian(check):
    model, X = nn.Linear(50, 30).double(), torch.rand(40, 50, dtype=torch.float64)
    jacobian = {k: p.new_ones(40, 30, *p.shape) for k, p in model.named_parameters()}
    with profile(profile_memory=True) as recorded:
        assert caught(check, model, X, jacobian)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    assert max(accumulate(e.nbytes() for e in events)) < jacobian["weight"].nbytes / 50


@pytest.mark.parametrize("distance", [1e-8, -1e-8, 2e-7, -2e-7])
def test_a_relu_that_switches_near_zero_is_no_error(distance, check, page):
    model, X, J = switched(distance)
    assert max(check(model, X, J).values()) <= page["LIMIT"]


@pytest.mark.parametrize("distance", [1e-3, 0.1])
def test_a_relu_that_switches_far_from_zero_is_an_error(distance, check, page):
    model, X, J = switched(distance)
    with pytest.raises(AssertionError, match=r"wrong Jacobian.*0\.weight"):
        check(model, X, J)


def switched(distance):
    """Return a model, X, and J with a hidden unit of one sample on the other side."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).float()
    X = torch.rand(200, 6, dtype=torch.float32)
    with torch.no_grad():
        model[0].bias[4] -= model[0](X)[7, 4] - distance
        is_on = model[0](X)[7, 4] > 0
        J = {
            name: torch.zeros(200, 3, *p.shape) for name, p in model.named_parameters()
        }
        hidden = model[1](model[0](X))
        on = (hidden > 0).float()
        on[7, 4] = not is_on
        J["2.bias"] = torch.eye(3).expand(200, 3, 3).clone()
        J["2.weight"] = torch.einsum("co,nh->ncoh", torch.eye(3), hidden)
        J["0.bias"] = model[2].weight * on[:, None]
        J["0.weight"] = J["0.bias"][..., None] * X[:, None, None]
    return model, X, {name: block.float() for name, block in J.items()}
