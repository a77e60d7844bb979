"""
Layer structure: a Jacobian from outer products
===============================================

After this page you know why the Jacobian of a linear layer is an outer product of two
small arrays, and you can write the Jacobian of a network of such layers in about the
time that it takes to fill its memory.
"""

# fold: Imports
import statistics
from contextlib import contextmanager
from itertools import pairwise, product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import timer

# %%
# Outer product
# -------------
# A linear layer maps its input ``a``, of shape ``[N, I]``, to ``a @ weight.T + bias``,
# of shape ``[N, O]``. Let ``delta``, of shape ``[N, C, O]``, be the derivative of the
# outputs ``fs[n, c]`` by what the layer returns for sample ``n``. By the chain rule the
# Jacobian of the bias is ``delta``, and that of the weight is
# ``J[n, c, o, i] = delta[n, c, o] * a[n, i]``.
#
# For the last layer of a network, ``delta`` is the identity and ``a`` is what the
# layers before it return.

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)

N, C = 15, 5
model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, C))
X = torch.rand(N, 10)

a, delta = model[:-1](X), torch.eye(C).expand(N, C, C)
block = torch.einsum("nco,ni->ncoi", delta, a)
print(f"delta {list(delta.shape)} and a {list(a.shape)} give J {list(block.shape)}.")

# %%
# The definition says the same: one backward pass for each sample and output.

# fold: The autograd loop, slow and exact


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


expected = autograd_loop(model, X)
assert_close(block, expected["2.weight"])
numbers = delta.numel() + a.numel()
print(f"The autograd loop agrees: {numbers} numbers hold {block.numel()}.")

# %%
# Delta of a hidden layer
# -----------------------
# Add a zero to what a layer returns: the derivative by this zero is ``delta``. A
# forward hook adds it, ``jacrev`` differentiates by it, and ``vmap`` does so for each
# sample.


@contextmanager
def hooked(layers, hook):
    handles = [layer.register_forward_hook(hook, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def from_zero(zero, x):  # of one sample
    with hooked([model[0]], lambda layer, args, output: output + zero):
        return model(x[None])[0]


delta = vmap(jacrev(from_zero), (None, 0))(torch.zeros(7), X)
block = torch.einsum("nco,ni->ncoi", delta, X)
assert_close(block, expected["0.weight"])
print(f"delta {list(delta.shape)} of the first layer is right, too.")

# %%
# All factors from one pass
# -------------------------
# The zeros see all of a parameter's effect only if its layer is the one place that
# reads it. So we run one sample first, and refuse what does not fit: every trainable
# parameter has its factors, or there is an error with its name.


def run(model, x):
    """Return ``model(x)``, with copies of all that a call may change."""
    tensors = *model.named_parameters(), *model.named_buffers()
    values = {name: t.detach().clone() for name, t in tensors}
    return functional_call(model, values, x.clone(), tie_weights=False)


def linear_calls(model, x):
    """Return ``[(layer, zeros like its output), ...]`` in the order of the calls."""
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    others = [m for m in model.modules() if type(m) is not nn.Linear]
    taken = {p for m in others for p in m.parameters(recurse=False)}
    calls = []

    def record(layer, args, output):
        calls.append((layer, torch.zeros_like(output)))

    with hooked(layers, record), torch.no_grad():
        run(model, x)
    for name, p in model.named_parameters():
        shapes = [zero.shape for m, zero in calls if p is m.weight or p is m.bias]
        if p.requires_grad and (p in taken or shapes != [(1, len(p))]):
            raise ValueError(f"{name} must belong to a Linear, called once on [N, I]")
    return calls


# %%
# Then one pass takes all zeros at once, and the hook notes each layer's input ``a``.


def outer_factors(model, X):
    """Return ``{name: (delta [N, C, O], a [N, I])}``; ``a`` is 1 for a bias.

    The names are those of the parameters that require a gradient. Raises ``ValueError``
    if one does not belong to an ``nn.Linear`` that is called once, on ``[N, I]``.
    """
    calls = linear_calls(model, X[:1])
    layers, zeros = [layer for layer, _ in calls], [zero for _, zero in calls]

    def f(zeros, x):  # of one sample
        zeros, inputs = iter(zeros), []

        def add(layer, args, output):
            inputs.append(args[0][0])
            return output + next(zeros)

        with hooked(set(layers), add):
            return run(model, x[None])[0], inputs

    deltas, inputs = vmap(jacrev(f, has_aux=True), (None, 0))(zeros, X.detach())
    names, factors = {p: name for name, p in model.named_parameters()}, {}
    for layer, delta, a in zip(layers, deltas, inputs):
        for p, column in (layer.weight, a), (layer.bias, torch.ones_like(a[:, :1])):
            if p is not None and p.requires_grad:
                factors[names[p]] = delta.flatten(2), column
    return factors


factors = outer_factors(model, X)
for name, (delta, a) in factors.items():
    block = torch.einsum("nco,ni->ncoi", delta, a)
    assert_close(block.view_as(expected[name]), expected[name])
    print(f"{name}: delta {list(delta.shape)}, a {list(a.shape)}, right")

# %%
# Blocks in memory of your own
# ----------------------------
# A product of a column ``[C * O, 1]`` and a row ``[1, I]`` writes each number once. It
# can go straight into memory that you have, such as the last batch's Jacobian.


def layer_structure(model, X, out=None):
    """Return ``{name: [N, C, *p.shape]}``, written into ``out`` if that is given."""
    J = {}
    for name, (delta, a) in outer_factors(model, X).items():
        shape = *delta.shape[:2], *model.get_parameter(name).shape
        J[name] = delta.new_empty(shape) if out is None else out[name]
        if J[name].shape != shape:
            raise ValueError(f"{name} needs {list(shape)}, not {list(J[name].shape)}")
        column, row = delta.flatten(1)[:, :, None], a[:, None]
        torch.mul(column, row, out=J[name].view(len(a), -1, a.shape[1]))
    return J


J = layer_structure(model, X)
assert_close(J, expected)
again = layer_structure(model, X + 1, out=J)
assert all(again[name] is J[name] for name in J)
assert_close(again, autograd_loop(model, X + 1))
print("Both batches are right, the second in the memory of the first.")

# %%
# Check by one random sum
# -----------------------
# Factors can be wrong without an error: a function may read the parameter outside its
# layer, or samples may mix. One backward pass finds out. For random weights ``u``, of
# shape ``[N, C]``, the sum of ``u * J`` is the gradient of ``(u * fs).sum()``. From
# factors, this sum is a product of two matrices, without J.


def check_factors(model, X, factors):
    """Raise ``AssertionError`` if a random sum of ``J`` differs from the gradient."""
    fs = model(X.clone())
    u = torch.randn_like(fs)
    params = [model.get_parameter(name) for name in factors]
    grads = autograd.grad(fs, params, u, materialize_grads=True)
    for (name, (delta, a)), grad in zip(factors.items(), grads):
        total = torch.einsum("nc,nco->on", u, delta) @ a
        if not torch.allclose(total.view_as(grad), grad):
            raise AssertionError(f"the factors of {name} are wrong")


check_factors(model, X, factors)
print("The factors pass.")

# %%
# Three models are refused, and two are found by the check alone.

# fold: The five models


class ReadAgain(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[0].bias


class Centered(nn.Sequential):
    def forward(self, x):
        return super().forward(x - x.mean(0))


square = nn.Linear(10, 10)
cases = {
    "called twice": nn.Sequential(square, nn.Tanh(), square),
    "another kind of layer": nn.Sequential(nn.LayerNorm(10), nn.Linear(10, C)),
    "sequences": nn.Sequential(nn.Unflatten(1, (2, 5)), nn.Linear(5, C), nn.Flatten()),
    "bias read again": ReadAgain(nn.Linear(10, C)),
    "samples that mix": Centered(nn.Linear(10, C)),
}
for case, net in cases.items():
    try:
        check_factors(net, X, outer_factors(net, X))
    except (AssertionError, ValueError) as error:
        print(f"{case}: {type(error).__name__}: {error}")
    else:
        raise RuntimeError(f"{case} raises no error any more")

# %%
# In single precision or for gradients of another size, a fixed tolerance does not do.
# ``batched_jacobian`` in ``scale/universal_jacobian.py`` measures the rounding instead,
# and takes another method where the factors are wrong.
#
# Speed of memory
# ---------------
# Nothing that returns J is faster than writing as many bytes. In single precision and
# with one thread, we time that, into new memory and into memory in use, and the ways to
# J. The methods take turns.

# fold: The models, vmap(jacrev) and the clock


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def interleaved_medians(calls, *args, repeats=3):
    """Return ``{name: seconds}``, medians over calls that take turns."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = timer()  # it waits for an accelerator
            call(*args)
            times[name].append(timer() - start)
    return {name: statistics.median(values) for name, values in times.items()}


CALLS = {
    "vmap(jacrev)": lambda model, X, J: vmap_jacrev(model, X),
    "layer_structure": lambda model, X, J: layer_structure(model, X),
    "write new memory": lambda model, X, J: [torch.ones_like(b) for b in J.values()],
    "layer_structure, out=": lambda model, X, J: layer_structure(model, X, out=J),
    "write the same memory": lambda model, X, J: [b.fill_(1) for b in J.values()],
}
torch.set_default_dtype(torch.float32)
models = {
    "MLP 64-128-128-10, N = 128": (mlp(64, 128, 128, 10), torch.rand(128, 64)),
    "MLP 784-256-256-10, N = 12": (mlp(784, 256, 256, 10), torch.rand(12, 784)),
}

# %%
# Most of the time of new memory goes to the system, which hands it out page by page.
# With ``out=`` there is none.

threads = torch.get_num_threads()
torch.set_num_threads(1)
results = {}
for name, (net, inputs) in models.items():
    J = layer_structure(net, inputs)
    assert_close(J, vmap_jacrev(net, inputs))
    results[name] = times = interleaved_medians(CALLS, net, inputs, J)
    size = sum(block.nbytes for block in J.values()) / 1e6
    print(f"{name}, J of {size:.0f} MB. Time, as a multiple of the last:")
    for call, seconds in times.items():
        ratio = seconds / times["write the same memory"]
        print(f"  {call}: {seconds * 1e3:.1f} ms, x {ratio:.1f}")
torch.set_num_threads(threads)

# %%
# The picture shows the times of the second model.

# fold: How the picture is drawn

fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
milliseconds = [1e3 * seconds for seconds in times.values()]
colors = "#E69F00", "#56B4E9", "0.7", "#0072B2", "0.4"
bars = ax.barh(list(times), milliseconds, color=colors)
ax.bar_label(bars, fmt="%.3g", padding=2)
ax.margins(x=0.15)
ax.invert_yaxis()
ax.set_xlabel(f"time in ms, {name}")
ratio = times["layer_structure, out="] / times["write the same memory"]
ax.set_title(f"With out=, J takes x {ratio:.1f} the time\nto write its bytes")
plt.show()

# %%
# What to take home
# -----------------
# - The Jacobian of a linear layer is an outer product: store the factors, or write the
#   product once, into memory in use.
# - A zero that is added to an output gives ``delta``, inside ``vmap(jacrev)``.
# - One random sum checks a Jacobian, at the price of a backward pass.
#
# Next: ``scale/universal_jacobian.py`` builds this into a function for any model. The
# alternative: ``scale/neural_tangent_kernel.py`` keeps the factors and never writes J.

# sphinx_gallery_parallel = False
