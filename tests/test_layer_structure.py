"""``layer_structure.py``, on models that its page lacks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close


@pytest.fixture(autouse=True)
def settings():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def page(taught):
    return taught("scale/layer_structure")


def in_place():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6), nn.Linear(6, 3))


def without_bias():
    return nn.Sequential(nn.Linear(4, 1, bias=False), nn.Tanh(), nn.Linear(1, 3))


def partly_frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    return model


def with_statistics():
    norm = nn.BatchNorm1d(6, affine=False)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)).eval()


def with_a_hook():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    return model


RIGHT = [in_place, without_bias, partly_frozen, with_statistics, with_a_hook]


@pytest.mark.parametrize("make", RIGHT)
def test_right_and_unchanged(make, page):
    model, X = make(), torch.randn(7, 4)
    expected = page["autograd_loop"](model, X.clone())
    tensors = {"X": X} | dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: t.detach().clone() for name, t in tensors.items()}
    J = page["layer_structure"](model, X)
    assert_close(J, expected)
    for block in J.values():
        block.fill_(torch.nan)
    assert_close(page["layer_structure"](model, X, out=J), expected)
    page["check_factors"](model, X, page["outer_factors"](model, X))
    now = {"X": X} | dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(now[name] is tensors[name] for name in tensors)
    assert_close({k: t.detach() for k, t in now.items()}, before, rtol=0, atol=0)


class Unused(nn.Linear):
    def forward(self, X):
        return X[:, :3]


class Functional(nn.Linear):
    def forward(self, X):
        return F.linear(X, self.weight, self.bias)


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer), "0.weight"


def sharing_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model, "0.weight"


def tied_to_words():
    model = nn.Linear(4, 3)
    model.words = nn.Embedding(3, 4)
    model.words.weight = model.weight
    return model, "weight"


def pruned():
    model = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model, "0.weight_orig"


def weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    return model, "0.parametrizations.weight"


REFUSED = {
    "shared": shared,
    "sharing a weight": sharing_a_weight,
    "tied to words": tied_to_words,
    "pruned": pruned,
    "weight_norm": weight_norm,
    "a class of its own": lambda: (Functional(4, 3), "weight"),
    "unused": lambda: (nn.ModuleDict({"a": Unused(4, 3)})["a"], "weight"),
    "convolution": lambda: (
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten()),
        "1.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_block_is_left_unwritten(case, page):
    model, name = REFUSED[case]()
    if case in ("pruned", "weight_norm"):
        name = f"(0.bias|{name})"
    params = list(model.parameters())
    with pytest.raises(ValueError, match=rf"{name}.* must belong to a Linear"):
        page["layer_structure"](model, torch.rand(7, 4))
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))


def test_bad_memory_raises(page):
    model, X = nn.Linear(4, 3), torch.rand(7, 4)
    J = page["layer_structure"](model, X)
    with pytest.raises(ValueError, match=r"weight needs \[6, 3, 3, 4\], not \[7, 3"):
        page["layer_structure"](model, X[1:], out=J)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("factor", [0, 1])
def test_the_check_finds_swapped_samples(name, factor, page):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    X = torch.randn(7, 4)
    factors = page["outer_factors"](model, X)
    pair = list(factors[name])
    pair[factor] = pair[factor].roll(1, 0) * (1 + 1e-4)
    factors[name] = tuple(pair)
    with pytest.raises(AssertionError, match=f"the factors of {name} are wrong"):
        page["check_factors"](model, X, factors)
