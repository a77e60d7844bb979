"""The matrix of ``layer_support.py``, and ``verdicts`` on models it does not show."""

import copy
import re
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import parse
from torch import nn
from torch.testing import assert_close

# Texts that people search for, and a case and a method that raise them.
ERRORS = {
    ("layer called twice", "BatchGrad"): "'Linear' object has no attribute 'output'",
    ("LayerNorm", "BatchGrad"): "'Parameter' object has no attribute 'grad_batch'",
    ("GELU", "SqrtGGNExact"): "Extension saving to sqrt_ggn_exact does not have an",
    ("own class, a chain", "SqrtGGNExact"): "NotImplementedError: Extension saving to",
    ("skip", "SqrtGGNExact"): "expects a backpropagation quantity but it is None",
    ("skip, in place", "BatchGrad"): "Output 0 of BackwardHookFunction is a view and",
    ("autograd.Function", "vmap(jacrev)"): "In order to use an autograd.Function with",
    ("Dropout, training", "vmap(jacrev)"): "vmap: called random operation while in",
    ("BatchNorm1d, training", "vmap(jacrev)"): "attempted to call in-place",
    ("unused parameter", "is_grads_batched"): "appears to not have been used in the",
}


@pytest.fixture(scope="module")
def names(taught):
    return taught("trust/layer_support")


@pytest.fixture(autouse=True)
def settings(names):
    """Those of the page: BackPACK's rule for ``AvgPool2d`` needs the default type."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture
def figures(names):
    """The figures that the script leaves open."""
    figures = [plt.figure(number) for number in plt.get_fignums()]
    return [figure for figure in figures if figure.get_suptitle().startswith("Right, ")]


def state(model, X):
    """Return all that a method could leave behind in a model and its inputs."""
    tensors = {"X": X.clone()} | {k: t.clone() for k, t in model.state_dict().items()}
    flags = [X.requires_grad, X.grad]
    flags += [(p.requires_grad, p.grad) for p in model.parameters()]
    for module in model.modules():
        hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
        flags.append((type(module), module.training, sorted(vars(module)), hooks))
    return tensors, flags


def test_sizes_differ(names):
    assert len(names["cases"]) >= 70
    for name, case in names["cases"].items():
        model, X = case()
        N, C = model(X).shape
        sizes = [N, C, *X.shape[1:]]
        assert len(X) == N and len(set(sizes)) == len(sizes), f"{name}: {sizes}"
        *hidden, weight, bias = [p.shape for p in model.parameters()]
        assert weight[0] == C and bias == (C,), name
        assert not {N, C} & {n for shape in hidden for n in shape}, name
        assert weight[1] not in (N, C), name


def test_cases_are_fresh_and_deterministic(names):
    for seed, (name, case) in enumerate(names["cases"].items()):
        first, X = case()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        second, again = case()
        assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
        assert_close((first.state_dict(), X), (second.state_dict(), again), msg=name)
        assert not {*map(id, first.modules())} & {*map(id, second.modules())}, name
        tensors = [X, *first.state_dict().values()]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        assert dtypes == {torch.float64}, name


def test_reference_gives_the_gradient_of_any_weighted_sum(names):
    for name, case in names["cases"].items():
        model, X = case()
        torch.manual_seed(1)
        J = names["reference"](model, X)
        torch.manual_seed(1)
        fs = model(X)
        u = torch.rand_like(fs)
        params = {k: p for k, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(fs, params.values(), u, materialize_grads=True)
        sums = {k: torch.einsum("nc,nc...->...", u, block) for k, block in J.items()}
        assert_close(sums, dict(zip(params, grads)), msg=name)


def test_methods_leave_the_model_and_get_their_verdict(names):
    for name, case in names["cases"].items():
        model, X = case()
        before = state(model, X)
        torch.manual_seed(2)
        expected = names["reference"](model, X)
        for title, method in names["methods"].items():
            verdict = names["results"][name, title]
            torch.manual_seed(2)
            try:
                with warnings.catch_warnings(action="ignore"):
                    J = method(model, X)
            except Exception as error:
                text = f"{type(error).__name__}: {error}".split("\n")[0]
                assert verdict == re.sub(" at 0x[0-9a-f]+", "", text), (name, title)
            else:
                right = J.keys() == expected.keys() and all(
                    J[k].shape == block.shape and torch.allclose(J[k], block)
                    for k, block in expected.items()
                )
                assert verdict == ("right" if right else "wrong"), (name, title)
            assert_close(state(model, X)[0], before[0], rtol=0, atol=0)
            assert state(model, X)[1] == before[1], (name, title)
    assert torch.is_grad_enabled()


def test_page_counts_the_results(names):
    cases, methods, results = names["cases"], names["methods"], names["results"]
    blocks = parse("auto_examples/trust/layer_support.html").select(
        ".sphx-glr-script-out pre"
    )
    text = "\n".join(block.text for block in blocks)
    assert f"{len(cases)} cases, {len(results)} verdicts" in text
    assert len(results) == len(cases) * len(methods)
    for method in methods:
        verdicts = [results[name, method] for name in cases]
        right, wrong = verdicts.count("right"), verdicts.count("wrong")
        raises = sum(bool(re.match(r"\w+(Error|Exception): ", v)) for v in verdicts)
        assert right + wrong + raises == len(cases)
        assert f"{method}: {right} right, {wrong} wrong, {raises} raises\n" in text


def test_figures_show_each_verdict(names, figures):
    marks = {"right": 0, "wrong": 0, "raises": 0}
    rows = []
    for figure in figures:
        for ax in figure.axes:
            rows += [label.get_text() for label in ax.get_yticklabels()]
            for dots in ax.collections:
                marks[dots.get_label()] += len(dots.get_offsets())
    assert sorted(rows) == sorted(names["cases"])
    verdicts = list(names["results"].values())
    right, wrong = verdicts.count("right"), verdicts.count("wrong")
    raises = len(verdicts) - right - wrong
    assert marks == {"right": right, "wrong": wrong, "raises": raises}


def test_figures_can_be_read(figures):
    assert figures
    for figure in figures:
        assert figure.get_figwidth() <= 6
        figure.canvas.draw()
        for text in figure.findobj(plt.Text):
            if text.get_visible() and text.get_text().strip():
                assert text.get_fontsize() >= 10
                box = text.get_window_extent()
                inside = figure.bbox.contains(*box.min) and figure.bbox.contains(
                    *box.max
                )
                assert inside, f"{text.get_text()} is cut off"


def test_errors_are_those_that_people_search_for(names):
    for pair, text in ERRORS.items():
        assert text in names["results"][pair], pair
    for verdict in names["results"].values():
        assert "\n" not in verdict and "0x" not in verdict


class Block(nn.Module):
    """A residual block that ends in outputs of its own."""

    def __init__(self, *sizes):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, X):
        return self.second(X + torch.relu(self.first(X)))


def mlp(*layers):
    return nn.Sequential(nn.Linear(6, 7), *layers, nn.Linear(7, 3))


OTHERS = {
    "one layer": (
        lambda: nn.Linear(6, 3),
        {"SqrtGGNExact": "right", "BatchGrad + converter": "raises"},
    ),
    "single precision": (lambda: mlp(nn.Tanh()).float(), {}),
    "CELU": (lambda: mlp(nn.CELU()), {"SqrtGGNExact": "raises"}),
    "half frozen": (lambda: mlp(nn.Linear(7, 7).requires_grad_(False)), {}),
    "own class": (Block, {"SqrtGGNExact": "raises", "BatchGrad": "right"}),
    "batch norm": (
        lambda: mlp(nn.BatchNorm1d(7)),
        {"BatchGrad": "wrong", "vmap(jacrev)": "raises", "is_grads_batched": "right"},
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_verdicts_on_other_models(other, names):
    make, known = OTHERS[other]
    torch.manual_seed(3)
    model = make()
    X = torch.rand(4, 6, dtype=next(model.parameters()).dtype)
    before, random = copy.deepcopy(state(model, X)), torch.get_rng_state()
    verdicts = names["verdicts"](model, X)
    assert verdicts.keys() == names["methods"].keys()
    if not known:
        assert set(verdicts.values()) == {"right"}
    for method, expected in known.items():
        verdict = verdicts[method]
        assert expected == (verdict if verdict in ("right", "wrong") else "raises")
    assert_close(state(model, X)[0], before[0], rtol=0, atol=0)
    assert state(model, X)[1] == before[1]
    assert_close(torch.get_rng_state(), random, rtol=0, atol=0)


def test_one_sample_and_equal_sizes(names):
    torch.manual_seed(4)
    verdicts = names["verdicts"](mlp(nn.PReLU()), torch.rand(3, 6))
    assert verdicts["vmap(jacrev)"] == "wrong"
    verdicts = names["verdicts"](mlp(nn.ReLU()), torch.rand(1, 6))
    assert set(verdicts.values()) == {"right"}


class Pair(nn.Linear):
    def forward(self, X):
        return super().forward(X), X


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), r"is \[4, 3, 1\]"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), r"\[N=4, C\], but is \[4\]"),
        (
            nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (8, 3)), nn.Linear(3, 2)),
            "8, 2",
        ),
        (Pair(6, 3), "is tuple"),
        (nn.Linear(6, 3).requires_grad_(False), "no parameter of the model requires"),
        (nn.Tanh(), "no parameter of the model requires"),
    ],
)
def test_bad_models_raise(model, message, names):
    with pytest.raises(ValueError, match=message):
        names["verdicts"](model, torch.rand(4, 6))
    assert torch.is_grad_enabled()
