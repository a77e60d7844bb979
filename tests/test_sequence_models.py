"""The functions of ``sequence_models.py``, on models that its page does not show."""

import copy
import warnings

import hypothesis
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import SqrtGGNExact
from conftest import parse
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

# What the page prints, and what people search for.
ERRORS = {
    "training mode": "mixed or random",
    "training, vmap": "vmap: called random operation while in randomness error mode",
    "LSTM, forward": "Batching rule not implemented for aten::lstm.input",
    "GRU, forward": "Batching rule not implemented for aten::gru.input",
    "LSTM, torch.float32": "agrees",
    "LSTM, torch.float64": "doesn't match the broadcast shape",
    "GRU, torch.float32": "doesn't match the broadcast shape",
    "RNN, torch.float32": "doesn't match the broadcast shape",
    "fast path": "Batching rule not implemented for aten::_nested_tensor_from_mask",
    "no fast path": "There is a performance drop because we have not yet implemented",
    "BatchGrad, two layers": "only num_layers = 1 is supported",
    "BatchGrad, two directions": "only bidirectional = False is supported",
    "BatchGrad, time first": "Batch axis must be first.",
    "BatchGrad, padding_idx": "Only padding_idx=None supported.",
    "BatchGrad, GRU": "Extension saving to grad_batch does not have an extension for",
    "BatchGrad, final state": "'Parameter' object has no attribute 'grad_batch'",
    "SqrtGGNExact": "Extension saving to sqrt_ggn_exact does not have an extension",
    "LayerNorm, batch_grad": "Extension saving to grad_batch does not have an",
    "LayerNorm, sqrt_ggn": "Extension saving to sqrt_ggn_exact does not have an",
}


class Words(nn.Module):
    """A recurrent layer over tokens, and one linear layer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn = kind(4, 3, batch_first=True, **options)
        self.out = nn.Linear(3 * (1 + self.rnn.bidirectional), 2)

    def forward(self, words):
        return self.out(self.rnn(self.embed(words))[0])


class Attend(nn.Module):
    """Attention with a query of its own, which keeps its outputs."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.rand(1, 2, 6))
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, X):
        query = self.query.expand(len(X), -1, -1)
        self.kept = self.attention(query, X, X, need_weights=False)[0]
        return self.kept


class InPlace(nn.Linear):
    def forward(self, X):
        return super().forward(X.mul_(0.5))


def words():
    return torch.randint(9, (4, 5))


CASES = {
    "GRU": lambda: (Words(nn.GRU, num_layers=2, bidirectional=True), words()),
    "RNN": lambda: (Words(nn.RNN, nonlinearity="relu"), words()),
    "LSTM": lambda: (Words(nn.LSTM), words()),
    "frozen": lambda: (Words(nn.GRU).requires_grad_(False), words()),
    "attention": lambda: (Attend(), torch.rand(4, 5, 6)),
    "one number per token": lambda: (nn.Embedding(9, 1), words()),
    "one output": lambda: (nn.Linear(3, 1), torch.rand(4, 3)),
    "one sample": lambda: (Words(nn.GRU), words()[:1]),
    "an image": lambda: (nn.Conv2d(1, 2, 3), torch.rand(4, 1, 5, 6)),
    "in place": lambda: (InPlace(3, 2), torch.rand(4, 3)),
}


def reference(model, X):
    """Return the Jacobian from ``autograd.functional``, on a copy of the model."""
    model = copy.deepcopy(model)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    blocks = torch.autograd.functional.jacobian(
        lambda *values: functional_call(model, dict(zip(params, values)), X.clone()),
        tuple(params.values()),
    )
    return dict(zip(params, blocks))


def state(model, X):
    """Return all that a function could leave behind."""
    flags = [X.requires_grad]
    for module in model.modules():
        hooks = [len(v) for key, v in vars(module).items() if "hooks" in key]
        flags += [module.training, *hooks]
    flags += [(p.grad, p.requires_grad) for p in model.parameters()]
    return [t.detach().clone() for t in (X, *model.state_dict().values())], flags


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


def test_batched_pass_follows_the_device(names):
    layer, X = nn.Linear(3, 2, device="meta"), torch.rand(4, 3, device="meta")
    J = names["grads_batched"](layer, X)
    assert [(block.device.type, block.shape) for block in J.values()] == [
        ("meta", (4, 2, 2, 3)),
        ("meta", (4, 2, 2)),
    ]


@pytest.fixture
def compute(names):
    """Return a function that calls a function and checks what it leaves behind."""

    def run(function, model, X, *args):
        before = state(model, X)
        try:
            return names[function](model, X, *args)
        finally:
            assert_close(state(model, X), before, rtol=0, atol=0)

    return run


@pytest.mark.parametrize("case", CASES)
def test_sample_loop_equals_the_reference(case, compute):
    model, X = CASES[case]()
    if case == "frozen":
        model.out.requires_grad_()
    expected = reference(model, X)
    assert_close(compute("sample_loop_jacobian", model, X), expected)
    assert_close(compute("sample_loop_jacobian", model, X), expected)  # has run


def test_single_precision(compute):
    model, X = Words(nn.GRU).float(), words()
    J = compute("sample_loop_jacobian", model, X)
    assert_close(J, reference(model, X))
    assert {block.dtype for block in J.values()} == {torch.float32}


MIXED = {
    "softmax over the batch": lambda: nn.Softmax(dim=0),
    "attention over the batch": lambda: nn.TransformerEncoderLayer(4, 2, 3, 0),
    "dropout": lambda: nn.Dropout(),
}


@pytest.mark.parametrize("case", MIXED)
def test_sample_loop_raises_where_samples_mix(case, compute):
    model = nn.Sequential(nn.Embedding(9, 4), MIXED[case](), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="mixed or random"):
        compute("sample_loop_jacobian", model, words())


def test_sample_loop_raises_where_gradients_mix(compute):
    model = nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        compute("sample_loop_jacobian", model, words())


def test_sample_loop_raises_where_gradients_are_sparse(compute):
    model, X = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)), words()
    with pytest.raises(ValueError, match="set its sparse to False"):
        compute("sample_loop_jacobian", model, X)
    model[0].sparse = False
    model[1].sparse = nn.Identity()  # another meaning
    assert_close(compute("sample_loop_jacobian", model, X), reference(model, X))


def test_sample_loop_keeps_what_is_not_finite_to_its_sample(names):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    X = torch.rand(4, 3)
    expected = reference(model, X)
    X[2, 1] = torch.nan
    others = [0, 1, 3]
    J = names["sample_loop_jacobian"](model, X)
    assert J["0.weight"][2].isnan().any()
    assert_close(
        {k: b[others] for k, b in J.items()},
        {k: b[others] for k, b in expected.items()},
    )


def test_sample_loop_takes_batch_norm_in_eval_mode(compute, names):
    model = nn.Sequential(nn.Embedding(9, 2), nn.BatchNorm1d(5), nn.Linear(2, 3))
    X = words()
    with pytest.raises(ValueError, match="mixed or random"):
        names["sample_loop_jacobian"](model, X)
    assert_close(compute("sample_loop_jacobian", model.eval(), X), reference(model, X))


def settings(examples):
    return hypothesis.settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )


sizes = st.integers(1, 5)


class Outputs(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, X):
        return self.rnn(X)[0]


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
    expected = reference(Outputs(lstm), X)
    assert_close(names["vmap_jacrev"](Outputs(unrolled), X), expected)
    assert_close(names["sample_loop_jacobian"](Outputs(lstm), X), expected)


@pytest.mark.parametrize(("N", "T", "D", "H"), [(4, 3, 2, 5), (1, 1, 3, 2)])
def test_unrolled_gru_is_a_gru_that_vmap_takes(names, N, T, D, H):
    torch.manual_seed(1)
    gru = nn.GRU(D, H, batch_first=True)
    unrolled = names["UnrolledGRU"](D, H, batch_first=True)
    unrolled.load_state_dict(gru.state_dict())
    X, start = torch.randn(N, T, D), torch.randn(1, N, H)
    assert_close(unrolled(X), gru(X))
    assert_close(unrolled(X, start), gru(X, start))
    expected = reference(Outputs(gru), X)
    assert_close(names["vmap_jacrev"](Outputs(unrolled), X), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, "one layer"),
        ({"bidirectional": True}, "one direction"),
        ({"batch_first": False}, "needs batch_first=True"),
        ({"bias": False}, "bias=True"),
    ],
)
def test_unrolled_gru_raises_for_what_it_cannot(options, message, names):
    with pytest.raises(ValueError, match=message):
        names["UnrolledGRU"](4, 3, **{"batch_first": True} | options)


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


@pytest.mark.parametrize(
    "model",
    [
        lambda: Words(nn.RNN),
        lambda: Words(nn.LSTM),
        lambda: nn.Sequential(nn.Embedding(9, 3), nn.Tanh(), nn.Linear(3, 2)),
    ],
)
def test_extended_leaves_equal_the_reference(model, names):
    flat, X = nn.Sequential(model(), nn.Flatten()), words()
    extended = names["extend_leaves"](flat)
    assert not any(module._backward_hooks for module in flat.modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        assert_close(names["batch_grad"](extended, X), reference(flat, X))


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


def test_page_prints_the_errors_that_people_search_for():
    page = parse("auto_examples/trust/sequence_models.html")
    lines = "\n".join(b.text for b in page.select(".sphx-glr-script-out pre"))
    printed = dict(line.split(": ", 1) for line in lines.splitlines() if ": " in line)
    for text, part in ERRORS.items():
        assert part in printed[text], printed[text]


def test_loss_takes_one_axis_of_outputs():
    fs = extend(nn.Linear(4, 3))(torch.rand(6, 5, 4, requires_grad=True))
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with pytest.raises(ValueError, match="Only 2D inputs are currently supported"):
        with backpack(SqrtGGNExact()):
            loss.backward()


def test_error_that_is_gone_fails_the_page(names, capsys):
    names["print_error"]("a view", torch.rand(2).reshape, 3)
    assert capsys.readouterr().out.startswith("a view: RuntimeError: shape '[3]'")
    with pytest.raises(AssertionError, match="some text: no error any more"):
        names["print_error"]("some text", lambda: None)
