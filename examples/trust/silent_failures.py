"""
Silent failures, and a check that finds them
============================================

After this page you can check any Jacobian of your own model with one backward pass: the
check says which parameters are wrong, and by how much. You also know where methods
return wrong numbers without an error, why, and what to do instead.
"""

import copy
import math
import warnings
from functools import partial

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
from torch.utils.benchmark import Timer

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# Check of a Jacobian
# -------------------
# Take random weights ``u`` of shape ``[N, C]``. The sum of ``u[n, c] * J[n, c]`` is the
# gradient of the sum of ``u[n, c] * fs[n, c]``, whatever the model is. Autograd takes
# one backward pass for it, needs no rules for layers, and lets samples mix. If the two
# differ, the Jacobian is wrong.
#
# - An error ``E`` of ``J`` makes them differ by the sum of ``u[n, c] * E[n, c]``. With
#   standard normal weights, the mean square of that is the squared norm of ``E``.
# - The relative error is the norm of the difference by the largest of three: the norm
#   of the block of ``J``, that of its gradient, and ``eps ** (1 / 6)`` times the norm
#   of the whole, with ``eps`` the precision of the data type. The third is for blocks
#   where the truth is zero: they hold only rounding errors.
# - The tolerance is ``eps ** (2 / 3)``: above what rounding adds, and far below what a
#   wrong rule does.
# - The model stays as it is: the check works with copies of parameters and buffers, has
#   a random generator of its own, and puts back what layers store in a forward pass.


def check_jacobian(model, X, jacobian, seed=0):
    """Compare ``{name: Jacobian [N, C, *p.shape]}`` with one gradient of ``model(X)``.

    The model maps ``X`` of shape ``[N, ...]`` to ``[N, C]``, and always to the same
    numbers. ``jacobian`` holds each parameter that requires a gradient. ``seed`` is for
    the random weights. Returns ``{name: relative error}``. Raises ``AssertionError`` if
    parameters are wrong, with their relative errors, ``ValueError`` for missing or
    unknown names and for wrong shapes, and ``TypeError`` for another type, dtype or
    device, or an output without a graph.
    """
    if not isinstance(jacobian, dict) or not isinstance(X, torch.Tensor):
        kinds = f"{type(X).__name__} and {type(jacobian).__name__}"
        raise TypeError(f"X and jacobian are no tensor and dict, but {kinds}")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if missing := [name for name in names if name not in jacobian]:
        raise ValueError(f"the Jacobian lacks the parameters {missing}")
    if unknown := [name for name in jacobian if name not in names]:
        raise ValueError(f"no parameters that require a gradient: {unknown}")
    if not names:
        raise ValueError("no parameter of the model requires a gradient")

    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    leaves = [state[name].requires_grad_() for name in names]
    state |= {name: b.detach().clone() for name, b in model.named_buffers()}
    stored = [(vars(module), vars(module).copy()) for module in model.modules()]
    try:
        with torch.random.fork_rng([X.device] * X.is_cuda), torch.enable_grad():
            inputs = X.detach().requires_grad_(X.is_floating_point()).clone()
            fs = functional_call(model, state, (inputs,))
            if not isinstance(fs, torch.Tensor) or not fs.requires_grad:
                raise TypeError("the output is no tensor with a graph to parameters")
            if fs.ndim != 2 or len(fs) != len(X) or not fs.numel():
                shape = f"{list(fs.shape)}, not [N={len(X)}, C]"
                raise ValueError(f"the output has shape {shape}")
            u = torch.randn(fs.shape, generator=torch.Generator().manual_seed(seed))
            u = u.to(fs)
            grads = autograd.grad(fs, leaves, u, materialize_grads=True)
            grads = [gradient.to_dense() for gradient in grads]
    finally:
        for now, before in stored:
            now.clear()
            now.update(before)

    rows = {}
    for name, gradient in zip(names, grads):
        J = jacobian[name]
        if not isinstance(J, torch.Tensor):
            raise TypeError(f"the Jacobian of {name} is no tensor: {type(J).__name__}")
        if J.shape != fs.shape + gradient.shape:
            shapes = f"{list(J.shape)}, not [N, C, *p.shape]"
            shapes += f" = {[*fs.shape, *gradient.shape]}"
            raise ValueError(f"the Jacobian of {name} has shape {shapes}")
        if (J.dtype, J.device) != (gradient.dtype, gradient.device):
            kinds = f"{J.dtype} on {J.device}, not {gradient.dtype} on"
            raise TypeError(f"the Jacobian of {name} is {kinds} {gradient.device}")
        weights = u.to(gradient)
        if J.stride(0) < J.stride(1):  # take the order in memory, so nothing is copied
            J, weights = J.transpose(0, 1), weights.T
        difference = torch.tensordot(weights, J.detach(), dims=2) - gradient
        wide = torch.promote_types(J.dtype, torch.float32)
        rows[name] = [t.norm(dtype=wide).item() for t in (difference, J, gradient)]
    whole = math.hypot(*(max(row[1:]) for row in rows.values()))
    errors, wrong = {}, []
    for name, (difference, *norms) in rows.items():
        eps = torch.finfo(jacobian[name].dtype).eps
        scale = max(*norms, eps ** (1 / 6) * whole)
        errors[name] = difference / scale if difference else 0.0
        if not errors[name] <= eps ** (2 / 3):  # also if it is not a number
            wrong.append(f"{name} {errors[name]:.2g}")
    if wrong:
        raise AssertionError(f"wrong Jacobian, relative error of {', '.join(wrong)}")
    return errors


# %%
# Methods
# -------
# Each returns ``{name: Jacobian [N, C, *p.shape]}``. The loop over the outputs is the
# reference: the true Jacobian passes the check. For BackPACK, we extend the layers, not
# the class that holds them. ``between`` runs between the forward and the backward
# pass; by default it does nothing.

N, D, H, C = 7, 3, 4, 2  # samples, inputs, hidden values, outputs
X, Z = torch.rand(N, D), torch.rand(N, D)


def mlp(*layers):
    return nn.Sequential(nn.Linear(D, H), *(layers or [nn.Tanh()]), nn.Linear(H, C)), X


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop(model, X):
    model = copy.deepcopy(model)
    fs, params = model(X), trainable(model)
    options = {"retain_graph": True, "materialize_grads": True}
    rows = [autograd.grad(f, params.values(), **options) for f in fs.flatten()]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def grads_batched(model, X):
    fs, params = model(X), trainable(model)
    E = torch.eye(fs.numel()).unflatten(1, fs.shape)
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def vmap_jacrev(model, X, batch_axis=(None,), **options):
    def f(params, x):
        return functional_call(model, params, (x[batch_axis],), **options).flatten()

    params = {name: p.detach() for name, p in trainable(model).items()}
    return vmap(jacrev(f), (None, 0))(params, X)


def extended(model):
    model = copy.deepcopy(model)
    for layer in model.modules():
        if not list(layer.children()):
            extend(layer)
    return model


def batch_grad(model, X, between=lambda model: None, prepare=extended, with_X=True):
    model, X = prepare(model), X.clone().requires_grad_()
    fs, params = model(X), trainable(model)
    between(model)
    jacobian = {name: p.new_empty(*fs.shape, *p.shape) for name, p in params.items()}
    for c, f in enumerate(fs.sum(0)):
        with backpack(BatchGrad(), retain_graph=True):
            autograd.grad(f, [X] * with_X + [*params.values()], retain_graph=True)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch
    return jacobian


def sqrt_ggn(model, X, between=lambda model: None, reduction="sum", samples=None):
    model, X = extended(model), X.clone().requires_grad_()
    fs, params = model(X), trainable(model)
    loss = extend(nn.MSELoss(reduction=reduction))(fs, torch.zeros_like(fs))
    between(model)
    with backpack(SqrtGGNExact(subsampling=samples)):
        autograd.grad(loss, [X, *params.values()])
    V = {name: p.sqrt_ggn_exact for name, p in params.items()}
    return {name: v.transpose(0, 1) / 2**0.5 for name, v in V.items()}


model, _ = mlp()
for method in (loop, grads_batched, vmap_jacrev, batch_grad, sqrt_ggn):
    errors = check_jacobian(model, X, method(model, X))
    print(f"{method.__name__} passes, relative error {max(errors.values()):.0e}")

# %%
# ``fails`` keeps a failure: a function that makes a model and its inputs, and a method
# that is wrong without a warning. It compares with the loop, prints what the check
# says, and lets the check pass a method that is right. Should a new release raise or be
# right, ``fails`` raises.


class Net(nn.Module):
    """A class of your own: layers by name, and a forward function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, X):
        return self.function(self, X)


failures, sizes = {}, {}


def fails(name, make, method, instead):
    def failure():
        torch.manual_seed(0)
        model, X = make()
        return model, X, method(model, X)

    try:
        with warnings.catch_warnings(action="error"):
            model, X, wrong = failure()
    except Exception as error:
        raise AssertionError(f"{name} raises now: move it out of this page") from error
    try:
        check_jacobian(model, X, wrong)
    except (AssertionError, ValueError) as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name} is right now: move it out of this page")
    right = loop(model, X)
    assert_close(instead(model, X), right)
    check_jacobian(model, X, right)
    failures[name] = failure
    if all(J.shape == right[key].shape for key, J in wrong.items()):
        pairs = [(wrong[key] - J, J) for key, J in right.items()]
        off, norm = (
            math.hypot(*(t.norm().item() for t in side)) for side in zip(*pairs)
        )
        sizes[name] = off / norm


# %%
# BackPACK: options that a rule does not read
# -------------------------------------------
# A rule computes the derivative of a layer from its inputs and options. It does not
# read all: not ``padding="same"`` and ``padding_mode`` of a convolution, not
# ``divisor_override`` of ``AvgPool2d``, not the initial state of an ``LSTM``. What
# flows back through the cell state of an ``LSTM`` is lost.
#
# Instead: a number for ``padding``, or a method without rules.


def conv(*layers, **options):
    body = nn.Sequential(nn.Conv2d(1, 3, 3, **options), *layers, nn.Flatten())
    images = torch.rand(N, 1, 5, 7)
    return body.append(nn.Linear(body(images).shape[1], C)), images


def lstm(function):
    layers = {"lstm": nn.LSTM(D, H, batch_first=True), "out": nn.Linear(H, C)}
    return Net(function, **layers), torch.rand(N, 5, D)


def initial_state(m, X):
    ones = X.new_ones(1, len(X), H)
    return m.out(m.lstm(X, (ones, ones))[0][:, -1])


def cell_state(m, X):
    outputs, (_, cell) = m.lstm(X)
    return m.out(outputs[:, -1] + cell[0])


circular = partial(conv, padding=1, padding_mode="circular")
pool = partial(conv, nn.AvgPool2d(2, divisor_override=3))
fails("padding='same'", partial(conv, padding="same"), batch_grad, vmap_jacrev)
fails("Circular, BatchGrad", circular, batch_grad, vmap_jacrev)
fails("Circular, SqrtGGN", circular, sqrt_ggn, vmap_jacrev)
fails("divisor_override", pool, sqrt_ggn, batch_grad)
fails("Initial state", partial(lstm, initial_state), batch_grad, grads_batched)
fails("Cell state", partial(lstm, cell_state), batch_grad, grads_batched)

# %%
# BackPACK: one parameter, used twice
# -----------------------------------
# The Jacobian is the sum over the uses. But each use writes its part over that of the
# other, and a use outside of a layer writes nothing. Instead: a method without rules.


def tied():
    first, second = nn.Linear(H, H), nn.Linear(H, H)
    second.weight = first.weight
    return mlp(first, nn.Tanh(), second)


def net(function, **layers):
    layers = {"hidden": nn.Linear(D, D), "tanh": nn.Tanh()} | layers
    return Net(function, **layers, out=nn.Linear(D, C)), X


def twice(m, X):
    return m.out(m.hidden(m.tanh(m.hidden(X))))


def outside(m, X):
    return F.linear(m.hidden(X), m.out.weight) + m.out(X)


fails("Tied, BatchGrad", tied, batch_grad, vmap_jacrev)
fails("Tied, SqrtGGN", tied, sqrt_ggn, vmap_jacrev)
fails("Layer called twice", partial(net, twice), batch_grad, vmap_jacrev)
fails("Weight outside", partial(net, outside), batch_grad, vmap_jacrev)

# %%
# BackPACK: what is stored between two passes
# -------------------------------------------
# A layer keeps its inputs. Its rule reads them in the backward pass, with the mode of
# that moment. A forward pass in between changes the inputs, ``train()`` the mode.
# Without ``X`` among the inputs of ``autograd.grad``, the first layer has no new
# ``grad_batch``: one from an earlier pass stays.
#
# ``SqrtGGNExact`` passes its result from layer to layer by the address of the data. A
# transpose has the address of its base: if it is square, no shape shows that the axes
# are mixed up. The result of a function has a new address, which no layer asks for.
# That raises, as ``trust/residual_networks.py`` shows, unless a skip connection leads
# around it.
#
# Instead: no other pass in between, or one in ``no_grad``; ``X`` among the inputs; and
# ``BatchGrad`` where a function stands between layers.


def without_graph(model):
    with torch.no_grad():
        model(Z)


def without_X(model, X):
    passes = partial(batch_grad, extended(model), prepare=lambda model: model)
    passes(Z)
    return passes(X, with_X=False)


def transpose():
    layers = {"hidden": nn.Linear(D, H), "out": nn.Linear(H, C), "flat": nn.Flatten()}
    model = Net(lambda m, X: m.flat(m.out(m.hidden(X).mT)), **layers)
    return model, torch.rand(N, H, D)


def skip():
    def forward(m, X):
        hidden = m.hidden(X)
        return m.out(m.add(hidden, m.branch(torch.relu(hidden))))

    return net(forward, branch=nn.Linear(D, D), add=SumModule())


dropout = nn.Dropout(0.5).eval()
forward_pass = partial(batch_grad, between=lambda model: model(Z))
forward_pass_without_graph = partial(batch_grad, between=without_graph)
train = partial(sqrt_ggn, between=lambda model: model.train())
fails("Forward pass between", mlp, forward_pass, forward_pass_without_graph)
fails("train() between", partial(mlp, dropout), train, sqrt_ggn)
fails("Earlier grad_batch", mlp, without_X, batch_grad)
fails("Square transpose", transpose, sqrt_ggn, batch_grad)
fails("Function beside a skip", skip, sqrt_ggn, batch_grad)

# %%
# BackPACK: batch axis and batch norm
# -----------------------------------
# ``BatchGrad`` takes the first axis of a layer's inputs for the samples. If it is time,
# with as many steps as samples, no shape shows it. Instead: the batch comes first.
#
# In training mode, batch norm mixes the samples. ``BatchGrad`` then returns what each
# sample adds to the gradient of the sum over the batch. BackPACK warns, but scripts
# that ignore warnings go on. Instead: ``eval()``, or a method that lets samples mix.


def time_first():
    model, _ = net(lambda m, X: m.out(m.tanh(m.hidden(X.transpose(0, 1))).mean(0)))
    return model, torch.rand(N, N, D)


def ignoring_warnings(model, X):
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return batch_grad(model, X)


norm = partial(mlp, nn.BatchNorm1d(H))
fails("Time in the first axis", time_first, batch_grad, vmap_jacrev)
fails("Batch norm in training", norm, ignoring_warnings, grads_batched)
try:
    with warnings.catch_warnings(action="error"):
        batch_grad(*norm())
except UserWarning as warning:
    print(f"UserWarning: {str(warning).partition('.')[0]}")

# %%
# SqrtGGNExact: scale and order
# -----------------------------
# The factor is the square root of 2 for ``reduction="sum"``. For ``"mean"``, that of
# ``2 / (N * C)``, with the ``N`` of the whole batch also if ``subsampling`` keeps fewer
# samples. The result is ``[C, N, *p.shape]``: with ``N == C``, no shape shows that you
# did not swap the axes.


def mean(model, X, factor=1, **options):
    J = sqrt_ggn(model, X, reduction="mean", **options)
    return {name: block * factor**0.5 for name, block in J.items()}


def subsampled(model, X, factor):
    return mean(model, torch.cat([X, Z]), factor, samples=list(range(N)))


def square(*layers):
    return mlp(*layers)[0], X[:C]


def not_swapped(model, X):
    return {name: J.transpose(0, 1) for name, J in sqrt_ggn(model, X).items()}


fails("reduction='mean'", mlp, mean, partial(mean, factor=N * C))
wrong, right = partial(subsampled, factor=N * C), partial(subsampled, factor=2 * N * C)
fails("Mean, subsampling", mlp, wrong, right)
fails("Axes not swapped", square, not_swapped, sqrt_ggn)

# %%
# vmap: batch axis, and wrong derivatives
# ---------------------------------------
# ``vmap`` gives the model one sample at a time. A softmax over the batch becomes
# another function. So does batch norm with the patch that makes it run in training
# mode, and ``GroupNorm`` without a batch axis, which takes channels for samples if the
# sizes allow it. The derivative of ``torch.cdist`` is wrong, and that of ``PReLU`` for
# ``N == C``. Inside ``torch.no_grad`` that of ``torch.linalg.solve`` is wrong, too.
# ``tie_weights=False`` loses the other uses of a tied weight.
#
# Instead:
#
# - Softmax over the batch, batch norm, ``cdist``, ``PReLU``: ``is_grads_batched``.
# - ``GroupNorm``: a batch axis of length one.
# - ``no_grad``: ``detach`` for the parameters.
# - ``tie_weights=False``: the default.


def patched(model, X):
    return vmap_jacrev(patch_batch_norm(copy.deepcopy(model)), X)


def group_norm():
    layers = nn.Conv1d(H, H, 1), nn.GroupNorm(2, H), nn.Flatten(-2)
    return nn.Sequential(*layers, nn.Linear(H * H, C)), torch.rand(N, H, H)


def cdist():
    points = nn.Linear(D, C, bias=False)
    return Net(lambda m, X: torch.cdist(X, m.points.weight), points=points), X


def solve():
    def outputs(m, X):
        matrices = 3 * torch.eye(D) + m.weights.weight + X[:, :, None] * X[:, None]
        return m.last(torch.linalg.solve(matrices, X))

    return Net(outputs, weights=nn.Linear(D, D), last=nn.Linear(D, C)), X


softmax, norm2d = partial(mlp, nn.Softmax(0)), partial(conv, nn.BatchNorm2d(3))
fails("Softmax over the batch", softmax, vmap_jacrev, grads_batched)
fails("Patched batch norm", norm2d, patched, grads_batched)
fails("No batch axis", group_norm, partial(vmap_jacrev, batch_axis=()), vmap_jacrev)
fails("PReLU, N == C", partial(square, nn.PReLU()), vmap_jacrev, grads_batched)
fails("cdist", cdist, vmap_jacrev, grads_batched)
fails("Solve in no_grad", solve, torch.no_grad()(vmap_jacrev), vmap_jacrev)
fails("tie_weights=False", tied, partial(vmap_jacrev, tie_weights=False), vmap_jacrev)

# %%
# Autograd: zeros, sums, hooks
# ----------------------------
# A function that ignores its arguments has the derivative zero. The gradient of a sum
# over outputs or samples lacks their axis. A hook of a parameter, such as one that
# clips, changes what autograd returns: that is no derivative. And ``p.grad`` is one
# tensor to which each ``backward`` adds: rows that you collect are all the same.
#
# Instead:
#
# - A function that ignores its arguments: ``functional_call``.
# - Sums: a one-hot weight for each sample and output.
# - A hook of a parameter: ``functional_call`` with detached parameters.
# - Rows of ``p.grad``: ``autograd.grad``.


def closure(model, X):
    params = trainable(model)
    values = tuple(params.values())
    return dict(zip(params, autograd.functional.jacobian(lambda *_: model(X), values)))


def gradient_of_sum(model, X):
    def total(params, x):
        return functional_call(model, params, (x,)).sum()

    params = {name: p.detach() for name, p in trainable(model).items()}
    return vmap(grad(total), (None, 0))(params, X)


def eye_for_all_samples(model, X):
    E, params = torch.eye(C)[:, None].expand(C, N, C), trainable(model)
    rows = autograd.grad(model(X), params.values(), E, is_grads_batched=True)
    return dict(zip(params, rows))


def clipped():
    model, _ = mlp()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return model, X


def rows_of_grad(model, X):
    model, rows = copy.deepcopy(model), []
    for f in model(X).flatten():
        f.backward(retain_graph=True)
        rows.append([p.grad for p in model.parameters()])
    blocks = [torch.stack(block).unflatten(0, (N, C)) for block in zip(*rows)]
    return dict(zip(trainable(model), blocks))


fails("Closure", mlp, closure, vmap_jacrev)
fails("Gradient of a sum", mlp, gradient_of_sum, vmap_jacrev)
fails("eye(C) for all samples", mlp, eye_for_all_samples, grads_batched)
fails("Hook of a parameter", clipped, grads_batched, vmap_jacrev)
fails("Rows of p.grad", mlp, rows_of_grad, grads_batched)

# %%
# Precision
# ---------
# ``autocast`` returns ``float32`` that is no more exact than ``bfloat16``: we print the
# error of rounding to ``bfloat16`` beside it. ``float32`` itself passes.
# ``torch.set_float32_matmul_precision`` allows less than ``float32`` in matrix products
# where the hardware has it. We print how far that is off from ``float64``. Instead:
# ``"highest"``, and ``float64`` to compare two methods.


def single():
    return mlp()[0].float(), X.float()


def autocast(model, X):
    with torch.autocast("cpu", torch.bfloat16):
        return vmap_jacrev(model, X)


fails("autocast", single, autocast, vmap_jacrev)
right = loop(*failures["autocast"]()[:2])
J = torch.cat([block.flatten() for block in right.values()])
rounding = ((J.bfloat16() - J).norm() / J.norm()).item()
assert rounding < sizes["autocast"]
print(f"autocast {sizes['autocast']:.1e}, rounding to bfloat16 {rounding:.1e}")

device = "cuda" if torch.cuda.is_available() else "cpu"
default = torch.get_float32_matmul_precision()
wide = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, C))
data = torch.rand(N, 64)
exact = loop(wide, data)
wide, data = wide.to(device, torch.float32), data.to(device, torch.float32)
for precision in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(precision)
    rounded = vmap_jacrev(wide, data)
    off = max((rounded[k].cpu() - J).norm() / J.norm() for k, J in exact.items())
    print(f"{precision} on {device}: {off:.0e}")
torch.set_float32_matmul_precision(default)

# %%
# Relative error of each failure
# ------------------------------
# The bars show the norm of the error by that of the Jacobian, for all parameters
# together. Failures with wrong shapes are missing. The dashed line is the tolerance in
# ``float64``, the dotted one that of ``float32``, for ``autocast``.

tolerances = {d: torch.finfo(d).eps ** (2 / 3) for d in (torch.float64, torch.float32)}
names = sorted(sizes, key=sizes.get)
fig, ax = plt.subplots(figsize=(5.5, 9), layout="constrained")
ax.barh(names, [sizes[name] for name in names], color="#0072B2")
for (dtype, tolerance), style in zip(tolerances.items(), ("--", ":")):
    ax.axvline(tolerance, color="#D55E00", linestyle=style, label=f"tolerance, {dtype}")
ax.set(xscale="log", xlabel="relative error", ylim=(-0.6, len(names) - 0.4))
ax.set_title("Relative errors of silent failures")
fig.legend(loc="outside lower center")
plt.show()

# %%
# Odds to miss an error
# ---------------------
# The difference is a Gaussian vector. It is most often short if the errors of all
# samples and outputs are multiples of one vector: then its norm is ``r * abs(z)``, with
# ``r`` the relative error and ``z`` one normal number. So an error ``r`` stays below
# the tolerance with odds of about ``sqrt(2 / pi) * tolerance / r``, or less. A second
# check with another ``seed`` misses it with the product of both odds. We count for
# ``tolerance / r = 0.1``, and print which relative error has a bound of 1 in 1000.

generator, odds = torch.Generator().manual_seed(0), (2 / math.pi) ** 0.5
u = torch.randn(20_000, N * C, generator=generator)
for rank in (1, 2, N * C):
    factors = torch.randn(N * C, rank, generator=generator)
    error = factors @ torch.randn(rank, 50, generator=generator)
    missed = ((u @ error).norm(dim=1) <= 0.1 * error.norm()).double().mean()
    print(f"Error of rank {rank}: missed {missed:.4f}, bound {0.1 * odds:.4f}")
    assert missed < 0.11 * odds
for dtype, tolerance in tolerances.items():
    error = 1000 * odds * tolerance
    print(f"{dtype}: an error of {error:.0e} is missed at most once in 1000 checks")

# %%
# Limits of the check
# -------------------
# If samples mix, the true Jacobian passes. A model with random numbers fails, even with
# the loop: its next forward pass is another function. Instead: ``eval()``. And what
# autograd leaves out, the check does not see. The row ``padding_idx`` of an embedding
# changes the outputs, but its gradient is zero by convention.

model, _ = norm()
errors = check_jacobian(model, X, grads_batched(model, X))
print(f"Batch norm in training mode passes: {max(errors.values()):.0e}")
model, _ = mlp(nn.Dropout(0.5))
try:
    check_jacobian(model, X, loop(model, X))
except AssertionError as error:
    print(f"Dropout in training mode: {error}")
check_jacobian(model.eval(), X, vmap_jacrev(model, X))

words = torch.randint(4, (N, 3))
embedding = nn.Embedding(4, D, padding_idx=0)
model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(3 * D, C))
J = loop(model, words)
check_jacobian(model, words, J)
before = model(words)
with torch.no_grad():
    embedding.weight[0, 0] += 1
change = (model(words) - before).norm().item()
print(
    f"padding_idx: Jacobian {J['0.weight'][..., 0, 0].norm():.1f}, change {change:.1f}"
)

# %%
# Cost
# ----
# The check takes one gradient, and reads the Jacobian twice: for the sum and for the
# norm. For a small ``J``, compare the last two lines: the fixed cost shows. We print
# times in ms, in ``float32``.

sizes_of_layers = 64, 96, 96, 10
layers = [nn.Linear(*pair) for pair in zip(sizes_of_layers, sizes_of_layers[1:])]
model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).float()
data = torch.rand(48, 64, dtype=torch.float32)
J = vmap_jacrev(model, data)
jobs = {
    "forward and backward pass": lambda: autograd.grad(
        model(data).sum(), list(model.parameters())
    ),
    "norm of the Jacobian": lambda: [block.norm() for block in J.values()],
    "check_jacobian": lambda: check_jacobian(model, data, J),
    "vmap(jacrev)": lambda: vmap_jacrev(model, data),
}
for job, function in jobs.items():
    timer = Timer("function()", globals={"function": function})
    print(f"{job}: {timer.blocked_autorange(min_run_time=0.05).median * 1e3:.2f} ms")
torch.set_num_threads(threads)

# %%
# Where to go next
# ----------------
# Next: ``trust/residual_networks.py`` shows what to change in a network with skips and
# batch norm. The alternative: ``scale/universal_jacobian.py`` computes a Jacobian that
# checks itself.
