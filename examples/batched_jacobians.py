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
from itertools import product

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

N, D_in, D_hidden, C = 5, 4, 6, 3
X = torch.randn(N, D_in)
model = nn.Sequential(nn.Linear(D_in, D_hidden), nn.ReLU(), nn.Linear(D_hidden, C))

# %%
# Autograd loop
# -------------
#
# The definition is also a method: one backward pass per sample ``n`` and output ``c``.
# That makes ``N * C`` passes, and each runs through the whole batch, although only
# sample ``n`` matters. It needs no rules for layers, so it is the reference for the
# others.


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


jacobian = autograd_loop(model, X)
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
# last layer, which leaves the diagonals on the right.

# fold: How the picture is drawn
rows = torch.cat([J.flatten(2) for J in jacobian.values()], dim=2).flatten(0, 1)
P, zeros = rows.shape[1], (rows == 0).double().mean().item()
limit = rows.abs().max().item()
colors = plt.get_cmap("PuOr").with_extremes(bad="0.75")

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
nonzero = rows.where(rows != 0, torch.nan).numpy()
image = ax.imshow(nonzero, cmap=colors, vmin=-limit, vmax=limit, aspect="auto")
end = 0
for name, p in model.named_parameters():
    start, end = end, end + p.numel()
    ax.axvline(end - 0.5, color="black", linewidth=2)
    ax.text((start + end) / 2 - 0.5, -0.8, name, rotation=20)
for n in range(N):
    ax.axhline(n * C - 0.5, color="black", linewidth=1)
ax.set_yticks([n * C + (C - 1) / 2 for n in range(N)], [f"n = {n}" for n in range(N)])
ax.set(xlabel=f"P = {P} parameters", ylabel=f"N = {N} samples of C = {C} outputs")
title = f"Jacobian: {N * C} rows, {P} columns,\n{zeros:.0%} exactly zero (gray)"
ax.set_title(title, pad=36)
label = "derivative of the output by the parameter"
fig.colorbar(image, label=label, location="bottom")
plt.show()

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
# - ``extend`` stays with a model for good, so we extend a copy. Copy a model that keeps
#   activations before it runs (or ``Only Tensors created explicitly by the user``).


def batch_grad(extended, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``C`` backward passes."""
    X = X.detach().requires_grad_(X.is_floating_point())
    fs = extended(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    N, C = fs.shape
    params = {k: p for k, p in extended.named_parameters() if p.requires_grad}
    inputs = [X] * X.requires_grad + list(params.values())
    jacobian = {name: p.new_empty(N, C, *p.shape) for name, p in params.items()}
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), inputs, retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch.reshape(N, *p.shape)
            del p.grad_batch
    return jacobian


extended = extend(copy.deepcopy(model))
torch.testing.assert_close(batch_grad(extended, X), jacobian)
print(f"BatchGrad: {C} passes instead of {N * C}, and the same {len(jacobian)} blocks.")

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
# swap the first two axes, and you have the Jacobian. With ``reduction="mean"`` it would
# be another factor, since that loss is divided by ``N * C``.


def sqrt_ggn(extended, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one backward pass."""
    X = X.detach().requires_grad_(X.is_floating_point())
    fs = extended(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    params = {k: p for k, p in extended.named_parameters() if p.requires_grad}
    inputs = [X] * X.requires_grad + list(params.values())
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, inputs)
    jacobian = {}
    for name, p in params.items():  # from [C, N, *p.shape]
        jacobian[name] = p.sqrt_ggn_exact.transpose(0, 1) / 2**0.5
        del p.sqrt_ggn_exact  # as large as the Jacobian
    return jacobian


torch.testing.assert_close(sqrt_ggn(extended, X), jacobian)
print(f"SqrtGGNExact: one pass, and the same {len(jacobian)} blocks.")

# %%
# Unsupported layers
# ------------------
#
# BackPACK needs rules: ``BatchGrad`` for layers with parameters, ``SqrtGGNExact`` for
# every layer. Without one, ``SqrtGGNExact`` raises; ``BatchGrad`` warns and stores
# nothing, and here the warning counts as an error. Where two layers share a weight, or
# a forward hook changes an output, a rule does not know: both can be wrong, and nothing
# is said. A ResNet, with ``inplace=True`` or ``+=``, has to be converted first, and its
# outputs compared: ``trust/residual_networks.py``.

tied, twin = nn.Linear(D_hidden, D_hidden), nn.Linear(D_hidden, D_hidden)
twin.weight = tied.weight
hooked = nn.Linear(D_hidden, D_hidden)
hooked.register_forward_hook(lambda layer, args, output: output.sin())
cases = {"GELU": [nn.GELU()], "PReLU": [nn.PReLU()]}
cases |= {"shared weight": [tied, nn.ReLU(), twin], "forward hook": [hooked]}

for title, middle in cases.items():
    case = nn.Sequential(nn.Linear(D_in, D_hidden), *middle, nn.Linear(D_hidden, C))
    reference, extended = autograd_loop(case, X), extend(copy.deepcopy(case))
    for method in batch_grad, sqrt_ggn:
        try:
            with warnings.catch_warnings(action="error"):
                result = method(extended, X)
        except (NotImplementedError, UserWarning) as error:
            verdict = f"{type(error).__name__}: {error}"
        else:
            close = all(torch.allclose(result[k], J) for k, J in reference.items())
            verdict = "right" if close else "wrong, without an error"
        print(f"{title}, {method.__name__}: {verdict}")

# %%
# What to take home
# -----------------
#
# - For most models, take ``vmap(jacrev)``, the recipe of
#   ``compute/torch_func_jacobians.py``; or ``batched_jacobian``, of
#   ``scale/universal_jacobian.py``, which takes more models and checks its result.
# - Take BackPACK where you already use it, in eval mode, and for layers that it reads
#   to the end: ``trust/layer_support.py`` lists them, and ``trust/silent_failures.py``
#   says where nothing warns you, such as circular padding and hooks. ``BatchGrad``
#   holds one output at a time; ``SqrtGGNExact`` needs one pass and more rules, and is
#   not always faster: time both.
# - The autograd loop is the definition. Compare with it, on a handful of samples; at
#   any size, ``trust/check_a_jacobian.py`` compares with a few backward passes.
#
# Next: ``compute/torch_func_jacobians.py``, the same with PyTorch alone. The
# alternative: ``compute/choosing_a_method.py`` measures all methods on the same work.
