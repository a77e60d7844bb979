"""The functions of ``sequence_models.py``, on models that its page does not show."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

METHODS = "loop_jacobian", "grads_batched_jacobian", "sample_loop_jacobian"


class Recurrent(nn.Module):
    """A recurrent layer over tokens, and one linear layer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn = kind(4, 3, batch_first=True, **options)
        self.out = nn.Linear(3 * (1 + self.rnn.bidirectional), 2)

    def forward(self, words):
        return self.out(self.rnn(self.embed(words))[0])


class Attend(nn.Module):
    """Attention with a query of its own, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.query, self.unused = nn.Parameter(torch.rand(1, 2, 6)), nn.Parameter(X0())
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, X):
        query = self.query.expand(len(X), -1, -1)
        return self.attention(query, X, X, need_weights=False)[0]


def X0():
    return torch.rand(5)


def words():
    return torch.randint(9, (4, 5))


CASES = {
    "GRU": lambda: (Recurrent(nn.GRU, num_layers=2, bidirectional=True), words()),
    "RNN": lambda: (Recurrent(nn.RNN, nonlinearity="relu"), words()),
    "LSTM": lambda: (Recurrent(nn.LSTM), words()),
    "attention, not all used": lambda: (Attend(), torch.rand(4, 5, 6)),
    "one number per token": lambda: (nn.Embedding(9, 1), words()),
    "one output": lambda: (nn.Linear(3, 1), torch.rand(4, 3)),
    "one sample": lambda: (Recurrent(nn.GRU), words()[:1]),
    "an image": lambda: (nn.Conv2d(1, 2, 3), torch.rand(4, 1, 5, 6)),
}


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
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in modules]
    grads = [(p.grad, p.requires_grad) for p in model.parameters()]
    parts = [sorted(vars(part)) for part in [*modules, *model.parameters()]]
    return hooks, grads, parts, [m.training for m in modules]


@pytest.fixture(scope="module")
def names(taught):
    return taught("trust/sequence_models")


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def compute(names):
    """Return a function that calls a function and checks what it leaves behind."""

    def run(function, model, X, *args):
        before, values = state(model), copy.deepcopy(model.state_dict())
        try:
            return names[function](model, X, *args)
        finally:
            assert state(model) == before
            assert_close(model.state_dict(), values, rtol=0, atol=0)
            assert not X.requires_grad
            assert torch.is_grad_enabled()

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_and_leaves_the_model(case, method, compute):
    model, X = CASES[case]()
    assert_close(compute(method, model, X), reference(model, X))


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_and_a_frozen_parameter(method, compute):
    model, X = Recurrent(nn.GRU).float(), words()
    model.embed.weight.requires_grad_(False)
    jacobian = compute(method, model, X)
    assert "embed.weight" not in jacobian
    assert_close(jacobian, reference(model, X))


def settings(examples):
    return hypothesis.settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )


sizes = st.integers(1, 5)


@settings(15)
@hypothesis.given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN, nn.Identity]),
    normalized=st.booleans(),
    N=sizes,
    T=sizes,
    D=sizes,
    H=sizes,
    C=sizes,
    seed=st.integers(0, 99),
)
def test_methods_agree_on_random_networks(
    compute, kind, normalized, N, T, D, H, C, seed
):
    torch.manual_seed(seed)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(D, H), nn.Linear(H, C)
            self.norm = nn.LayerNorm(H) if normalized else nn.Tanh()
            self.rnn = kind(H, H, batch_first=True)

        def forward(self, X):
            hidden = self.norm(self.first(X))
            hidden = self.rnn(hidden)
            return self.last(hidden[0] if isinstance(hidden, tuple) else hidden)

    model, X = Network(), torch.randn(N, T, D)
    expected = reference(model, X)
    for method in METHODS:
        assert_close(compute(method, model, X), expected)


@settings(10)
@hypothesis.given(N=sizes, T=sizes, D=sizes, H=sizes, seed=st.integers(0, 99))
def test_unrolled_lstm_is_an_lstm_that_vmap_takes(names, N, T, D, H, seed):
    torch.manual_seed(seed)
    lstm = nn.LSTM(D, H, batch_first=True)
    unrolled = names["UnrolledLSTM"](D, H, batch_first=True)
    unrolled.load_state_dict(lstm.state_dict())
    X, start = torch.randn(N, T, D), torch.randn(2, 1, N, H).unbind()
    assert_close(unrolled(X), lstm(X))
    assert_close(unrolled(X, start), lstm(X, start))

    class Outputs(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, X):
            return self.rnn(X)[0]

    jacobian = names["vmap_jacobian"](Outputs(unrolled), X)
    assert_close(jacobian, reference(Outputs(lstm), X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, "one layer"),
        ({"bidirectional": True}, "one direction"),
        ({"proj_size": 2}, "no projection"),
        ({"batch_first": False}, "needs batch_first=True"),
        ({"bias": False}, "bias=True"),
    ],
)
def test_unrolled_lstm_raises_for_what_it_cannot(options, message, names):
    with pytest.raises(ValueError, match=message):
        names["UnrolledLSTM"](4, 3, **{"batch_first": True} | options)


MIXED = {
    "softmax over the batch": lambda: nn.Softmax(dim=0),
    "attention over the batch": lambda: nn.TransformerEncoderLayer(4, 2, 3, 0),
    "dropout": lambda: nn.Dropout(),
    "batch norm": lambda: nn.BatchNorm1d(5),
}


@pytest.mark.parametrize("case", MIXED)
def test_sample_loop_raises_where_samples_mix(case, compute):
    model = nn.Sequential(nn.Embedding(9, 4), MIXED[case](), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="mixed or random"):
        compute("sample_loop_jacobian", model, words())


@pytest.mark.parametrize("method", METHODS[:2])
def test_training_mode_is_right_and_keeps_the_statistics(method, compute):
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(5), nn.Linear(4, 3))
    X = words()
    assert_close(compute(method, model, X), reference(model, X))


def test_vmap_raises_in_training_mode_and_keeps_the_statistics(compute):
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(5), nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="in-place operation"):
        compute("vmap_jacobian", model, words())


def test_sample_loop_takes_batch_norm_in_eval_mode(compute):
    model = nn.Sequential(nn.Embedding(9, 2), nn.BatchNorm1d(5), nn.Linear(2, 3))
    model(words())
    X = words()
    jacobian = compute("sample_loop_jacobian", model.eval(), X)
    assert_close(jacobian, reference(model, X))


@pytest.mark.parametrize("method", [*METHODS, "vmap_jacobian", "batchgrad_jacobian"])
@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), r"\[4\]"),
        (nn.Sequential(nn.Linear(3, 3), nn.Unflatten(0, (2, 2))), r"\[2, 2, 3\]"),
        (nn.LSTM(3, 2, batch_first=True), "tuple"),
    ],
    ids=["[N]", "another N", "tuple"],
)
def test_other_outputs_raise(model, got, method, compute):
    model = copy.deepcopy(model).double()
    with pytest.raises(
        ValueError, match=rf"must have shape \[N=4, ...\], but is {got}"
    ):
        compute(method, model, torch.rand(4, 3))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Recurrent(nn.RNN),
        lambda: nn.Sequential(nn.Embedding(9, 3), nn.Tanh(), nn.Linear(3, 2)),
    ],
)
def test_batchgrad_equals_the_reference(model, names):
    model, X = model(), words()
    extended = names["extend_leaves"](model)
    assert not any(module._backward_hooks for module in model.modules())
    jacobian = names["batchgrad_jacobian"](extended, X)
    assert_close(jacobian, reference(model, X))
    assert not any(hasattr(p, "grad_batch") for p in extended.parameters())


def test_batchgrad_takes_inputs_that_require_a_gradient(names):
    model, X = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        torch.rand(5, 4),
    )
    extended = names["extend_leaves"](model)
    jacobian = names["batchgrad_jacobian"](extended, X.requires_grad_())
    assert_close(jacobian, reference(model, X.detach()))


class Sums(nn.Module):
    """Output ``t`` is the sum of ``1 + s`` times embedding ``s`` up to ``t``."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 3)

    def forward(self, X):
        weights = torch.arange(1.0, 1 + X.shape[1])[:, None]
        return (weights * self.words(X)).cumsum(1)


def test_influence_of_tokens(compute):
    T = 5
    influence = compute("token_influence", Sums(), words(), "words")
    expected = torch.arange(1.0, T + 1).expand(T, T).tril() * 3**0.5
    assert_close(influence, expected)


def test_influence_of_tokens_raises_for_other_outputs(compute):
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten())
    message = r"model\(X\) has shape \[4, 15\], not \[4, 5, 'C'\]"
    with pytest.raises(ValueError, match=message):
        compute("token_influence", model, words(), "0")
    with pytest.raises(AttributeError, match="embed"):
        compute("token_influence", model, words())


def test_the_page_leaves_the_fast_path_on(names):
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failure_that_is_gone_or_changed_fails_the_page(names):
    with pytest.raises(AssertionError, match="'some text' is gone"):
        names["fails"]("some text", lambda: None)
    with pytest.raises(AssertionError, match="'some text' became RuntimeError"):
        names["fails"]("some text", torch.rand(2).reshape, 3)
