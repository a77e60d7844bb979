"""
Silent failures
===============

After this page you know where methods for Jacobians return wrong numbers without an
error, why they do, and what to do instead. Each failure is a small model that you can
run, and the page stops building when a release mends one.
"""

# fold: Imports
import copy
import warnings
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.custom_module.branching import SumModule
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.func import replace_all_batch_norm_modules_ as patch_batch_norm
from torch.nn import functional as F
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# A wrong Jacobian in two lines
# -----------------------------
# The function below ignores its arguments and reads the parameters of the module, so
# its derivative is zero. Nothing is raised.

N, D, H, C = 7, 3, 4, 2  # samples, inputs, hidden values, outputs
model, X = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)), torch.rand(N, D)
params = tuple(model.parameters())
zeros = autograd.functional.jacobian(lambda *_: model(X), params)
gradients = autograd.grad(model(X).sum(), params)
for J, gradient in zip(zeros, gradients):
    assert not J.any() and gradient.any()
    print(f"Jacobian {list(J.shape)}: all zero. Gradient {list(gradient.shape)}: not.")

# %%
# How the failures are recorded
# -----------------------------
# ``record_failure`` takes a kind and a name, a model and its inputs, a method that is
# wrong, and one that is right. Both return ``{name: Jacobian [N, C, *p.shape]}``. The
# loop over all outputs, run on a copy, is the reference for both. Should a release
# raise or be right, ``record_failure`` raises.

# fold: Reference, methods and record_failure


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def is_grads_batched(model, X):
    """Return the Jacobian from one call with a cotangent for each sample and output."""
    fs, params = model(X), dict(model.named_parameters())
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def extend_leaves(model):
    """Return a copy of ``model`` with extended layers, but not the classes of them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not list(module.children()):
            extend(module)
    return model


def from_batch_grad(model, X, between=None, prepare=extend_leaves, with_X=True):
    """Run ``between`` on the model before the backward passes, one for each output."""
    model, X = prepare(model), X.clone().requires_grad_()
    fs, params = model(X), dict(model.named_parameters())
    _ = between and between(model)
    jacobian = {name: p.new_empty(*fs.shape, *p.shape) for name, p in params.items()}
    for c, f in enumerate(fs.sum(0)):
        with backpack(BatchGrad(), retain_graph=True):
            autograd.grad(f, [X] * with_X + [*params.values()], retain_graph=True)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch
    return jacobian


def from_sqrt_ggn(model, X, between=None, reduction="sum", samples=None):
    """Run ``between`` on the model before the backward pass."""
    model, X = extend_leaves(model), X.clone().requires_grad_()
    fs, params = model(X), dict(model.named_parameters())
    loss = extend(nn.MSELoss(reduction=reduction))(fs, torch.zeros_like(fs))
    _ = between and between(model)
    with backpack(SqrtGGNExact(subsampling=samples)):
        autograd.grad(loss, [X, *params.values()])
    V = {name: p.sqrt_ggn_exact for name, p in params.items()}  # [C, N, *p.shape]
    return {name: v.transpose(0, 1) / 2**0.5 for name, v in V.items()}


failures = {}  # {kind: {name: (model, X, the wrong Jacobian, its relative error)}}


def record_failure(kind, name, case, wrong, right):
    """Record that ``wrong(model, X)`` is silently wrong, and ``right(model, X)`` right.

    ``case`` is ``(model, X)``. Raises ``AssertionError`` if that is no longer so.
    """
    model, X = case
    truth = autograd_loop(copy.deepcopy(model), X)  # a copy has no hooks
    assert_close(right(model, X), truth)
    try:
        with warnings.catch_warnings(action="error"):
            jacobian = wrong(model, X)
    except Exception as error:
        raise AssertionError(f"{name} raises now: move it out of this page") from error
    if any(block.shape != truth[key].shape for key, block in jacobian.items()):
        off, text = None, "wrong shapes"
    else:
        J, W = (torch.cat([x[k].flatten() for k in truth]) for x in (truth, jacobian))
        off = ((W - J).norm() / J.norm()).item()
        text = f"off by {off:.1%}"
        if off < 1e-4:
            raise AssertionError(f"{name} is right now: move it out of this page")
    failures.setdefault(kind, {})[name] = model, X, jacobian, off
    print(f"{name}: {text}")


# %%
# The models of the catalog are three layers, or layers with a function of your own.

# fold: The models


class Net(nn.Module):
    """A class of your own: layers by name, and a forward function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, X):
        return self.function(self, X)


def dense(*middle):
    """Return a model with layers in its middle, by default ``Tanh``, and its inputs."""
    middle = middle or [nn.Tanh()]
    return nn.Sequential(nn.Linear(D, H), *middle, nn.Linear(H, C)), X


def conv(*layers, **options):
    body = nn.Sequential(nn.Conv2d(1, 3, 3, **options), *layers, nn.Flatten())
    images = torch.rand(N, 1, 5, 7)
    return body.append(nn.Linear(body(images).shape[1], C)), images


def net(function, **layers):
    layers = {"hidden": nn.Linear(D, D), "tanh": nn.Tanh()} | layers
    return Net(function, **layers, out=nn.Linear(D, C)), X


Z = torch.rand(N, D)  # other inputs

# %%
# BackPACK: options that a rule does not read
# -------------------------------------------
# A rule computes the derivative of a layer from its inputs and options. It does not
# read all: not ``padding="same"`` and ``padding_mode`` of a convolution, not
# ``divisor_override`` of ``AvgPool2d``, not the initial state of an ``LSTM``. What
# flows back through the cell state of an ``LSTM`` is lost. Instead: a number for
# ``padding``, or a method without rules.
#
# ``extend(model, use_converter=True)`` rewrites a model, and does not read ``inplace``.
# If a skip reads what ``ReLU(inplace=True)`` has overwritten, the new model is another
# function. Instead: compare the outputs of both, or a method without rules.


def lstm(function):
    layers = {"lstm": nn.LSTM(D, H, batch_first=True), "out": nn.Linear(H, C)}
    return Net(function, **layers), torch.rand(N, 5, D)


def initial_state(m, X):
    ones = X.new_ones(1, len(X), H)
    return m.out(m.lstm(X, (ones, ones))[0][:, -1])


def cell_state(m, X):
    outputs, (_, cell) = m.lstm(X)
    return m.out(outputs[:, -1] + cell[0])


def convert(model):
    return extend(copy.deepcopy(model), use_converter=True)


relu = nn.ReLU(inplace=True)
overwritten = net(lambda m, X: m.out(m.relu(h := m.hidden(X)) + h), relu=relu)
converted = partial(from_batch_grad, prepare=convert)
record = partial(record_failure, "BackPACK: options")
same, circular = conv(padding="same"), conv(padding=1, padding_mode="circular")
pool = conv(nn.AvgPool2d(2, divisor_override=3))
record("padding='same'", same, from_batch_grad, vmap_jacrev)
record("Circular, BatchGrad", circular, from_batch_grad, vmap_jacrev)
record("Circular, SqrtGGN", circular, from_sqrt_ggn, vmap_jacrev)
record("divisor_override", pool, from_sqrt_ggn, from_batch_grad)
record("Initial state", lstm(initial_state), from_batch_grad, is_grads_batched)
record("Cell state", lstm(cell_state), from_batch_grad, is_grads_batched)
record("In place, and a skip", overwritten, converted, vmap_jacrev)

# %%
# BackPACK: one parameter used twice
# ----------------------------------
# The Jacobian is the sum over the uses. But each use writes its part over that of the
# other, and a use outside of a layer writes nothing. Instead: a method without rules.


def tied():
    first, second = nn.Linear(H, H), nn.Linear(H, H)
    second.weight = first.weight
    return dense(first, nn.Tanh(), second)


twice = net(lambda m, X: m.out(m.hidden(m.tanh(m.hidden(X)))))
outside = net(lambda m, X: F.linear(m.hidden(X), m.out.weight) + m.out(X))

record = partial(record_failure, "BackPACK: used twice")
record("Tied, BatchGrad", tied(), from_batch_grad, vmap_jacrev)
record("Tied, SqrtGGN", tied(), from_sqrt_ggn, vmap_jacrev)
record("Layer called twice", twice, from_batch_grad, vmap_jacrev)
record("Weight outside", outside, from_batch_grad, vmap_jacrev)

# %%
# BackPACK: what is stored between two passes
# -------------------------------------------
# A layer keeps its inputs. Its rule reads them in the backward pass, with the mode of
# that moment. A forward pass in between changes the inputs, ``train()`` the mode.
# Without ``X`` among the inputs of ``autograd.grad``, the first layer has no new
# ``grad_batch``: one from an earlier pass stays. Instead: no other pass in between, or
# one in ``no_grad``; and ``X`` among the inputs.


def without_graph(model):
    with torch.no_grad():
        model(Z)


def without_X(model, X):
    passes = partial(from_batch_grad, extend_leaves(model), prepare=lambda model: model)
    passes(Z)
    return passes(X, with_X=False)


record = partial(record_failure, "BackPACK: between passes")
forward_pass = partial(from_batch_grad, between=lambda model: model(Z))
no_graph = partial(from_batch_grad, between=without_graph)
train = partial(from_sqrt_ggn, between=lambda model: model.train())
record("Forward pass between", dense(), forward_pass, no_graph)
record("train() between", dense(nn.Dropout(0.5).eval()), train, from_sqrt_ggn)
record("Earlier grad_batch", dense(), without_X, from_batch_grad)

# %%
# ``SqrtGGNExact`` passes its result from layer to layer by the address of the data. A
# transpose has the address of its base: if it is square, no shape shows that the axes
# are mixed up. The result of a function has a new address, which no layer asks for.
# That raises, as ``trust/residual_networks.py`` shows, unless a skip connection leads
# around it. Instead: ``BatchGrad`` where a function stands between layers.

layers = {"hidden": nn.Linear(D, H), "out": nn.Linear(H, C), "flat": nn.Flatten()}
turned = Net(lambda m, X: m.flat(m.out(m.hidden(X).mT)), **layers)


def beside(m, X):
    hidden = m.hidden(X)
    return m.out(m.add(hidden, m.branch(torch.relu(hidden))))


skip = net(beside, branch=nn.Linear(D, D), add=SumModule())
squares = torch.rand(N, H, D)
record("Square transpose", (turned, squares), from_sqrt_ggn, from_batch_grad)
record("Function beside a skip", skip, from_sqrt_ggn, from_batch_grad)

# %%
# SqrtGGNExact: scale and order
# -----------------------------
# The factor is the square root of 2 for ``reduction="sum"``. For ``"mean"``, that of
# ``2 / (N * C)``, with the ``N`` of the whole batch also if ``subsampling`` keeps fewer
# samples. The result is ``[C, N, *p.shape]``: with ``N == C``, no shape shows that you
# did not swap the axes.


def mean(model, X, factor=1, **options):
    J = from_sqrt_ggn(model, X, reduction="mean", **options)
    return {name: block * factor**0.5 for name, block in J.items()}


def subsampled(model, X, factor):
    return mean(model, torch.cat([X, Z]), factor, samples=list(range(N)))


def not_swapped(model, X):
    return {name: J.transpose(0, 1) for name, J in from_sqrt_ggn(model, X).items()}


record = partial(record_failure, "SqrtGGN: scale, order")
wrong, right = partial(subsampled, factor=N * C), partial(subsampled, factor=2 * N * C)
record("reduction='mean'", dense(), mean, partial(mean, factor=N * C))
record("Mean, subsampling", dense(), wrong, right)
record("Axes not swapped", (dense()[0], X[:C]), not_swapped, from_sqrt_ggn)

# %%
# Samples that mix
# ----------------
# ``vmap`` gives the model one sample at a time. A softmax over the batch becomes
# another function, and so does batch norm with the patch that makes it run in training
# mode. ``GroupNorm`` without a batch axis takes channels for samples if the sizes allow
# it. Instead: ``is_grads_batched``, and a batch axis of length one.
#
# ``BatchGrad`` takes the first axis of a layer's inputs for the samples. If it is time,
# with as many steps as samples, no shape shows it. In training mode, batch norm mixes
# the samples, and ``BatchGrad`` returns what each adds to the gradient of the sum. It
# warns, but scripts that ignore warnings go on. Instead: the batch first, and
# ``eval()``.


def patched(model, X):
    return vmap_jacrev(patch_batch_norm(copy.deepcopy(model)), X)


def detached(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def no_batch_axis(model, X):
    f = partial(functional_call, model)
    return vmap(jacrev(lambda *args: f(*args).flatten()), (None, 0))(detached(model), X)


def ignoring_warnings(model, X):
    with warnings.catch_warnings():
        # the failure is for scripts that do not see this warning
        warnings.filterwarnings("ignore", "Encountered BatchNorm module in training")
        return from_batch_grad(model, X)


channels = nn.Conv1d(H, H, 1), nn.GroupNorm(2, H), nn.Flatten(-2), nn.Linear(H * H, C)
group_norm = nn.Sequential(*channels), torch.rand(N, H, H)
steps, _ = net(lambda m, X: m.out(m.tanh(m.hidden(X.transpose(0, 1))).mean(0)))
steps = steps, torch.rand(N, N, D)
norm = dense(nn.BatchNorm1d(H))

record = partial(record_failure, "Samples that mix")
record("Softmax over the batch", dense(nn.Softmax(0)), vmap_jacrev, is_grads_batched)
record("Patched batch norm", conv(nn.BatchNorm2d(3)), patched, is_grads_batched)
record("No batch axis", group_norm, no_batch_axis, vmap_jacrev)
record("Time in the first axis", steps, from_batch_grad, vmap_jacrev)
record("Batch norm in training", norm, ignoring_warnings, is_grads_batched)

# %%
# vmap: wrong derivatives
# -----------------------
# The derivative of ``torch.cdist`` is wrong, and that of ``PReLU`` for ``N == C``.
# Inside ``torch.no_grad`` that of ``torch.linalg.solve`` is wrong, too.
# ``tie_weights=False`` loses the other uses of a tied weight. Instead:
# ``is_grads_batched``, no ``no_grad``, and the default for ``tie_weights``.


def solve(m, X):
    matrices = 3 * torch.eye(D) + m.weights.weight + X[:, :, None] * X[:, None]
    return m.out(torch.linalg.solve(matrices, X))


def untied(model, X):
    def f(params, x):
        return functional_call(model, params, x[None], tie_weights=False)[0]

    return vmap(jacrev(f), (None, 0))(detached(model), X)


prelu, _ = dense(nn.PReLU())
points = nn.Linear(D, C, bias=False)
distances = Net(lambda m, X: torch.cdist(X, m.points.weight), points=points)
system = Net(solve, weights=nn.Linear(D, D), out=nn.Linear(D, C)), X

record = partial(record_failure, "vmap: wrong derivatives")
record("PReLU, N == C", (prelu, X[:C]), vmap_jacrev, is_grads_batched)
record("cdist", (distances, X), vmap_jacrev, is_grads_batched)
record("Solve in no_grad", system, torch.no_grad()(vmap_jacrev), vmap_jacrev)
record("tie_weights=False", tied(), untied, vmap_jacrev)

# %%
# Autograd: zeros, sums, hooks
# ----------------------------
# A function that ignores its arguments has the derivative zero. The gradient of a sum
# over outputs or samples lacks their axis. A hook of a parameter, such as one that
# clips, changes what autograd returns: that is no derivative. And ``p.grad`` is one
# tensor to which each ``backward`` adds: rows that you collect are all the same.
#
# Instead: ``functional_call`` with detached parameters, a one-hot weight for each
# sample and output, and ``autograd.grad``.


def from_closure(model, X):
    params = detached(model)
    values = tuple(params.values())
    return dict(zip(params, autograd.functional.jacobian(lambda *_: model(X), values)))


def gradient_of_sum(model, X):
    def total(params, x):
        return functional_call(model, params, x[None]).sum()

    return vmap(grad(total), (None, 0))(detached(model), X)


def eye_for_all_samples(model, X):
    E, params = torch.eye(C)[:, None].expand(C, N, C), dict(model.named_parameters())
    rows = autograd.grad(model(X), params.values(), E, is_grads_batched=True)
    return dict(zip(params, rows))


def rows_of_grad(model, X):
    model, rows = copy.deepcopy(model), []
    for f in model(X).flatten():
        f.backward(retain_graph=True)
        rows.append([p.grad for p in model.parameters()])
    blocks = [torch.stack(block).unflatten(0, (N, C)) for block in zip(*rows)]
    return dict(zip(detached(model), blocks))


clipped, _ = dense()
clipped[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))

record = partial(record_failure, "Autograd")
record("Closure", dense(), from_closure, vmap_jacrev)
record("Gradient of a sum", dense(), gradient_of_sum, vmap_jacrev)
record("eye(C) for all samples", dense(), eye_for_all_samples, is_grads_batched)
record("Hook of a parameter", (clipped, X), is_grads_batched, vmap_jacrev)
record("Rows of p.grad", dense(), rows_of_grad, is_grads_batched)

# %%
# Precision
# ---------
# ``autocast`` returns ``float32`` that is no more exact than ``bfloat16``. Instead: no
# ``autocast`` around the Jacobian. Without it, too, ``float32`` products can round like
# ``bfloat16`` or TF32: on a GPU ``torch.backends.cudnn.allow_tf32`` does so for
# convolutions by default. ``trust/check_a_jacobian.py`` takes that into account.


def autocast(model, X):
    with torch.autocast("cpu", torch.bfloat16):
        return vmap_jacrev(model, X)


single = dense()[0].float(), X.float()
record_failure("Precision", "autocast", single, autocast, vmap_jacrev)

# %%
# All failures
# ------------
# A dot is a failure. The axis is the norm of the error by the norm of the Jacobian, for
# all parameters together. Failures with wrong shapes have no dot.

# fold: The figure

shown = {kind: [off for *_, off in f.values() if off] for kind, f in failures.items()}
errors = torch.tensor(sum(shown.values(), []))
colors = ["#E69F00"] * 3 + ["#D55E00"] + ["#CC79A7", "#0072B2", "#009E73", "black"]
fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
for row, (offs, color) in enumerate(zip(shown.values(), colors, strict=True)):
    x = sorted(min(off, 10) for off in offs)
    y = [row + (-0.25, 0, 0.25)[i % 3] for i in range(len(x))]  # none hides another
    ax.scatter(x, y, s=60, color=color, zorder=3)
ax.set_yticks(range(len(shown)), list(shown))
ax.set(xscale="log", xlabel="relative error of the Jacobian")
ticks = {0.001: "0.001", 0.01: "0.01", 0.1: "0.1", 1: "1", 10: "≥ 10"}
ax.set_xticks(list(ticks), ticks.values())
ax.grid(axis="x", zorder=0)
ax.invert_yaxis()
ax.set_title(
    f"{len(errors)} silent failures with numbers:\n"
    f"the median is off by {errors.median():.0%}"
)
plt.show()
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - No error does not mean right: check each new model once.
# - BackPACK is right for layers used once, with the options its rules know. ``vmap`` is
#   right where samples do not mix, but for a few functions.
# - Compare with a loop on sizes that all differ: many failures need two equal sizes.
#
# Next: ``trust/check_a_jacobian.py`` checks a Jacobian of any size. The alternative:
# ``trust/layer_support.py`` says which method is right for which layer.
