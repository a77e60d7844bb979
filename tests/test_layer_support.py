"""The cases of ``layer_support.py``, and ``verdicts`` on models it does not show."""

import copy
import re
import warnings

import pytest
import torch
from conftest import EXAMPLES, parse
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

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
    ("checkpoint", "vmap(jacrev)"): "don't yet support saved tensor hooks",
    ("PReLU", "vmap(jacrev)"): "The size of tensor a (5) must match the size of tensor",
    ("LSTM", "vmap(jacrev)"): "doesn't match the broadcast shape",
}

# What is wrong without an error, by the reasons that the page gives.
TIED = {"two Linear, one weight", "Embedding tied to Linear"}
PADDINGS = {"circular padding", "reflect padding", "replicate padding"}
MIXED = {"softmax over samples", "minus the mean of samples"}
NORMS = {f"BatchNorm{d}d, training" for d in (1, 2, 3)}
ONE_PASS = TIED | PADDINGS | {"AvgPool2d, divisor", "Dropout of zeros"}
PASSES = TIED | PADDINGS | MIXED | NORMS | {"layer, and its weight", "padding='same'"}
FREQUENCY, UNTRACKED = "Embedding, scale_grad_by_freq", "BatchNorm2d, no statistics"
WRONG = {
    "vmap(jacrev)": MIXED | {UNTRACKED, FREQUENCY, "torch.cdist"},
    "SqrtGGNExact": ONE_PASS,
    "SqrtGGNExact, converted": ONE_PASS | {"square transpose"},
    "BatchGrad": PASSES | {"LSTM, initial state"},
    "BatchGrad, converted": PASSES,
    "jacrev of the batch": {"torch.cdist"},
    "is_grads_batched": set(),
    "functional.jacobian": set(),
}


@pytest.fixture(scope="module")
def names(taught):
    return taught("trust/layer_support")


@pytest.fixture(scope="module")
def results(names):
    return names["results"]


@pytest.fixture
def verdicts(names):
    """Return ``verdicts``, and look at what each call leaves behind."""

    def judge(model, X, **options):
        before, random = state(model, X), torch.get_rng_state()
        try:
            return names["verdicts"](model, X, **options)
        finally:
            assert_close(state(model, X), before, rtol=0, atol=0)
            assert torch.equal(torch.get_rng_state(), random)
            assert torch.get_default_dtype() == torch.float32
            assert torch.is_grad_enabled()

    return judge


def state(model, X):
    """Return all that a method could leave behind in a model and its inputs."""
    flags = [X.requires_grad, X.grad is None]
    for p in model.parameters():
        flags += [p.requires_grad, p.grad is None, len(p._backward_hooks or ())]
    for module in model.modules():
        hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
        flags += [module.training, len(vars(module)), *hooks]
        flags += [id(value) for value in vars(module).values()]
    tensors = [X, *model.parameters(), *model.buffers()]
    return [t.detach().clone() for t in tensors], flags


def kind(verdict):
    return verdict if verdict in ("right", "wrong") else "raises"


def test_sizes_differ(names):
    assert len(names["cases"]) == 105
    torch.set_default_dtype(torch.float64)
    try:
        outputs = {name: case() for name, case in names["cases"].items()}
        outputs = {k: (model, X, model(X)) for k, (model, X) in outputs.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    for name, (model, X, fs) in outputs.items():
        N, C = fs.shape
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
        assert torch.equal(torch.get_rng_state(), before)
        assert_close((first.state_dict(), X), (second.state_dict(), again), msg=name)
        assert not {*map(id, first.modules())} & {*map(id, second.modules())}, name
        tensors = [X, *first.state_dict().values()]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        assert dtypes == {torch.float64}, name


def test_reference_gives_the_gradient_of_any_weighted_sum(names):
    for name, case in names["cases"].items():
        model, X = case()
        torch.manual_seed(1)
        J = names["autograd_loop"](model, X)
        torch.manual_seed(1)
        fs = model(X)
        u = torch.rand_like(fs)
        params = {k: p for k, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(fs, params.values(), u, materialize_grads=True)
        sums = {k: torch.einsum("nc,nc...->...", u, block) for k, block in J.items()}
        assert_close(sums, dict(zip(params, grads)), msg=name)


def test_wrong_without_an_error_are_the_cases_that_the_page_explains(names, results):
    wrong = {method: set() for method in names["methods"]}
    for (name, method), verdict in results.items():
        if verdict == "wrong":
            wrong[method].add(name)
    assert wrong == WRONG


def test_verdicts_are_those_of_a_comparison_by_hand(names, results):
    """The methods on fresh cases, against ``autograd.functional``."""
    torch.set_default_dtype(torch.float64)
    try:
        for name in ["Conv1d", "circular padding", *MIXED, "LSTM", "torch.cdist"]:
            model, X = names["cases"][name]()
            expected = names["functional_jacobian"](model, X)
            for title, method in names["methods"].items():
                try:
                    with warnings.catch_warnings(action="ignore"):
                        J = method(copy.deepcopy(model), X)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}".split("\n")[0]
                    assert results[name, title] == re.sub(" at 0x[0-9a-f]+", "", text)
                    continue
                right = all(torch.allclose(J[k], J0) for k, J0 in expected.items())
                assert results[name, title] == ("right" if right else "wrong")
    finally:
        torch.set_default_dtype(torch.float32)


def test_page_counts_the_results(names, results):
    page = parse("auto_examples/trust/layer_support.html")
    text = "\n".join(b.text for b in page.select(".sphx-glr-script-out pre"))
    for method in names["methods"]:
        kinds = [kind(results[name, method]) for name in names["cases"]]
        counts = [kinds.count(k) for k in ("right", "wrong", "raises")]
        assert "{}: {} right, {} wrong, {} errors\n".format(method, *counts) in text
        assert names["count"](names["cases"], method) == tuple(counts)


def test_figure_says_how_many_are_right_and_wrong(results):
    page = parse("auto_examples/trust/layer_support.html")
    images = page.select("img.sphx-glr-single-img[alt]")
    first = images[-1]["alt"]
    vmap = [verdict for (_, method), verdict in results.items() if "vmap" in method]
    text = f"{vmap.count('right')} of {len(vmap)} right, {vmap.count('wrong')} wrong"
    assert f"vmap(jacrev): {text}. BatchGrad: {len(WRONG['BatchGrad'])} wrong" in first


def test_errors_are_those_that_people_search_for(results):
    for pair, text in ERRORS.items():
        assert text in results[pair], pair
    for verdict in results.values():
        assert "\n" not in verdict and "0x" not in verdict


# Other models


class Block(nn.Module):
    """A residual block that ends in outputs of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, X):
        return self.second(X + torch.relu(self.first(X)))


class Keeps(nn.Tanh):
    """A layer that keeps its outputs, in places that ``deepcopy`` looks into."""

    def forward(self, X):
        self.last = super().forward(X)
        self.kept = {"lists": [(self.last,)]}
        return self.last


class InPlace(nn.Linear):
    def forward(self, X):
        return super().forward(X.mul_(0.5))


class Zeros(nn.Linear):
    """A layer that makes a tensor of the default dtype."""

    def forward(self, X):
        return super().forward(X) @ torch.ones(3, 3)


class Slope(nn.Linear):
    """A layer that differentiates by its inputs."""

    def forward(self, X):
        u = torch.tanh(super().forward(X)).sum()
        return torch.autograd.grad(u, X, create_graph=True)[0]


class Pair(nn.Linear):
    def forward(self, X):
        return super().forward(X), X


def mlp(*layers):
    return nn.Sequential(nn.Linear(6, 7), *layers, nn.Linear(7, 3))


def sigmoids():
    """Return convolutions whose first block is tiny, padded in a circle."""
    options = {"padding": 1, "padding_mode": "circular"}
    layers = [[nn.Conv1d(1, 1, 3, **options), nn.Sigmoid()] for _ in range(12)]
    layers = nn.Unflatten(1, (1, 6)), *sum(layers, []), nn.Flatten(), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def used(model):
    model(torch.rand(4, 6))
    return model


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(6, 3))


class LowRank(nn.Linear):
    """A frozen layer, and an adapter of low rank."""

    def __init__(self):
        super().__init__(6, 3)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, X):
        return super().forward(X) + self.up(self.down(X))


class Temperature(nn.Linear):
    """A linear layer, and a parameter without axes."""

    def __init__(self):
        super().__init__(6, 3)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, X):
        return super().forward(X) / self.temperature


RIGHT = dict.fromkeys(WRONG, "right")
OTHERS = {
    "one layer": (
        lambda: nn.Linear(6, 3),
        {"SqrtGGNExact": "right", "BatchGrad, converted": "raises"},
    ),
    "double precision": (lambda: mlp(nn.Tanh()).double(), RIGHT),
    "adapter": (LowRank, {"vmap(jacrev)": "right", "is_grads_batched": "right"}),
    "temperature": (Temperature, {"vmap(jacrev)": "right", "BatchGrad": "raises"}),
    "CELU": (lambda: mlp(nn.CELU()), {"SqrtGGNExact": "raises"}),
    "half frozen": (lambda: mlp(nn.Linear(7, 7).requires_grad_(False)), RIGHT),
    "own class": (Block, {"SqrtGGNExact": "raises", "BatchGrad": "right"}),
    "batch norm": (
        lambda: mlp(nn.BatchNorm1d(7)),
        {"BatchGrad": "wrong", "vmap(jacrev)": "raises", "is_grads_batched": "right"},
    ),
    "kept activations": (
        lambda: used(mlp(Keeps())),
        {"BatchGrad": "right", "vmap(jacrev)": "right", "SqrtGGNExact": "raises"},
    ),
    "old weight_norm": (lambda: used(old_weight_norm()), {"vmap(jacrev)": "right"}),
    "in place": (
        lambda: InPlace(6, 3),
        {"is_grads_batched": "right", "functional.jacobian": "right"},
    ),
    "default dtype": (
        lambda: Zeros(6, 3),
        {"vmap(jacrev)": "right", "functional.jacobian": "right"},
    ),
    "derivative inside": (
        lambda: nn.Sequential(Slope(6, 5), nn.Linear(6, 3)),
        {"is_grads_batched": "right"},
    ),
    "average pooling": (
        lambda: (
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.AvgPool1d(3), nn.Flatten(0))
            and nn.Sequential(
                nn.Unflatten(1, (1, 6, 1)),
                nn.Conv2d(1, 3, (3, 1)),
                nn.AvgPool2d((4, 1)),
                nn.Flatten(),
            )
        ),
        {"BatchGrad": "right"},
    ),
    "tiny block": (
        sigmoids,
        {"BatchGrad": "wrong", "vmap(jacrev)": "right", "is_grads_batched": "right"},
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_verdicts_on_other_models(other, scale, verdicts, names):
    make, known = OTHERS[other]
    torch.manual_seed(3)
    model = make()
    X = scale * torch.rand(4, 6, dtype=next(model.parameters()).dtype)
    found = verdicts(model, X)
    assert found.keys() == names["methods"].keys()
    assert {method: kind(found[method]) for method in known} == known, found


def test_precision_is_that_of_the_call(verdicts, names):
    model, X = names["cases"]["LSTM"]()
    assert kind(verdicts(model, X)["vmap(jacrev)"]) == "raises"
    assert verdicts(model, X, dtype=torch.float32)["vmap(jacrev)"] == "right"


def test_one_sample_and_equal_sizes(verdicts):
    torch.manual_seed(4)
    assert verdicts(mlp(nn.PReLU()), torch.rand(3, 6))["vmap(jacrev)"] == "wrong"
    assert verdicts(mlp(nn.ReLU()), torch.rand(1, 6)) == RIGHT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_inside(mode, names):
    with mode():
        assert names["verdicts"](mlp(nn.ReLU()), torch.rand(4, 6)) == RIGHT


@pytest.mark.parametrize("size", [1e-3, 1e-7])
def test_blocks_are_compared_by_their_own_size(size, names):
    expected = {"a": torch.rand(5, 2, 3), "b": size * torch.rand(5, 2, 4)}
    agree = names["agree"]
    assert agree({k: block * (1 + 1e-6) for k, block in expected.items()}, expected)
    assert not agree(expected | {"b": 1.01 * expected["b"]}, expected) or size < 1e-5
    exact = {k: block.double() for k, block in expected.items()}
    torch.set_default_dtype(torch.float64)
    try:
        assert agree({k: block + 1e-15 for k, block in exact.items()}, exact)
        assert not agree(exact | {"b": (1 + 1e-6) * exact["b"]}, exact)
        assert not agree(exact | {"b": exact["b"].mT}, exact)
        assert not agree({"a": exact["a"]}, exact)
        assert not agree(exact | {"a": exact["a"] * torch.nan}, exact)
    finally:
        torch.set_default_dtype(torch.float32)


def hooked():
    layer = nn.Linear(6, 3)
    layer.bias.register_hook(lambda gradient: 0.5 * gradient)
    return layer


def hooked_module():
    model = mlp(nn.Tanh())
    model[2].register_full_backward_hook(lambda layer, grads, _: (grads[0] / 2,))
    return model


class Checkpointed(nn.Module):
    def __init__(self, *before):
        super().__init__()
        self.before, self.last = nn.Sequential(*before), nn.Linear(6, 3)

    def forward(self, X):
        return checkpoint(self.last, self.before(X), use_reentrant=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), r"is \[4, 3, 1\]"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), r"\[N=4, C\], but is \[4\]"),
        (
            nn.Sequential(nn.Linear(6, 3), nn.Unflatten(0, (2, 2)), nn.Flatten(1)),
            "2, 6",
        ),
        (Pair(6, 3), "is tuple"),
        (nn.Linear(6, 3).requires_grad_(False), "no parameter of the model requires"),
        (nn.Tanh(), "no parameter of the model requires"),
        (nn.Sequential(nn.Linear(6, 3), nn.Threshold(9, torch.inf)), "is not finite"),
        (hooked(), "bias is complex, or has a hook"),
        (nn.EmbeddingBag(9, 3, sparse=True), "an embedding has sparse gradients"),
        (hooked_module(), "a module has a backward hook"),
        (nn.Linear(6, 3, dtype=torch.cfloat), "weight is complex"),
        (Checkpointed(), "When use_reentrant=True"),
        (Checkpointed(nn.Linear(6, 6)), "When use_reentrant=True"),
    ],
)
def test_bad_models_raise(model, message, verdicts):
    with pytest.raises((ValueError, RuntimeError), match=message):
        verdicts(model, torch.rand(4, 6))


def test_sparse_as_a_name_of_your_own_is_no_error(verdicts):
    model = nn.Linear(6, 3)
    model.sparse = nn.Identity()
    assert verdicts(model, torch.rand(4, 6))["vmap(jacrev)"] == "right"


def test_other_inputs_raise(verdicts, names):
    with pytest.raises(ValueError, match="X must be a tensor .* but is dict"):
        names["verdicts"](nn.Linear(6, 3), {"x": torch.rand(4, 6)})
    tokens = torch.randint(9, (4, 6))
    hides = nn.Sequential(Checkpointed(), nn.Linear(3, 2))
    hides[0].last = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(UserWarning, match="None of the inputs have requires_grad"):
        verdicts(hides, tokens)


def test_page_sets_no_default_dtype(names):
    assert "set_default_dtype" not in re.sub(
        r"def verdicts.*?return result\n",
        "",
        (EXAMPLES / "trust/layer_support.py").read_text(),
        flags=re.DOTALL,
    )
