"""``check_jacobian`` of ``silent_failures.py``, on what its page lacks."""

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

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
quick = hypothesis.settings(
    deadline=None, max_examples=40, derandomize=True, database=None
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work on one thread: for small models, more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def page(taught):
    return taught("trust/silent_failures")


@pytest.fixture(scope="module")
def check(page):
    return page["check_jacobian"]


@pytest.fixture
def case(page):
    """A model with batch norm in training mode, its inputs and its true Jacobian."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    X = torch.rand(6, 4, dtype=torch.float64)
    return model, X, page["loop"](model, X)


def caught(check, *args, **options):
    try:
        check(*args, **options)
    except AssertionError:
        return True
    return False


# The page and the matrix


def test_catches_the_failures_of_the_page(page, check):
    assert len(page["failures"]) > 30
    for name, failure in page["failures"].items():
        model, X, wrong = failure()
        with pytest.raises((AssertionError, ValueError)):
            pytest.fail(f"{name} passes: {check(model, X, wrong)}")


def test_agrees_with_the_matrix(taught, check):
    matrix = taught("trust/layer_support")
    cases, methods, results = (matrix[k] for k in ("cases", "methods", "results"))
    verdicts = []
    for (case, method), verdict in results.items():
        if verdict not in ("right", "wrong"):
            continue
        model, X = cases[case]()
        torch.manual_seed(1)  # the numbers that a model draws are those of the check
        with warnings.catch_warnings(action="ignore"):
            jacobian = methods[method](model, X)
        torch.manual_seed(1)
        right = not caught(check, model, X, jacobian)
        assert right == (verdict == "right"), f"{method}, {case}: {verdict}"
        verdicts.append(right)
    assert 20 < sum(verdicts) < len(verdicts) - 20


# Random models

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
        if draw(st.booleans()) and N > 1:
            layers += [nn.BatchNorm1d(following)]
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
def test_random_models(page, check, drawn, change):
    model, X = drawn
    jacobian = page["loop"](model, X)
    errors = check(model, X, jacobian)
    assert errors.keys() == jacobian.keys()
    name = max(jacobian, key=lambda name: jacobian[name].norm())
    J = jacobian[name].clone()
    change(J)
    error = (J - jacobian[name]).norm() / jacobian[name].norm()
    hypothesis.assume(error > 1e-6)  # the odds to miss it are below 1 in 10 000
    with pytest.raises(AssertionError, match=rf"relative error of {name} [\d.e-]+$"):
        check(model, X, jacobian | {name: J})


# Odds and tolerances


@pytest.mark.parametrize("rank", [1, 2, 10])
def test_odds(rank, check):
    """With the last of its bits, an error is missed as often as the page says."""
    torch.manual_seed(0)
    N, C, D = 5, 2, 4
    model, X = nn.Linear(D, C).double(), torch.rand(N, D).double()
    J = torch.einsum("co,ni->ncoi", torch.eye(C), X).double()
    bias = torch.eye(C).double().expand(N, C, C)
    error = torch.randn(N * C, rank).double() @ torch.randn(rank, C * D).double()
    tolerance, share = torch.finfo(torch.float64).eps ** (2 / 3), 0.2
    error *= tolerance / share * J.norm() / error.norm()
    wrong = {"weight": J + error.reshape(J.shape), "bias": bias}
    draws = 600
    missed = sum(not caught(check, model, X, wrong, seed=s) for s in range(draws))
    odds = math.sqrt(2 / math.pi) * share
    noise = 3 * math.sqrt(odds * (1 - odds) / draws)
    assert missed / draws < odds + noise
    if rank == 1:
        assert missed / draws > odds - noise


def deep(dtype):
    layers = []
    for width, following in zip((9, 33, 65, 17), (33, 65, 17, 4)):
        layers += [nn.Linear(width, following), nn.ReLU(), nn.LayerNorm(following)]
    layers = [nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Linear(12, 9), *layers]
    return nn.Sequential(*layers).to(dtype), torch.randn(21, 9).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_leaves_room_for_rounding(dtype, page, check):
    eps = torch.finfo(dtype).eps
    for seed in range(8):
        torch.manual_seed(seed)
        model, X = deep(dtype)
        jacobian = page["loop"](model, X)
        errors = check(model, X, jacobian, seed=seed)
        assert max(errors.values()) < 0.5 * eps ** (2 / 3)
        factor = 1 + 10 * eps ** (2 / 3)
        name = max(jacobian, key=lambda name: jacobian[name].norm())
        wrong = jacobian | {name: factor * jacobian[name]}
        assert caught(check, model, X, wrong, seed=seed) or caught(
            check, model, X, wrong
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_true_zero_is_no_false_alarm(dtype, page, check):
    for seed in range(20):
        torch.manual_seed(seed)
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
        model, X = nn.Sequential(*layers).to(dtype), torch.randn(12, 4).to(dtype)
        check(model, X, page["loop"](model, X), seed=seed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(value, case, check):
    model, X, jacobian = case
    jacobian["0.weight"][1, 2, 3, 0] = value
    with pytest.raises(AssertionError, match="0.weight (nan|inf)"):
        check(model, X, jacobian)


def test_names_only_what_is_wrong(case, check):
    model, X, jacobian = case
    right = check(model, X, jacobian)
    assert list(right) == [name for name, _ in model.named_parameters()]
    jacobian["2.weight"] *= 2
    with pytest.raises(AssertionError, match=r"relative error of 2.weight [\d.]+$"):
        check(model, X, jacobian)


# Bad input


def bad_inputs():
    J = {"weight": torch.zeros(4, 2, 2, 3), "bias": torch.zeros(4, 2, 2)}
    model, X = nn.Linear(3, 2), torch.zeros(4, 3)
    frozen = nn.Linear(3, 2)
    frozen.bias.requires_grad_(False)
    own = {"weight": J["weight"]}

    class Pair(nn.Linear):
        def forward(self, X):
            return super().forward(X), X

    class Detached(nn.Linear):
        def forward(self, X):
            return super().forward(X).detach()

    flat, rows = nn.Sequential(model, nn.Flatten(0)), nn.Unflatten(1, (1, 2))
    prefixed = {f"0.{name}": block for name, block in J.items()}
    three = nn.Sequential(model, rows)
    yield "missing", model, X, own, ValueError, r"lacks the parameters \['bias'\]"
    extra = J | {"scale": J["bias"]}
    yield "unknown", model, X, extra, ValueError, r"require a gradient: \['scale'\]"
    yield "frozen", frozen, X, J, ValueError, r"require a gradient: \['bias'\]"
    swapped = J | {"weight": torch.zeros(2, 4, 2, 3)}
    text = r"weight has shape \[2, 4, 2, 3\], not .* = \[4, 2, 2, 3\]"
    yield "shape", model, X, swapped, ValueError, text
    short = J | {"bias": torch.zeros(4, 2)}
    text = r"bias has shape \[4, 2\], not .* = \[4, 2, 2\]"
    yield "ndim", model, X, short, ValueError, text
    double = J | {"bias": J["bias"].double()}
    text = "bias is torch.float64 on cpu, not torch.float32 on cpu"
    yield "dtype", model, X, double, TypeError, text
    meta = J | {"bias": J["bias"].to("meta")}
    text = "bias is torch.float32 on meta, not torch.float32 on cpu"
    yield "device", model, X, meta, TypeError, text
    lists = J | {"bias": J["bias"].tolist()}
    yield "type", model, X, lists, TypeError, "of bias is no tensor: list"
    text = "no tensor and dict, but Tensor and list"
    yield "no dict", model, X, list(J.values()), TypeError, text
    text = "no tensor and dict, but list and dict"
    yield "no X", model, X.tolist(), J, TypeError, text
    text = r"shape \[8\], not \[N=4, C\]"
    yield "output [N]", flat, X, prefixed, ValueError, text
    text = r"shape \[4, 1, 2\], not \[N=4, C\]"
    yield "output [N, 1, C]", three, X, prefixed, ValueError, text
    text = r"shape \[0, 2\], not \[N=0, C\]"
    yield "no samples", model, X[:0], J, ValueError, text
    yield "tuple", Pair(3, 2), X, J, TypeError, "no tensor with a graph"
    yield "no graph", Detached(3, 2), X, J, TypeError, "no tensor with a graph"
    nothing = nn.Linear(3, 2).requires_grad_(False)
    text = "no parameter of the model requires a gradient"
    yield "all frozen", nothing, X, {}, ValueError, text


BAD = list(bad_inputs())


@pytest.mark.parametrize("bad", BAD, ids=[name for name, *_ in BAD])
def test_bad_input(bad, check):
    _, model, X, jacobian, kind, text = bad
    with pytest.raises(kind, match=text):
        check(model, X, jacobian)


# Inputs that are good


def test_reads_any_layout(case, check):
    model, X, jacobian = case
    strided = {
        k: J.transpose(0, 1).contiguous().transpose(0, 1) for k, J in jacobian.items()
    }
    reversed_ = {k: J.mT.contiguous().mT for k, J in jacobian.items()}
    graph = {k: J.clone().requires_grad_() for k, J in jacobian.items()}
    for layout in (strided, reversed_, graph):
        check(model, X, layout)
    double = {k: 2 * J for k, J in strided.items()}
    with pytest.raises(AssertionError):
        check(model, X, double)


def test_sparse_gradients(page, check):
    embed, out = nn.Embedding(9, 4), nn.Linear(4, 3)
    model = nn.Sequential(embed, nn.Flatten(), out).double()
    words = torch.randint(9, (5, 1))
    jacobian = page["loop"](model, words)
    embed.sparse = True
    check(model, words, jacobian)


def test_integers_scalars_unused_and_frozen_parameters(page, check):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.scale, self.unused = nn.Parameter(torch.rand(())), nn.Linear(2, 2)
            self.out.bias.requires_grad_(False)

        def forward(self, words):
            return self.out(self.embed(words).mean(1)) * self.scale

    model, words = Words().double(), torch.randint(9, (5, 2))
    jacobian = page["loop"](model, words)
    assert check(model, words, jacobian)["unused.weight"] == 0
    jacobian["scale"][3, 1] += 1
    with pytest.raises(AssertionError, match="scale"):
        check(model, words, jacobian)


# State


class Writes(nn.Module):
    """Changes a weight, its inputs and a buffer, draws numbers, keeps its outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=0.1)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("largest", torch.zeros(()))
        self.calls = 0

    def forward(self, X):
        self.calls += 1
        torch.rand(3)
        words = X.long()
        X.add_(1)
        self.largest = X.max()
        self.kept = self.norm(self.embed(words))
        return self.out(self.kept)


def snapshot(model, X):
    state = [copy.copy(vars(module)) for module in model.modules()]
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
        "grads": [p.grad.clone() for p in model.parameters()],
        "attributes": [
            {k: v if isinstance(v, (int, bool)) else id(v) for k, v in s.items()}
            for s in state
        ],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "X": X.clone(),
        "X.grad": X.grad,
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("ends", ["passes", "wrong", "shape", "model raises"])
@pytest.mark.parametrize("enabled", [True, False])
def test_leaves_everything_as_it_was(ends, enabled, check):
    torch.manual_seed(0)
    model, X = Writes().double(), torch.arange(5.0, dtype=torch.float64)
    words = X.long()
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    model.out.register_forward_hook(lambda *_: None)
    model.out.eval()
    fs = copy.deepcopy(model)(X.clone())
    jacobian = {
        k: p.new_zeros(*fs.shape, *p.shape) for k, p in model.named_parameters()
    }
    if ends == "passes":
        clean = copy.deepcopy(model)
        fs = clean(X.clone())
        rows = [
            torch.autograd.grad(f, list(clean.parameters()), retain_graph=True)
            for f in fs.flatten()
        ]
        for name, block in zip(jacobian, zip(*rows)):
            jacobian[name] = torch.stack(block).unflatten(0, fs.shape)
    if ends == "shape":
        jacobian["out.bias"] = jacobian["out.bias"][:1]
    before = snapshot(model, X)
    with torch.set_grad_enabled(enabled):
        if ends == "model raises":
            with pytest.raises(IndexError):
                check(model, X + 9, jacobian)
        elif ends == "passes":
            check(model, X, jacobian)
        else:
            with pytest.raises((AssertionError, ValueError)):
                check(model, X, jacobian)
    torch.testing.assert_close(snapshot(model, X), before, rtol=0, atol=0)
    assert not hasattr(model, "kept")
    assert torch.equal(words, X.long())


def test_a_pass_in_progress_goes_on(page, check):
    """A check between the passes of an extended model does not touch what it stores."""
    torch.manual_seed(0)
    model, X = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        torch.rand(5, 3),
    )
    model.double()
    X = X.double()
    jacobian = page["loop"](model, X)
    Z = torch.rand_like(X)
    other = page["loop"](model, Z)

    def between(model):
        check(model, Z, other)

    torch.testing.assert_close(page["batch_grad"](model, X, between=between), jacobian)


def test_warns_of_nothing(page, check):
    model, X = page["mlp"]()
    jacobian = page["loop"](model, X)
    with warnings.catch_warnings(action="error"):
        check(model, X, jacobian)
        check(page["extended"](model), X, jacobian)


@pytest.mark.parametrize("transposed", [False, True])
def test_copies_no_jacobian(transposed, check):
    model, X = nn.Linear(50, 30).double(), torch.rand(40, 50, dtype=torch.float64)
    shape = (30, 40) if transposed else (40, 30)
    jacobian = {k: p.new_zeros(*shape, *p.shape) for k, p in model.named_parameters()}
    if transposed:
        jacobian = {name: J.transpose(0, 1) for name, J in jacobian.items()}
    with profile(profile_memory=True) as recorded:
        assert caught(check, model, X, jacobian)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    assert max(accumulate(e.nbytes() for e in events)) < jacobian["weight"].nbytes / 50
