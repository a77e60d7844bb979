"""The cells of ``models_and_outputs.py`` on other data, and the errors they quote."""

import re
import runpy

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, jacrev, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

SEEDS = 1, 2
N, T = 7, 4  # not those of the page


@pytest.fixture(scope="module")
def names(taught):
    return taught("compute/models_and_outputs")


@pytest.fixture(autouse=True)
def reproducible():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def cell(names, monkeypatch):
    """Return a function of the page, for other models than those that it has there."""

    def take(name, **models):
        for key, model in models.items():
            monkeypatch.setitem(names[name].__globals__, key, model)
        return names[name]

    return take


def reference(model, inputs, out=lambda fs: fs, **options):
    """Return the Jacobian of the whole batch from ``autograd.functional``."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def f(*values):
        values = dict(zip(params, values))
        return out(functional_call(model, values, inputs, **options))

    return dict(zip(params, jacobian(f, tuple(params.values()))))


def rows(f, model, *inputs, **options):
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    in_dims = (None,) + (0,) * len(inputs)
    return vmap(jacrev(f), in_dims, **options)(params, *inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_heads(seed, names, cell):
    torch.manual_seed(seed)
    heads, X = names["Heads"](), torch.rand(N, 5)
    J = rows(cell("by_head", heads=heads), heads, X)
    for head in "mean", "boxes":
        expected = reference(heads, (X,), lambda fs, head=head: fs[head])
        assert_close(J[head], expected)
    assert set(J) == {"mean", "boxes"}


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_labels(seed, names, cell):
    torch.manual_seed(seed)
    layers = nn.Embedding(9, 3), names["PlainAttention"](), nn.Linear(3, 9)
    tagger, words, labels = nn.Sequential(*layers), *torch.randint(9, (2, N, T))
    J = rows(cell("label_logits", tagger=tagger), tagger, words, labels)
    picked = nn.functional.one_hot(labels, 9).double()
    expected = reference(tagger, (words,), lambda fs: (fs * picked).sum(-1))
    assert_close(J, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_of_positions(seed, names, cell):
    """A copy of the weight for each position, in plain matrix products."""
    torch.manual_seed(seed)
    length = names["T"]
    layer, head = nn.Linear(3, 4, bias=False), nn.Linear(4, 9)
    tagger = nn.Sequential(nn.Embedding(9, 3), layer, names["PlainAttention"](), head)
    words, labels = torch.randint(9, (2, N, length))
    f = cell("with_copies", tagger=tagger, layer=layer)
    copies = layer.weight.detach().expand(length, -1, -1)
    shares = vmap(jacrev(f), (None, 0, 0))({"weight": copies}, words, labels)["weight"]

    def outputs(copies):
        h = torch.einsum("soi,nsi->nso", copies, tagger[0](words))
        return tagger[2:](h).gather(2, labels[..., None])[..., 0]

    assert_close(shares, jacobian(outputs, copies))


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels(seed, names, cell):
    torch.manual_seed(seed)
    segment, X = nn.Conv2d(2, 3, 2), torch.rand(N, 2, 10, 8)
    J = rows(cell("pixels", segment=segment), segment, X)
    picked = [names["rows"], names["columns"]]
    expected = reference(segment, (X,), lambda fs: fs[:, :, picked[0], picked[1]])
    assert_close(J, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_masks(seed, names, cell):
    torch.manual_seed(seed)
    encoder = names["MaskedEncoder"]().eval()
    tokens, padding = torch.rand(N, T, 8), torch.rand(N, T) > 0.6
    padding[:, 0] = False
    t, label = torch.randint(T, (N,)), torch.randint(11, (N,))
    encoded, one_logit = (cell(f, encoder=encoder) for f in ("encoded", "one_logit"))
    with sdpa_kernel(SDPBackend.MATH):
        J = rows(encoded, encoder, tokens, padding)
        J_one = rows(one_logit, encoder, tokens, padding, t, label)
    assert_close(J, reference(encoder, (tokens, padding)))
    assert_close(J_one, {k: block[range(N), t, label] for k, block in J.items()})
    trimmed, plain = names["Trimmed"](8, 5), names["Pooled"](8, 5)
    plain.load_state_dict(trimmed.state_dict())
    expected = reference(trimmed, (tokens, padding))
    assert_close(reference(plain, (tokens, padding)), expected)
    f = cell("pooled", trimmed=plain)
    assert_close(rows(f, plain, tokens, padding), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_forces(seed, names, cell):
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)
    energy, X = nn.Sequential(*layers), torch.rand(N, 2, 3)
    J = rows(cell("force", energy=energy), energy, X)

    def by_hand(hidden, bias, out, _):  # W2 (1 - tanh^2) W1
        slope = 1 - torch.tanh(X.flatten(1) @ hidden.T + bias) ** 2
        return -((slope * out) @ hidden).view(X.shape)

    blocks = jacobian(by_hand, tuple(energy.parameters()))
    assert_close(J, dict(zip(dict(energy.named_parameters()), blocks)))
    assert_close(names["Forces"](*layers)(X), by_hand(*energy.parameters()))


@pytest.mark.parametrize("seed", SEEDS)
def test_adapters(seed, names):
    torch.manual_seed(seed)
    adapted, X = names["Adapted"](nn.Linear(5, 3), 2), torch.rand(N, 5)
    J = names["vmap_jacrev"](adapted.eval(), X)
    assert list(J) == ["down.weight", "up.weight"]
    assert_close(J, reference(adapted, (X,)))


@pytest.mark.parametrize("seed", SEEDS)
def test_tied_weights_and_two_names(seed, names, cell):
    torch.manual_seed(seed)
    model, words = names["TiedWords"](), torch.randint(names["C"], (N, T))
    J = names["vmap_jacrev"](model, words)
    weight, temperature = model.embed.weight, model.temperature

    def outputs(weight, temperature):
        return weight[words].mean(1).tanh() @ weight.T / temperature

    by_weight, by_temperature = jacobian(outputs, (weight, temperature))
    assert_close(J, {"temperature": by_temperature, "embed.weight": by_weight})

    shared, X = nn.Linear(4, 4), torch.rand(N, 4)
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    kept = shared.weight
    J = rows(cell("twice_outputs", twice=twice), twice, X)
    assert shared.weight is kept
    blocks = jacobian(lambda W, b: (X @ W.T + b).tanh() @ W.T + b, (kept, shared.bias))
    assert_close(J, dict(zip(("0.weight", "0.bias"), blocks)))


def test_without_ties_the_second_place_keeps_its_weight(names):
    model, words = names["TiedWords"](), torch.randint(names["C"], (N, T))

    def f(params, tie_weights):
        return functional_call(model, params, words, tie_weights=tie_weights)

    params = {k: p.detach() for k, p in model.named_parameters()}
    right, wrong = (jacrev(f)(params, tie)["embed.weight"] for tie in (True, False))
    assert not torch.allclose(right, wrong)


def test_plain_recipe_leaves_other_tensors_under_two_names(names):
    """If this fails, PyTorch has mended it: correct the page."""
    shared = nn.Linear(4, 4)
    twice, kept = nn.Sequential(shared, shared), shared.weight
    names["vmap_jacrev"](twice, torch.rand(N, 4))
    assert shared.weight is not kept


@pytest.mark.parametrize("seed", SEEDS)
def test_modules_that_write(seed, names, cell):
    torch.manual_seed(seed)
    act_norm, watched = names["ActNorm"](5, 3), names["Watched"](5, 3)
    X, plain = torch.rand(N, 5), nn.Linear(5, 3)
    expected = reference(plain, (X,))
    act_norm(X)
    assert_close(act_norm(X).mean(0), torch.zeros(3))
    assert_close(names["vmap_jacrev"](act_norm, X), expected)
    watched.register_buffer("largest", torch.tensor(0.0))
    buffers = {"largest": watched.largest.expand(N)}
    f = cell("with_buffers", watched=watched)
    params = {k: p.detach() for k, p in watched.named_parameters()}
    assert_close(vmap(jacrev(f), (None, 0, 0))(params, buffers, X), expected)
    assert watched.largest == 0
    watched(X)
    assert watched.largest == X.max()


@pytest.mark.parametrize("seed", SEEDS)
def test_complex_parameters(seed, names):
    torch.manual_seed(seed)
    weight, X = torch.randn(4, 3, dtype=torch.cdouble), torch.rand(N, 4)
    J = vmap(jacrev(names["in_real_numbers"]), (None, 0))(torch.view_as_real(weight), X)
    z = torch.exp(X.to(weight) @ weight)
    derivative = torch.einsum("nc,ni,ck->ncik", z, X.to(z), torch.eye(3).to(z))
    for part, times in enumerate((1, 1j)):
        expected = torch.view_as_real(derivative * times).movedim(-1, 2)
        assert_close(J[..., part], expected)


def test_several_models(names, cell):
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(5)]
    for model in models:
        model(torch.randn(9, 4))
        model.eval()
    X = torch.rand(N, 4)
    stacked, buffers = stack_module_state(models)
    stacked = {name: p.detach() for name, p in stacked.items()}
    f = vmap(jacrev(cell("of_one_model", models=models)), (None, None, 0))
    J = vmap(f, (0, 0, None))(stacked, buffers, X)
    for m, model in enumerate(models):
        assert_close({k: J[k][m] for k in stacked}, reference(model, (X,)))


def test_loop_and_check_can_fail(names, capsys):
    model, X = nn.Linear(5, names["C"]), torch.rand(names["N"], 5)
    fs, J = model(X), reference(model, (X,))
    assert_close(names["loop"](fs, dict(model.named_parameters())), J)
    names["check"]("vector", J, fs, model)
    size = sum(block.numel() for block in J.values()) * 8 / 1e3
    assert f"{fs.numel()} rows in {size:.1f} kB" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="not close"):
        names["check"]("vector", J | {"weight": 1.001 * J["weight"]}, fs, model)
    with pytest.raises(AssertionError):
        names["check"]("tokens", J, fs, model)
    with pytest.raises(LookupError, match="no RuntimeError any more"):
        names["show_error"](RuntimeError, torch.rand, 3)


ERRORS = [
    "appears to not have been used in the graph. Set allow_unused=True",
    "KeyError: 0",
    "vmap: It looks like you're either (1) calling .item() on a Tensor or (2)",
    "got an unexpected keyword argument 'padding'",
    "vmap: It looks like you're attempting to use a Tensor in some data-",
    "vmap: It looks like you're calling .item() on a Tensor.",
    "Attempting to batch over indexing with a boolean mask.",
    "You are attempting to call Tensor.requires_grad_() (or perhaps",
    "vmap: called random operation while in randomness error mode.",
    "functional_call got multiple values for keys ['embed.weight', 'out.",
    "mutating directly with `.data` inside functorch transform is not allowed.",
    "(aten::copy_) that would mutate a captured Tensor.",
    "jacrev: Expected all inputs to be real but received complex tensor at",
    "jacrev: Expected all outputs to be real but received complex tensor at",
]


def test_errors_that_people_search_for(names, capsys):
    """The page prints its errors in this order."""
    capsys.readouterr()
    runpy.run_path(names.script)
    printed = re.findall(r"^\w+Error: .*$", capsys.readouterr().out, re.MULTILINE)
    for text, line in zip(ERRORS, printed, strict=True):
        assert text in line
