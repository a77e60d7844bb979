"""
Precision and randomness
========================

After this page you know how many digits your Jacobian has in each precision, which
switches of a GPU take digits away, why two right methods differ, and what dropout does
to a Jacobian. In short: compute it in float32 without autocast, after ``eval()``, and
compare methods in float64.
"""

# fold: Imports
import copy
import warnings
from itertools import pairwise, product

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

torch.set_default_dtype(torch.float32)
threads = torch.get_num_threads()
torch.set_num_threads(1)
_ = torch.manual_seed(0)

# %%
# Digits of a Jacobian
# --------------------
# To count the digits, compute the Jacobian once more, in ``float64``. Both here are
# ``{name: [N, C, *p.shape]}``. The error is relative to the norm of each block.
# ``trust/check_a_jacobian.py`` measures rounding without ``float64``.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def relative_errors(J, exact):
    return {k: ((J[k].to(e) - e).norm() / e.norm()).item() for k, e in exact.items()}


def largest_error(J, exact):
    return max(relative_errors(J, exact).values())


small, X = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.rand(11, 5)
exact = vmap_jacrev(copy.deepcopy(small).double(), X.double())
J = vmap_jacrev(small, X)
for name, error in relative_errors(J, exact).items():
    print(f"{name}: relative error {error:.0e}")
assert largest_error(J, exact) < 1e-5

# %%
# float32, float16, bfloat16, autocast
# ------------------------------------
# A number has 24 significant bits in ``float32``, 11 in ``float16`` and 8 in
# ``bfloat16``: 7, 3 and 2 digits. A Jacobian in 16 bits can have one or two less, where
# ReLUs switch. A model in 16 bits rounds its parameters and each result. Under
# ``autocast`` they stay ``float32``, and products round to 16 bits. The Jacobian is
# ``float32`` then, and has no more digits than the products. In a training loop under
# ``autocast``, put the Jacobian in
# ``with torch.autocast(X.device.type, enabled=False)``.
#
# We take an MLP and a CNN with ReLU. The reference is one backward pass in ``float64``
# for each output of each sample.

# fold: The models, and the Jacobian from a loop


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def conv_net(*widths):
    """Return convolutions of these widths, a mean over the image, and 10 outputs."""
    pairs = [[nn.Conv2d(*p, 3, padding=1), nn.ReLU()] for p in pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    return nn.Sequential(*sum(pairs, []), *head)


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


# %%
# Five Jacobians of each model:


def under_autocast(dtype, method, model, X):
    with torch.autocast(X.device.type, dtype):
        return method(model, X)


models = {
    "MLP": (mlp(96, 128, 64, 10), torch.rand(24, 96)),
    "CNN": (conv_net(3, 12, 16), torch.rand(6, 3, 24, 24)),
}
truths, errors = {}, {name: {} for name in models}
for name, (model, X) in models.items():
    truths[name] = autograd_loop(copy.deepcopy(model).double(), X.double())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        bits = str(dtype).removeprefix("torch.")
        J = {bits: vmap_jacrev(copy.deepcopy(model).to(dtype), X.to(dtype))}
        if dtype != torch.float32:
            J[f"autocast {bits}"] = under_autocast(dtype, vmap_jacrev, model, X)
        errors[name] |= {k: relative_errors(J[k], truths[name]) for k in J}
    for precision, error in errors[name].items():
        print(f"{name}, {precision}: largest error {max(error.values()):.0e}")
    assert max(errors[name]["float32"].values()) < 1e-5
    assert max(errors[name]["autocast bfloat16"].values()) > 1e-5

# %%
# Blocks of weights, from the first layer to the last. The lines are ``eps``, the gap
# between 1 and the next number. The last bias is not shown: its block is an identity,
# and exact.

# fold: The figure

fig, axes = plt.subplots(1, 2, sharey=True, figsize=(5, 4.2), layout="constrained")
colors = {"float32": "#0072B2", "float16": "#E69F00", "bfloat16": "#D55E00"}
for ax, name in zip(axes, errors):
    for precision, error in errors[name].items():
        weights = {k: e for k, e in error.items() if k.endswith("weight")}
        color, auto = colors[precision.split()[-1]], "autocast" in precision
        style = {"s": 220, "facecolor": "none"} if auto else {"s": 70}
        ax.scatter(*zip(*weights.items()), color=color, label=precision, **style)
    for dtype, color in colors.items():
        ax.axhline(torch.finfo(getattr(torch, dtype)).eps, color=color, linewidth=0.8)
    ax.set_title(name, loc="left")
    ax.set(yscale="log", xlabel="block of J")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.margins(x=0.2)
axes[0].set_ylabel("relative error")
worst = [max(errors["MLP"][k].values()) for k in ("float32", "bfloat16")]
title = f"{worst[0]:.0e} in float32, {worst[1]:.0e} in bfloat16"
fig.suptitle(f"Largest relative error of J:\n{title}")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %%
# 16 bits switch ReLUs on and off
# -------------------------------
# The derivative of a ReLU jumps from 0 to 1. Where rounding moves its input across
# zero, an entry of ``J`` is not rounded, but another one. The bias before the last ReLU
# of the MLP shows it: an entry of its block is zero, or one weight of the last layer.

(model, X), truth = models["MLP"], truths["MLP"]["2.bias"]
J = vmap_jacrev(copy.deepcopy(model).bfloat16(), X.bfloat16())["2.bias"].to(truth)
switched = (J == 0) != (truth == 0)
off, rest = (J - truth).norm(), (J - truth)[~switched].norm()
assert rest / truth.norm() < torch.finfo(torch.bfloat16).eps
print(f"bfloat16 switches {switched.sum()} of {switched.numel()} entries. The error is")
print(f"{off / truth.norm():.0e}, and {rest / truth.norm():.0e} without them.")

# %%
# ``float16`` does so less often, but then as much, and in deeper networks as a rule.
# Here are eight MLPs of this size, and eight with five layers:

for widths in (96, 128, 64, 10), (96, 80, 64, 48, 32, 10):
    found = {torch.float16: [], torch.bfloat16: []}
    for seed in range(8):
        torch.manual_seed(seed)
        net, images = mlp(*widths), torch.rand(24, 96)
        exact = vmap_jacrev(copy.deepcopy(net).double(), images.double())
        for dtype, off in found.items():
            J = vmap_jacrev(copy.deepcopy(net).to(dtype), images.to(dtype))
            off.append(largest_error(J, exact))
    for dtype, off in found.items():
        low, middle, high = (sorted(off)[i] for i in (0, 4, -1))
        print(f"{len(widths) - 1} layers, {dtype}: {low:.0e} to {high:.0e},")
        print(f"  every second above {middle:.0e}")

# %%
# Range of float16
# ----------------
# In ``float16`` small numbers lose digits, and then become zero. ``bfloat16`` has the
# range of ``float32``, and so has TF32. Here the outputs are in units that make them
# small. Other units, such as outputs that are multiplied by a million, mend it.

tiny = copy.deepcopy(model)
tiny[4].weight.data *= 1e-6
exact = vmap_jacrev(copy.deepcopy(tiny).double(), X.double())["0.weight"]
for dtype in (torch.float16, torch.bfloat16):
    J = under_autocast(dtype, vmap_jacrev, tiny, X)["0.weight"]
    print(f"autocast {dtype}: {(J[exact != 0] == 0).double().mean():.1%} become zero")
    assert (J == 0).sum() > (exact == 0).sum() or dtype == torch.bfloat16

# %%
# Order of sums
# -------------
# In ``float32`` the sum of ``J`` over samples and outputs and the gradient of the sum
# of ``fs`` differ, although both are right: they add the same numbers in another order.
# The bias of a convolution is a sum over all samples and pixels. A tolerance that fits
# ``J`` can call its gradient wrong.

model, X = conv_net(3, 12, 16), torch.rand(12, 3, 32, 32)
J, exact = vmap_jacrev(model, X), copy.deepcopy(model).double()
gradients = autograd.grad(model(X).sum(), (model[0].bias, model[2].bias))
sums = autograd.grad(exact(X.double()).sum(), (exact[0].bias, exact[2].bias))
for name, gradient, truth in zip(("0.bias", "2.bias"), gradients, sums):
    total = J[name].sum((0, 1))
    off = [((t - truth).norm() / truth.norm()).item() for t in (total, gradient)]
    print(f"{name}: sum of J off by {off[0]:.0e}, gradient by {off[1]:.0e},")
    print(f"  and allclose says {torch.allclose(total, gradient)}")
    assert max(off) < 1e-2

# %%
# Autocast and norm layers
# ------------------------
# ``expected scalar type Half but found Float``, or ``BFloat16``: on a CPU this comes
# from the backward pass of a norm whose input has 16 bits, in ``torch.func``. Loops,
# ``is_grads_batched`` and BackPACK, where it has a rule for the layer, do not raise it.

# fold: grads_batched and batch_grad


def grads_batched(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one batched backward pass."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)  # [N * C, N, C]
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


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


methods = {
    "vmap(jacrev)": vmap_jacrev,
    "autograd loop": autograd_loop,
    "is_grads_batched": grads_batched,
    "BackPACK": lambda model, X: batch_grad(extend(copy.deepcopy(model)), X),
}

# %%
# What each method says about three norms:


def outcome(method, model, X, exact):
    """Return the error of a Jacobian under autocast, or the text of what it raises."""
    try:
        with warnings.catch_warnings():
            # BackPACK warns of a layer without a rule, and then lacks its result
            warnings.filterwarnings("ignore", "Extension saving to grad_batch")
            J = under_autocast(torch.float16, method, model, X)
    except (RuntimeError, AttributeError) as error:
        return str(error)
    return f"error {largest_error(J, exact):.0e}"


X = torch.rand(11, 12)
for norm in (nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)):
    model = nn.Sequential(nn.Linear(12, 8), norm, nn.Linear(8, 3)).eval()
    exact = autograd_loop(copy.deepcopy(model).double(), X.double())
    results = {k: outcome(m, model, X, exact) for k, m in methods.items()}
    for name, result in results.items():
        print(f"{type(norm).__name__}, {name}: {result}")
    assert results["autograd loop"].startswith("error")

# %%
# Norms without autocast
# ----------------------
# Switch ``autocast`` off for the Jacobian, and it has the digits of ``float32`` again.
# If the model calls ``autocast`` itself, take norms like this one.


class SinglePrecisionNorm(nn.LayerNorm):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


model = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3))
wrapped = nn.Sequential(model[0], SinglePrecisionNorm(8), model[2])
exact = autograd_loop(copy.deepcopy(model).double(), X.double())
with torch.autocast(X.device.type, torch.float16):
    off = largest_error(vmap_jacrev(wrapped, X), exact)
    with torch.autocast(X.device.type, enabled=False):
        none = largest_error(vmap_jacrev(model, X), exact)
print(f"norm in float32: error {off:.0e}, autocast off: error {none:.0e}")
assert none < 1e-5 < off < 1e-2

# %%
# TF32 rounds factors to 10 bits
# ------------------------------
# NVIDIA GPUs from Ampere on can round the factors of ``float32`` products to TF32: the
# range of ``float32``, and 10 bits after the leading one, as many as ``float16``. Sums
# stay ``float32``. Rounding to ``float16`` shows on any machine what that does to a
# product.

a, b = torch.randn(64, 96).double(), torch.randn(96, 80).double()
truth, rounded = a @ b, a.half().double() @ b.half().double()
off = ((rounded - truth).norm() / truth.norm()).item()
print(f"Factors with 10 bits: the product is off by {off:.0e}")
assert 1e-5 < off < 1e-3

# %%
# Switches of TF32
# ----------------
# There are two: one for matrix products, and one for convolutions (and recurrent
# layers) of cuDNN. Here are their defaults in this release.
# ``set_float32_matmul_precision("highest")`` does not touch the second.

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
default = torch.get_float32_matmul_precision()
print(f"float32_matmul_precision = {default!r}")
print(f"cuda.matmul.allow_tf32 = {matmul.allow_tf32}")
print(f"cudnn.allow_tf32 = {cudnn.allow_tf32}")
before = cudnn.allow_tf32
torch.set_float32_matmul_precision("highest")
assert cudnn.allow_tf32 == before
print(f"After 'highest', cudnn.allow_tf32 is still {cudnn.allow_tf32}.")

# %%
# See it on your GPU
# ------------------
# The errors of the models above, for each setting: the MLP on any device, the CNN where
# there is a CUDA GPU. On some CPUs, too, the settings of matrix products change the
# result: ``"medium"`` allows ``bfloat16`` in them.

gpu = torch.cuda.is_available()


def error_here(name):
    model, X = models[name]
    if gpu:
        model, X = copy.deepcopy(model).cuda(), X.cuda()
    return largest_error(vmap_jacrev(model, X), truths[name])


for precision in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(precision)
    print(f"MLP, {precision!r}: error {error_here('MLP'):.0e}")
torch.set_float32_matmul_precision(default)
for allow in (True, False) if gpu else ():
    cudnn.allow_tf32 = allow
    print(f"CNN, cudnn.allow_tf32 = {allow}: error {error_here('CNN'):.0e}")
cudnn.allow_tf32 = before
if not gpu:
    print("No CUDA GPU: TF32 is not measured here.")

# %%
# Old and new switches
# --------------------
# Since 2.9 each operation has a switch ``fp32_precision``: ``"ieee"``, ``"tf32"``,
# ``"none"`` (that of its backend), and for CPUs ``"bf16"``. Use the old switches or the
# new ones in a program, not both. Here a new one takes TF32 from convolutions while the
# old one still allows it. This is what comes if a library then reads the old one:

try:
    cudnn.conv.fp32_precision = "ieee"
    print(f"cudnn.allow_tf32 = {cudnn.allow_tf32}")
except (AttributeError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
cudnn.allow_tf32 = before  # the new ones follow

# %%
# Dropout under vmap
# ------------------
# In training mode ``vmap`` refuses random numbers by default:
# ``called random operation while in randomness error mode``. From here on all is
# ``float64``.

N, C, H, p = 7, 5, 20, 0.4
layers = nn.Linear(12, H), nn.Tanh(), nn.Dropout(p), nn.Linear(H, C)
model, X = nn.Sequential(*layers).double(), torch.rand(N, 12, dtype=torch.float64)
params = {name: p.detach() for name, p in model.named_parameters()}


def f(params, X):
    """Return the outputs for a sample ``[D_in]`` or for a batch ``[N, D_in]``."""
    return functional_call(model, params, X)


try:
    vmap(jacrev(f), (None, 0))(params, X)
except RuntimeError as error:
    print(f"RuntimeError: {error}")
else:
    raise AssertionError("vmap draws random numbers")

# %%
# Which randomness: same, different, or eval
# ------------------------------------------
# ``"same"`` drops the same units for all samples: the Jacobian of one thinner network.
# ``"different"`` draws for each sample, as a forward pass in training mode does. After
# ``eval()`` nothing is dropped: the network that predicts, and most often the one you
# want.
#
# The block of the last weight is the hidden layer behind its mask, so we can read the
# mask from it, and give it to the loop.


class FixedDropout(nn.Module):
    def __init__(self, kept, p):
        super().__init__()
        self.register_buffer("mask", kept / (1 - p))

    def forward(self, x):
        return x * self.mask


def kept_units(J):
    """Return which hidden units count for output ``c`` of sample ``n``: [N, C, H]."""
    return J["3.weight"].diagonal(dim1=1, dim2=2).mT != 0


for randomness in ("same", "different"):
    J = vmap(jacrev(f), (None, 0), randomness=randomness)(params, X)
    kept = kept_units(J)[:, 0].to(X)
    fixed = nn.Sequential(*layers[:2], FixedDropout(kept, p), layers[3])
    assert_close(J, autograd_loop(fixed, X))
    masks = len(kept.unique(dim=0))
    assert (masks == 1) == (randomness == "same")
    print(f"{randomness}: number of masks for {N} samples: {masks}")
assert kept_units(vmap_jacrev(model.eval(), X)).all()
print("eval: no unit is dropped")
_ = model.train()

# %%
# Two methods on the same masks
# -----------------------------
# Draw the masks outside of the model, as a buffer ``[N, H]``. ``vmap`` takes a row of
# it for each sample. Then methods agree, in any order and with any ``chunk_size``.

mask = torch.bernoulli(X.new_full((N, H), 1 - p))
model = nn.Sequential(*layers[:2], FixedDropout(mask, p), layers[3])
jacobian = jacrev(lambda params, mask, x: f(params | {"2.mask": mask}, x))
truth = autograd_loop(model, X)
for size in (None, 3):
    recipe = vmap(jacobian, (None, 0, 0), chunk_size=size)
    assert_close(recipe(params, model[2].mask, X), truth)
assert_close(methods["BackPACK"](model, X), truth)
print("vmap, vmap in chunks, BackPACK and the loop agree on one set of masks.")

# %%
# A seed for two methods
# ----------------------
# The loop, ``is_grads_batched`` and BackPACK make one forward pass, so one seed gives
# them the same masks. ``vmap`` draws in its own way: with two layers of dropout, chunks
# can change the order. The numbers say whether its masks are those of the loop, here.

more = nn.Linear(H, H + 3), nn.Dropout(p), nn.Linear(H + 3, C)
model = nn.Sequential(*layers[:3], *more).double()
params = {name: p.detach() for name, p in model.named_parameters()}


def with_seed(method, *args):
    torch.manual_seed(1)
    return method(*args)


truth = with_seed(autograd_loop, model, X)
for name in ("is_grads_batched", "BackPACK"):
    assert_close(with_seed(methods[name], model, X), truth)
print("The loop, is_grads_batched and BackPACK agree.")
for size in (None, 3):
    recipe = vmap(jacrev(f), (None, 0), randomness="different", chunk_size=size)
    off = largest_error(with_seed(recipe, params, X), truth)
    print(f"vmap, chunk_size={size}: differs from the loop by {off:.0e}")

# %%
# One forward pass, one set of masks
# ----------------------------------
# Backward passes on one graph share its masks. A forward pass for each output draws
# again, and the rows of a sample are then of different networks.

model = nn.Sequential(*layers)
once = autograd_loop(model, X)
fresh = [autograd_loop(model, X)["3.weight"][:, c] for c in range(C)]
fresh = {"3.weight": torch.stack(fresh, dim=1)}
masks = [len(kept_units(J)[0].unique(dim=0)) for J in (once, fresh)]
print(f"Masks for {C} outputs of a sample: {masks[0]}, and {masks[1]} with {C} passes.")
assert masks[0] == 1 < masks[1]
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Compute Jacobians in ``float32`` without ``autocast``, and compare methods in
#   ``float64``.
# - TF32 has two switches, and ``"highest"`` leaves that of convolutions on.
# - With dropout, call ``eval()``, or fix the masks outside of the model.
#
# Next: ``trust/check_a_jacobian.py`` tells rounding from an error. The alternative:
# ``trust/silent_failures.py`` lists what is wrong beyond rounding.
