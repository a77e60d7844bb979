"""The functions of ``residual_networks.py``, on models that its page does not show."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

METHODS = "vmap_jacrev", "batch_grad", "sqrt_ggn"
BACKPACK = METHODS[1:]


class Residual(nn.Module):
    """A shortcut that is added in place, and one activation that is called twice."""

    def __init__(self, first, second, shortcut, activation):
        super().__init__()
        self.first, self.second = first, second
        self.shortcut, self.activation = shortcut, activation

    def forward(self, x):
        out = self.second(self.activation(self.first(x)))
        out += self.shortcut(x)
        return self.activation(out)


def bottleneck():
    """Image sides that differ, pooling to more than one pixel, three convolutions."""
    first = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    second = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 4, 1))
    block = Residual(first, second, nn.Conv2d(2, 4, 1), nn.ELU(inplace=True))
    pool = nn.AdaptiveAvgPool2d((2, 1))
    return nn.Sequential(block, pool, nn.Flatten(), nn.Linear(8, 3)), (5, 2, 4, 6)


def residual_mlp():
    first = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    block = Residual(first, nn.Linear(5, 6), nn.Identity(), nn.Tanh())
    return nn.Sequential(block, nn.Linear(6, 4)), (7, 6)


def two_pools():
    layers = (
        nn.AdaptiveAvgPool2d(4),
        nn.Conv2d(1, 2, 3),
        nn.AdaptiveAvgPool2d((None, 1)),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)), (5, 1, 8, 12)


def frozen():
    model, shape = residual_mlp()
    model[0].first[0].weight.requires_grad_(False)
    return model, shape


def one_sample_one_output():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)), (
        1,
        1,
        4,
        4,
    )


MODELS = bottleneck, residual_mlp, two_pools, frozen, one_sample_one_output


def ready(model, shape):
    """Return the model in eval mode with statistics of its own, and inputs."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval(), torch.rand(shape)


def reference(model, X):
    """Return the Jacobian from ``autograd.functional``, on a copy of the model."""
    model = copy.deepcopy(model)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    blocks = torch.autograd.functional.jacobian(
        lambda *values: functional_call(model, dict(zip(params, values)), (X,)),
        tuple(params.values()),
    )
    return dict(zip(params, blocks))


def state(model):
    """Return all that a method could leave behind on a model."""
    modules = dict(model.named_modules())
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in modules.values()]
    grads = [p.grad for p in model.parameters()]
    parts = [sorted(vars(part)) for part in [*modules.values(), *model.parameters()]]
    modes = [m.training for m in modules.values()]
    flags = [p.requires_grad for p in model.parameters()]
    return repr(model), list(modules), hooks, grads, parts, modes, flags


@pytest.fixture(scope="module")
def names(taught):
    return taught("trust/residual_networks")


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def compute(names):
    """Return a function that runs a method and checks what it leaves behind."""

    def run(method, model, X):
        before, values = state(model), copy.deepcopy(model.state_dict())
        try:
            if method not in BACKPACK:
                return names[method](model, X)
            extended = names["extended_copy"](model, X)
            jacobian = names[method](extended, X)
            stored = {"grad_batch", "sqrt_ggn_exact"}
            assert not any(vars(p).keys() & stored for p in extended.parameters())
            return jacobian
        finally:
            assert state(model) == before
            assert_close(model.state_dict(), values, rtol=0, atol=0)
            assert not X.requires_grad

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_reference_and_leaves_the_model(make, method, compute):
    model, X = ready(*make())
    assert_close(compute(method, model, X), reference(model, X))


@hypothesis.settings(
    deadline=None,
    max_examples=6,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    stride=st.integers(1, 2),
    activation=st.sampled_from([nn.ReLU, nn.ELU, nn.LeakyReLU]),
    inplace=st.booleans(),
    N=st.integers(1, 3),
    C=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_methods_agree_on_random_networks(
    compute, widths, stride, activation, inplace, N, C, seed
):
    torch.manual_seed(seed)
    blocks = []
    for inputs, outputs in zip(widths, widths[1:]):
        norm = nn.BatchNorm2d(outputs)
        first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm
        )
        second, shortcut = (
            nn.Conv2d(outputs, outputs, 1),
            nn.Conv2d(inputs, outputs, 1, stride),
        )
        blocks.append(Residual(first, second, shortcut, activation(inplace=inplace)))
    layers = *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], C)
    model, X = ready(nn.Sequential(*layers), (N, widths[0], 6, 6))
    expected = reference(model, X)
    for method in METHODS:
        assert_close(compute(method, model, X), expected)


@pytest.mark.parametrize("method", BACKPACK)
def test_batch_norm_in_training_mode_raises(method, compute):
    model, X = ready(*bottleneck())
    model[0].first[1].train()
    with pytest.raises(ValueError, match=r"0\.first\.1 is batch norm in training mode"):
        compute(method, model, X)


def sizes_do_not_divide():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(1, 2, 2), nn.Flatten())
    return model, torch.rand(4, 1, 7, 6)


class Shared(nn.Module):
    """One pooling layer for two sizes, which no single kernel can replace."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(2), nn.Conv2d(1, 1, 3)

    def forward(self, X):
        pooled = self.pool(self.conv(X)) + self.pool(X)
        return torch.flatten(pooled, 1)


@pytest.mark.parametrize("make", [sizes_do_not_divide, lambda: (Shared(), None)])
def test_pooling_that_no_kernel_replaces_stays(make, compute):
    model, X = make()
    X = torch.rand(4, 1, 6, 6) if X is None else X
    assert_close(compute("batch_grad", model, X), reference(model, X))
    with pytest.raises(NotImplementedError, match="AdaptiveAvgPool2d"):
        compute("sqrt_ggn", model, X)


class PreActivation(nn.Module):
    """In place, ReLU overwrites what the shortcut reads: the converter changes that."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace)

    def forward(self, X):
        X = self.first(X)
        return self.last(self.relu(X)) + X


@pytest.mark.parametrize("method", BACKPACK)
def test_a_converter_that_changes_the_model_raises(method, compute):
    X = torch.rand(5, 4)
    model = PreActivation(inplace=False)
    assert_close(compute(method, model, X), reference(model, X))
    with pytest.raises(ValueError, match="the converter changed the outputs"):
        compute(method, PreActivation(inplace=True), X)


class Center(nn.Linear):
    """Subtracts the mean of the batch, so that all samples mix by a known amount."""

    def forward(self, X):
        return super().forward(X - X.mean(0))


@pytest.mark.parametrize("frozen", [False, True])
def test_influence_of_samples(frozen, names):
    N, model = 5, Center(3, 2).requires_grad_(not frozen)
    before = state(model)
    influence = names["sample_influence"](model, torch.rand(N, 3))
    amount = (torch.eye(N) - 1 / N).abs()
    assert_close(influence, amount * model.weight.detach().norm())
    assert state(model) == before


def test_influence_of_earlier_samples_has_the_output_in_the_row(names):
    class Sums(nn.Linear):
        def forward(self, X):
            return super().forward(X.cumsum(0))

    model = Sums(3, 2)
    influence = names["sample_influence"](model, torch.rand(4, 3))
    assert_close(influence, torch.ones(4, 4).tril() * model.weight.detach().norm())


def test_influence_of_a_model_that_works_in_place_leaves_the_inputs(names):
    class InPlace(nn.Linear):
        def forward(self, X):
            return super().forward(X.mul_(0.5))

    model, X = InPlace(3, 2), torch.rand(5, 3)
    before = X.clone()
    influence = names["sample_influence"](model, X)
    assert_close(influence, torch.eye(5) * 0.5 * model.weight.detach().norm())
    assert_close(X, before, rtol=0, atol=0)


def test_influence_with_batch_norm_keeps_the_statistics(names):
    model, X = ready(*bottleneck())
    before = copy.deepcopy(model.train().state_dict())
    assert (names["sample_influence"](model, X) > 0).all()
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(names["sample_influence"](model.eval(), X) > 0, torch.eye(5) > 0)


def test_influence_of_a_model_that_sets_a_weight_leaves_the_weight(names):
    class Masked(nn.Linear):
        def forward(self, X):
            self.weight.data = self.weight.data * (torch.arange(3) < 2)
            self.weight.data /= 2
            return super().forward(X)

    model = Masked(3, 2)
    before = state(model)
    influence = names["sample_influence"](model, torch.rand(5, 3))
    used = model.weight.detach()[:, :2] / 2
    assert_close(influence, torch.eye(5) * used.norm())
    assert state(model) == before


VIEW = "RuntimeError: Output 0 of BackwardHookFunction is a view and is being modified"
LOST = "AssertionError: BackPACK extension expects a backpropagation quantity but it is"
RULE = "Extension saving to {} does not have an extension for Module"
TEXTS = {  # of sqrt_ggn, as the questions page quotes them, too
    "ReLU(inplace=True)": VIEW,
    "+=": VIEW,
    "torch.relu": LOST,
    "+": LOST,
    "one ReLU, called twice": "AttributeError: 'ReLU' object has no attribute 'output'",
    "AdaptiveAvgPool2d": f"NotImplementedError: {RULE.format('sqrt_ggn_exact')}",
    "torch.flatten": "RuntimeError: ('Difference in dimension must be 1.'",
}


def test_each_step_raises_the_text_that_people_search_for(names):
    error_of, leaves, x = names["error_text"], names["extended_leaves"], names["x"]
    steps = names["in_place"] | names["no_layer"]
    assert steps.keys() == TEXTS.keys()
    for title, step in steps.items():
        net = copy.deepcopy(names["SmallResidual"](**step))
        assert error_of(names["sqrt_ggn"], leaves(net), x).startswith(TEXTS[title])


def test_converter_raises_the_texts_that_people_search_for(names):
    texts = [
        names["error_text"](
            names["extended_copy"], names["SmallResidual"](**step), names["x"]
        )
        for step in names["cases"].values()
    ]
    assert texts[0].endswith("object has no attribute 'split'")
    assert texts[1].startswith("RuntimeError: Expecting types [float, Node], got")
    assert texts[2] == "ValueError: the converter changed the outputs of the model"


def test_batch_norm_in_training_mode_raises_the_texts_that_people_search_for(names):
    model, X = ready(*residual_mlp())
    extended = names["extended_copy"](model, X).train()
    error_of, text = (
        names["error_text"],
        "Encountered BatchNorm module in training mode",
    )
    assert error_of(names["batch_grad"], extended, X) == f"UserWarning: {text}"
    assert error_of(names["sqrt_ggn"], extended, X) == f"NotImplementedError: {text}"
    text = error_of(names["vmap_jacrev"], model.train(), X)
    assert "in-place operation" in text
    assert "would mutate a captured Tensor" in text


def test_error_that_is_gone_fails_the_page(names):
    with pytest.raises(AssertionError, match="correct this page"):
        names["error_text"](lambda: None)
