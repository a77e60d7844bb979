r"""
Batched Jacobians in three ways
===============================

After this page you can compute the derivative of every output of a network with respect
to every parameter, for a whole batch: with a loop over PyTorch's autograd, with
BackPACK in one backward pass per output, and with BackPACK in a single pass. You also
see where BackPACK raises, and where it is wrong without saying so.

All you need to know is what a gradient in PyTorch is. The packages are ``torch``,
``backpack-for-pytorch`` and ``matplotlib``.
"""

import copy
import warnings

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn

# %%
# Shapes
# ------
#
# Let ``p`` be a parameter of a network.
#
# - One number ``f``: ``f.backward()`` gives one gradient, ``[*p.shape]``.
# - A batch of numbers, ``fs`` of shape ``[N]``: a gradient per sample,
#   ``[N, *p.shape]``.
# - A batch of vectors, ``fs`` of shape ``[N, C]``: a gradient per sample and output,
#   ``[N, C, *p.shape]``. This is the batched Jacobian.
#
# We take two linear layers with a ReLU between, ``N`` samples and ``C`` outputs. All
# sizes differ, so that no mix-up of axes goes unseen. In double precision, rounding
# stays below the tolerance of the comparisons.

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)

N, D_in, D_hidden, C = 15, 10, 7, 5
X = torch.rand(N, D_in)
model = nn.Sequential(nn.Linear(D_in, D_hidden), nn.ReLU(), nn.Linear(D_hidden, C))

# %%
# Autograd loop
# -------------
#
# The definition is also a method: one backward pass per sample ``n`` and output ``c``.
# That makes ``N * C`` passes, and each runs through the whole batch, although only
# sample ``n`` matters. It needs no rules for layers, so it is the reference for the
# others. Each function on this page works on a copy and leaves your model as it is.


def forward(model, X):
    """Return ``fs`` of shape ``[N, C]`` and the parameters that require a gradient."""
    fs = model(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    return fs, {name: p for name, p in model.named_parameters() if p.requires_grad}


def autograd_jacobian(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from N * C backward passes."""
    fs, params = forward(copy.deepcopy(model), X)
    N, C = fs.shape
    options = {"retain_graph": True, "materialize_grads": True}  # zero if unused
    rows = [
        autograd.grad(fs[n, c], params.values(), **options)
        for n in range(N)
        for c in range(C)
    ]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


jacobian = autograd_jacobian(model, X)
for name, p in model.named_parameters():
    print(f"{name}: shape {list(p.shape)}, Jacobian {list(jacobian[name].shape)}")

# %%
# Picture of the Jacobian
# -----------------------
#
# Each sample and output is one row; each of the ``P`` numbers in the parameters is one
# column. Gray entries are exactly zero, for two reasons. A hidden unit that ReLU
# switches off for a sample passes nothing on: the weights and the bias that feed it,
# and the weights that read it, get zero. And output ``c`` reads only row ``c`` of the
# last layer, which leaves the diagonals of dots on the right. The colors end at the
# largest entry of ``0.weight``; all larger ones share the darkest color.

rows = torch.cat([J.flatten(2) for J in jacobian.values()], dim=2).flatten(0, 1)
P = rows.shape[1]
limit = jacobian["0.weight"].abs().max().item()
colors = plt.get_cmap("PuOr").with_extremes(bad="0.75")

fig, ax = plt.subplots(figsize=(6, 6.5), layout="constrained")
nonzero = rows.where(rows != 0, torch.nan).numpy()
image = ax.imshow(nonzero, cmap=colors, vmin=-limit, vmax=limit, aspect="auto")
end = 0
for name, p in model.named_parameters():
    start, end = end, end + p.numel()
    ax.axvline(end - 0.5, color="black", linewidth=1)
    ax.text((start + end) / 2 - 0.5, -1.5, name, rotation=30)
for n in range(N):
    ax.axhline(n * C - 0.5, color="black", linewidth=0.5)
ax.set_yticks([n * C + (C - 1) / 2 for n in range(N)], [f"n = {n}" for n in range(N)])
ax.set(xlabel=f"P = {P} parameters", ylabel=f"N = {N} samples of C = {C} outputs")
ax.set_title(f"Jacobian: {N * C} rows, {P} columns, gray where exactly zero", pad=36)
label = "derivative of the output by the parameter"
fig.colorbar(image, label=label, extend="both", location="bottom", aspect=40)
plt.show()

# %%
# The two reasons predict each zero.

off = (model[0](X) <= 0)[:, None].expand(N, C, D_hidden)
other = ~torch.eye(C, dtype=torch.bool)
zeros = {
    "0.weight": off[..., None].expand(N, C, D_hidden, D_in),
    "0.bias": off,
    "2.weight": off[:, :, None] | other[..., None],
    "2.bias": other.expand(N, C, C),
}
torch.testing.assert_close({name: J == 0 for name, J in jacobian.items()}, zeros)
print(f"{(rows == 0).double().mean():.0%} of the entries are zero, as predicted.")

# %%
# BatchGrad
# ---------
#
# `BackPACK <https://docs.backpack.pt>`_ computes more than the gradient in a backward
# pass. Its ``BatchGrad`` stores a gradient per sample in ``p.grad_batch``, of shape
# ``[N, *p.shape]``. A pass for the sum over samples of ``fs[:, c]`` gives ``J[:, c]``,
# so the Jacobian takes ``C`` passes. Four details matter:
#
# - Every pass but the last retains twice: autograd its graph (or ``Trying to backward
#   through the graph a second time``), BackPACK the layer inputs and outputs it stored
#   (or ``'Linear' object has no attribute 'output'``). The last pass frees both.
# - ``autograd.grad`` leaves ``.grad`` alone; ``backward`` would add to it.
# - ``X`` is differentiated, too, since BackPACK works in backward hooks of the layers.
#   If ``X`` requires no gradient, PyTorch warns (``Full backward hook is firing``). If
#   it is not in the list, the first layer's hook does not run (``'Parameter' object has
#   no attribute 'grad_batch'``).
# - ``extend`` stays with a model for good, so we extend a copy.


def batchgrad_jacobian(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from C backward passes."""
    X = X.detach().requires_grad_()
    fs, params = forward(extend(copy.deepcopy(model)), X)
    N, C = fs.shape
    jacobian = {name: p.new_empty(N, C, *p.shape) for name, p in params.items()}
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), [X, *params.values()], retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch.reshape(N, *p.shape)
            del p.grad_batch
    return jacobian


def compare(method, result):
    """Print that ``result`` has the names, shapes and values of the loop, or raise."""
    torch.testing.assert_close(result, jacobian)
    print(f"{method} agrees with the autograd loop for {len(result)} parameters.")


compare("BatchGrad", batchgrad_jacobian(model, X))

# %%
# SqrtGGNExact
# ------------
#
# Let :math:`J_n`, of shape ``[C, P]``, hold the rows of sample :math:`n`. The square
# loss with ``reduction="sum"`` is :math:`\sum_{n,c} (f_{nc} - y_{nc})^2`. Its second
# derivatives by the ``C`` outputs of one sample are :math:`2 I`, with the identity
# :math:`I` of shape ``[C, C]``, whatever the targets :math:`y` are. The generalized
# Gauss-Newton matrix (GGN), of shape ``[P, P]``, puts them between two Jacobians:
#
# .. math::
#
#     G &= \sum_n J_n^\top \, (2 I) \, J_n = \sum_n V_n^\top V_n \\
#     V_n &= \sqrt{2} \, J_n
#
# :math:`V` is a square root of :math:`G`. BackPACK computes it in one pass (`Dangel,
# Tatzel and Hennig, 2021 <https://arxiv.org/abs/2106.02624>`_) and stores it in
# ``p.sqrt_ggn_exact``, of shape ``[C, N, *p.shape]``. Divide by the square root of 2,
# swap the first two axes, and you have the Jacobian. With ``reduction="mean"`` the loss
# is divided by ``N * C``, and so are its second derivatives: another factor.


def sqrt_ggn_jacobian(model, X, reduction="sum"):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one backward pass."""
    X = X.detach().requires_grad_()
    fs, params = forward(extend(copy.deepcopy(model)), X)
    loss = extend(nn.MSELoss(reduction=reduction))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, [X, *params.values()])
    scale = {"sum": 2, "mean": 2 / fs.numel()}[reduction] ** 0.5
    V = {name: p.sqrt_ggn_exact for name, p in params.items()}  # [C, N, *p.shape]
    return {name: v.transpose(0, 1) / scale for name, v in V.items()}


compare("SqrtGGNExact", sqrt_ggn_jacobian(model, X))
compare("SqrtGGNExact of the mean", sqrt_ggn_jacobian(model, X, reduction="mean"))

# %%
# Unsupported layers
# ------------------
#
# BackPACK needs rules: ``BatchGrad`` for layers with parameters, ``SqrtGGNExact`` for
# every layer. Without one, ``SqrtGGNExact`` raises; ``BatchGrad`` warns and stores
# nothing, and here the warning counts as an error. Where two layers share a weight, the
# result is wrong, and nothing is said.

tied, twin = nn.Linear(D_hidden, D_hidden), nn.Linear(D_hidden, D_hidden)
twin.weight = tied.weight
cases = {"GELU": [nn.GELU()], "PReLU": [nn.PReLU()]}
cases["shared weight"] = [tied, nn.ReLU(), twin]

for title, middle in cases.items():
    case = nn.Sequential(nn.Linear(D_in, D_hidden), *middle, nn.Linear(D_hidden, C))
    reference = autograd_jacobian(case, X)
    for method in batchgrad_jacobian, sqrt_ggn_jacobian:
        try:
            with warnings.catch_warnings(action="error"):
                result = method(case, X)
        except (NotImplementedError, UserWarning) as error:
            verdict = f"{type(error).__name__}: {error}"
        else:
            close = all(torch.allclose(result[k], J) for k, J in reference.items())
            verdict = "right" if close else "wrong, without an error"
        print(f"{title}, {method.__name__}: {verdict}")

# %%
# Which method to take
# --------------------
#
# - The autograd loop needs no rules, only outputs of shape ``[N, C]``. Take it for a
#   handful of samples, to check another method on your model.
# - ``BatchGrad`` needs rules for the layers with parameters, no shared weights, and
#   floating-point inputs. Take it if ``SqrtGGNExact`` lacks a rule, or if you can use
#   and drop the Jacobian of one output at a time.
# - ``SqrtGGNExact`` needs the same, a rule for every other layer, and an
#   ``nn.Sequential`` of them. Take it if the whole Jacobian fits into memory.
#
# Both need a model in which samples do not mix and nothing is random: ``model.eval()``.
#
# Next: ``compute/choosing_a_method.py`` measures these methods and more on the same
# work. The alternative: ``compute/torch_func_jacobians.py`` needs no BackPACK.
