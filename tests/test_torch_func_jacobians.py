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


CASES = {
    "bag": lambda: (Bag(), torch.randint(9, (5, 3))),
    "cnn": lambda: (cnn(), torch.rand(5, 2, 6, 7)),
    "solve": lambda: (Solve(3, 3), torch.rand(5, 3)),
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
    assert_close(jacobian, names["loop"](model, X))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


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
