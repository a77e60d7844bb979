"""Compiled Jacobians, on other models."""

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import EXAMPLES
from torch import nn
from torch.testing import assert_close

N, C = 5, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

# The newest release compiles what this one refuses.
text = r"Cannot call sizes\(\) on tensor with symbolic sizes/strides"
NO_DYNAMIC_CONVOLUTION = (
    pytest.raises(RuntimeError, match=text)
    if torch.__version__ < "2.14"
    else contextlib.nullcontext()
)


@pytest.fixture(scope="module")
def page(taught):
    return taught("scale/compiled_jacobians")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    torch.compiler.reset()
    yield
    torch.set_default_dtype(before)
    torch.compiler.reset()


def recipe(model):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params, x):
        return torch.func.functional_call(model, params, x[None])[0]

    return torch.func.vmap(torch.func.jacrev(f), (None, 0)), params


MODELS = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, C)),
        (4,),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, C)
        ),
        (2, 5, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_jacobian_is_that_of_the_loop(name, page):
    make, shape = MODELS[name]
    model, X = make(), torch.rand(N, *shape)
    jacobian, params = recipe(model)
    compiled = torch.compile(jacobian, backend="aot_eager", dynamic=False)
    with warnings.catch_warnings(action="ignore"):
        J = compiled(params, X)
    assert_close(J, page["autograd_loop"](model, X))
    # Values are inputs: nothing of the model is compiled into the result.
    for p in model.parameters():
        p.data.mul_(1.5)
    J = compiled({k: p.detach() for k, p in model.named_parameters()}, X + 1)
    assert_close(J, page["autograd_loop"](model, X + 1))


def compile_again(model, X, **options):
    jacobian, params = recipe(model)
    return torch.compile(jacobian, backend="aot_eager", **options)(params, X)


def test_new_sizes_of_linear_layers_compile_twice():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    compile_again(model, torch.rand(5, 4))
    compile_again(model, torch.rand(7, 4))
    with torch.compiler.set_stance("fail_on_recompile"):
        compile_again(model, torch.rand(9, 4))


def test_second_model_with_convolutions(page):
    X = torch.rand(N, 2, 6)
    nets = [nn.Sequential(nn.Conv1d(2, w, 2), nn.Flatten()) for w in (3, 4)]
    compile_again(nets[0], X)
    with NO_DYNAMIC_CONVOLUTION:
        compile_again(nets[1], X)
    J = compile_again(nets[1], X, dynamic=False)
    assert_close(J, page["autograd_loop"](nets[1], X))


def test_error_of_a_compiled_convolution_with_a_dynamic_size():
    jacobian, params = recipe(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten()))
    compiled = torch.compile(jacobian, backend="aot_eager", dynamic=True)
    with NO_DYNAMIC_CONVOLUTION:
        compiled(params, torch.rand(N, 2, 6))


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="said of 2.13 only")
def test_error_of_a_compiled_convolution_with_a_mark():
    jacobian, params = recipe(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten()))
    X = torch.rand(N, 2, 6)
    torch._dynamo.mark_dynamic(X, 0)
    with pytest.raises(Exception, match="Constraints violated"):
        torch.compile(jacobian, backend="aot_eager")(params, X)


def test_no_compiler_is_no_crash(tmp_path):
    """Without a C++ compiler, the page traces, and says so."""
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    script = EXAMPLES / "scale/compiled_jacobians.py"
    command = [sys.executable, "-W", "error", script]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.startswith("aot_eager: the first call takes ")


def test_message_raises_if_nothing_is_raised(page):
    with pytest.raises(AssertionError, match="raises no error any more"):
        page["message"](len, "")
    assert page["message"](int, "x").startswith("ValueError: invalid literal")
