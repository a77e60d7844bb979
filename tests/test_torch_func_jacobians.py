"""``jacobians`` of ``torch_func_jacobians.py``, on models that its page lacks."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close


class Bag(nn.Module):
    """Integer inputs, a tied weight, a parameter of its own, and a reused layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(9))

    def forward(self, words):
        hidden = self.embed(words).mean(1)
        return self.out(torch.tanh(self.middle(self.middle(hidden)))) * self.scale


class Twice(nn.Module):
    def forward(self, X):
        return X, X


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
        nn.GroupNorm(3, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Solve(nn.Linear):
    """A function whose derivative is wrong inside ``torch.no_grad`` and ``vmap``."""

    def forward(self, X):
        matrices = 5 * torch.eye(3) + self.weight + X[:, :, None] * X[:, None]
        return torch.linalg.solve(matrices, X) + self.bias


class Keeps(nn.Module):
    """Keeps its activations, counts its calls, and assigns a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.kept, self.seen, self.calls = None, [], {"number": 0}
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, X):
        self.kept = self.layer(X)
        self.seen.append(self.kept)
        self.calls["number"] += 1
        self.steps = self.steps + 1
        self.new = X
        return self.kept


def spectral():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


CASES = {
    "bag": lambda: (Bag(), torch.randint(9, (5, 3))),
    "cnn": lambda: (cnn(), torch.rand(5, 2, 6, 7)),
    "solve": lambda: (Solve(3, 3), torch.rand(5, 3)),
    "keeps": lambda: (Keeps(), torch.rand(5, 3)),
    "spectral norm": lambda: (spectral().eval(), torch.rand(5, 3)),
    "one sample": lambda: (nn.Linear(3, 2), torch.rand(1, 3)),
    "one output": lambda: (nn.Linear(3, 1), torch.rand(4, 3)),
}


@pytest.fixture(scope="module")
def names(taught):
    return taught("compute/torch_func_jacobians")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_and_leaves_the_model(case, grad, names):
    torch.manual_seed(0)
    model, X = CASES[case]()
    model.double()
    X = X.double() if X.is_floating_point() else X
    before = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        jacobian = names["jacobians"](model, X)
        assert torch.is_grad_enabled() == grad
    assert not any(block.requires_grad for block in jacobian.values())
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(jacobian, names["autograd_loop"](model, X))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_attributes_stay_the_same_objects(names):
    model = Keeps().double()
    X = torch.rand(5, 3, dtype=torch.float64)
    fs = model(X)
    names["jacobians"](model, X)
    assert model.kept is fs and model.seen == [fs] and model.new is X
    assert model.calls == {"number": 1}
    assert_close(model.steps, torch.ones(3, dtype=torch.float64))
    assert (model.kept + 1).sum().backward() is None  # it is alive


def test_model_is_put_back_after_an_error(names):
    model = nn.Sequential(Keeps(), nn.Unflatten(1, (2, 1))).double()
    X = torch.rand(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is \[1, 2, 1\]"):
        names["jacobians"](model, X)
    assert model[0].kept is None and not hasattr(model[0], "new")
    assert model[0].steps.count_nonzero() == 0


def test_buffers_moved_in_training_mode_are_put_back(names):
    model, X = spectral().double(), torch.rand(5, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    names["jacobians"](model, X)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    _ = model(X)  # the comparison can fail
    with pytest.raises(AssertionError):
        assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_batch_norm_in_training_mode_raises(names):
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(24, 3)
    model, X = nn.Sequential(*layers), torch.rand(5, 1, 5, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="in-place operation"):
        names["jacobians"](model, X)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_hooks_of_modules_are_left_out_and_stay(names):
    plain, X = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(5, 3)
    model = copy.deepcopy(plain)
    hook = model[1].register_full_backward_hook(lambda layer, grads, _: (2 * grads[0],))
    expected = names["autograd_loop"](plain, X)
    assert_close(names["jacobians"](model, X), expected)
    with pytest.raises(AssertionError):
        assert_close(names["autograd_loop"](model, X), expected)
    hook.remove()
    assert_close(names["autograd_loop"](model, X), expected)


def test_sparse_embeddings_stay_sparse(names):
    words = nn.Embedding(9, 4)
    model, X = (
        nn.Sequential(words, nn.Flatten(), nn.Linear(8, 3)),
        torch.randint(9, (5, 2)),
    )
    expected = names["autograd_loop"](model, X)
    words.sparse = True
    assert_close(names["jacobians"](model, X), expected)
    assert words.sparse


def test_inference_mode(names):
    model, X = nn.Linear(3, 2), torch.rand(4, 3)
    expected = names["autograd_loop"](model, X)
    with torch.inference_mode():
        assert_close(names["jacobians"](model, X + 0), expected)


def test_section_fails_if_its_error_stays_away(names, capsys):
    names["show_error"](ValueError, int, "x")
    assert capsys.readouterr().out.startswith("ValueError: invalid literal")
    with pytest.raises(LookupError, match="no ValueError any more"):
        names["show_error"](ValueError, int, "1")
    with pytest.raises(TypeError):
        names["show_error"](ValueError, int, [])


def test_frozen_model_raises(names):
    with pytest.raises(ValueError, match="no parameter of the model requires a grad"):
        names["jacobians"](nn.Linear(3, 2).requires_grad_(False), torch.rand(4, 3))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Unflatten(1, (3, 1)), r"\[1, 3, 1\]"),
        (nn.Flatten(0), r"\[3\]"),
        (Twice(), "tuple"),
    ],
)
def test_other_outputs_raise(model, got, names):
    model = nn.Sequential(nn.Linear(3, 3), model).double()
    with pytest.raises(ValueError, match=rf"must be \[1, C\], but is {got}"):
        names["jacobians"](model, torch.rand(4, 3, dtype=torch.float64))
    assert torch.is_grad_enabled()
