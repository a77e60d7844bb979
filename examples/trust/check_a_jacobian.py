"""
Check of a Jacobian
===================

After this page you can check any Jacobian of your own model, from any method and at any
size, with a few backward passes. The check needs no tolerance from you: it measures the
rounding of your model, and names the parameters whose block is off by more.
"""

# fold: Imports
import copy
import warnings
from contextlib import contextmanager
from itertools import pairwise, product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

threads = torch.get_num_threads()
torch.set_num_threads(1)
_ = torch.manual_seed(0)

# %%
# One gradient for all samples and outputs
# ----------------------------------------
# A Jacobian has a block ``J`` of shape ``[N, C, *p.shape]`` for each parameter ``p``.
# Take random weights ``u`` of shape ``[N, C]``. The sum of ``u[n, c] * J[n, c]`` is the
# gradient of the sum of ``u[n, c] * fs[n, c]``, whatever the model is. Autograd takes
# one backward pass for it. It needs no rules for layers, and samples may mix.

small = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
X = torch.rand(11, 5, dtype=torch.float64)
J = autograd.functional.jacobian(
    lambda weight: functional_call(small, {"0.weight": weight}, X), small[0].weight
)
fs = small(X)
u = torch.randn_like(fs)
(gradient,) = autograd.grad(fs, small[0].weight, u)
assert_close(torch.tensordot(u, J, 2), gradient)
J[:2] = J[:2].flip(0).clone()  # swap two samples
off = (torch.tensordot(u, J, 2) - gradient).norm() / gradient.norm()
print(f"The Jacobian {list(J.shape)} is right. Two samples swapped: off by {off:.0%}.")

# %%
# No tolerance fits all models
# ----------------------------
# In ``float32`` both sides are rounded, and how much depends on the model. We take
# convolutions, and a mean over the image. Jacobian and gradient of a bias are compared
# with ``float64``: the sum over all samples and pixels can lose digits that the
# Jacobian of one sample keeps. A tolerance for the Jacobian would then call it wrong.
#
# But the backward pass is linear in ``u``. With a second random ``v``, the gradients
# ``g(u)``, ``g(v)`` and ``g(u - v)`` would add up without rounding. What is left of
# ``g(u) - g(v) - g(u - v)`` *is* rounding: of this parameter, this model, this ``X``.

# %%
# The Jacobians on this page come from ``vmap(jacrev)``.

# fold: The Jacobians, and convolutional networks


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def conv_net(*widths):
    """Return convolutions of these widths, a mean over the image, and 10 outputs."""
    pairs = [[nn.Conv2d(*p, 3, padding=1), nn.ReLU()] for p in pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    return nn.Sequential(*sum(pairs, []), *head)


# %%
# All three numbers are relative to the norm of their truth in ``float64``.

model, X = conv_net(3, 12, 16).requires_grad_(False), torch.rand(16, 3, 32, 32)
model[2].bias.requires_grad_()
exact = copy.deepcopy(model).double()
u, v = torch.randn(2, 16, 10)


def g(u, model=model, X=X):
    return autograd.grad(model(X), model[2].bias, u)[0]


truth, J_truth = g(u.double(), exact, X.double()), vmap_jacrev(exact, X.double())
J_off = (vmap_jacrev(model, X)["2.bias"] - J_truth["2.bias"]).norm()
J_off /= J_truth["2.bias"].norm()
gradient_off = (g(u) - truth).norm() / truth.norm()
rounding = (g(u) - g(v) - g(u - v)).norm() / truth.norm()
print(f"The Jacobian of the bias is off by {J_off:.0e}, its gradient by")
print(f"{gradient_off:.0e}, and g(u) - g(v) - g(u - v) measures {rounding:.0e}.")
assert J_off < 1e-5 and gradient_off < 10 * rounding

# %%
# The function
# ------------
# ``check_jacobian`` measures errors in *roundings*. One rounding is what the sum of
# ``u * J`` can lose, from the norm of ``J``. If that does not explain a difference, the
# rounding of the backward pass is added, as above. If that does not either, the change
# of the gradient is added when ``X`` and the parameters change by their precision, up
# and down: a ReLU whose input is nearly zero may switch, and then the gradient of one
# sample differs by far more. More than ``LIMIT`` is an error. What is below needs no
# further measurement, so a right Jacobian prints anything from 0 to ``LIMIT``.

LIMIT = 10  # roundings: a right Jacobian is off by fewer

# %%
# It runs on copies, and puts back what a forward pass changes: lists of activations,
# buffers, parameters. It leaves out backward hooks, which change gradients and not
# ``fs``. It works inside ``torch.no_grad`` and ``inference_mode``.

# fold: The function, to copy or to download


def trainable(model):
    """Return the parameters that require a gradient, by name."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("pass the model inside, model.module")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    return params


def differentiable(params, X):
    """Return detached parameters and a copy of ``X``, both to differentiate by."""
    if not isinstance(X, torch.Tensor) or X.ndim == 0 or len(X) == 0:
        got = list(X.shape) if isinstance(X, torch.Tensor) else type(X).__name__
        raise ValueError(f"X must be a tensor [N, ...] with N > 0, but is {got}")
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return leaves, X.detach().clone().requires_grad_(X.is_floating_point())


def outputs(model, leaves, X):
    """Return ``fs = model(X)``, with copies of the buffers, or say what it is not."""
    values = {b: b.detach().clone() for b in model.buffers()}
    values |= {p: leaves[k] for k, p in model.named_parameters() if k in leaves}
    places = {  # each once: functional_call breaks a module that has two names
        f"{prefix}.{name}".lstrip("."): values[tensor]
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor in values
    }
    fs = functional_call(model, places, X.clone(), tie_weights=False)
    if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != len(X):
        got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
        raise ValueError(f"model(X) must be a tensor [N={len(X)}, C], but is {got}")
    return fs


def weighted_sum(u, block):
    """Return the sum of ``u[n, c] * J[n, c]``, and the norm of ``J``."""
    if isinstance(block, torch.Tensor):
        return torch.tensordot(u.to(block.dtype), block, 2), norm(block)
    delta, a = block
    total = torch.einsum("nc,nco->on", u.to(delta.dtype), delta) @ a.to(delta.dtype)
    return total, norm(delta.flatten(1).norm(dim=1) * a.norm(dim=1))


def norm(tensor):
    """Return the norm as a number, which float16 would not hold."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=wide).item()


def random_weights(fs, seed=0):
    """Return normal numbers like ``fs``, without the global random generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(fs.shape, generator=generator, device="cpu").to(fs)


def errors_in_roundings(model, leaves, X, fs, u, sums):
    """Return how far sums of ``u * J`` are from gradients of ``u * fs``, in roundings.

    ``sums`` maps names to the sum and the norm of ``J``. One rounding is what ``u * J``
    loses, and what the backward pass loses: it is linear in ``u``, so the gradients for
    two parts of ``u`` would add up without rounding. If that is not enough, it is also
    what the gradient changes if ``X`` and the parameters change by their precision, up
    or down, unless it is another one in each call.
    """

    def gradients(fs, leaves, X, u, names):
        inputs = [leaves[name] for name in names] + [X] * X.requires_grad
        grads = autograd.grad(fs, inputs, u, retain_graph=True, materialize_grads=True)
        return {name: g.to_dense() for name, g in zip(names, grads)}

    def nudged(tensor, amount):
        if not tensor.requires_grad:
            return tensor
        change = amount * tensor.detach() * random_weights(tensor, seed=2)
        return (tensor.detach() + change).requires_grad_()

    eps = max(torch.finfo(t.dtype).eps for t in (fs, *leaves.values()))
    truth = gradients(fs, leaves, X, u, sums)
    errors = {
        k: norm(s.reshape(truth[k].shape) - truth[k]) for k, (s, _) in sums.items()
    }
    products = product_precision(fs)
    rounding = {k: (eps * norm(u) + products) * size for k, (_, size) in sums.items()}

    def doubtful():
        return [k for k in sums if not errors[k] <= LIMIT * rounding[k]]

    if names := doubtful():
        v = random_weights(fs, seed=1)
        first = gradients(fs, leaves, X, v, names)
        second = gradients(fs, leaves, X, u - v, names)
        for name in names:
            rounding[name] += norm(truth[name] - first[name] - second[name])
    for far in 1, 8:
        names, passes = doubtful(), []
        if not names:
            break
        with torch.random.fork_rng([X.device] * X.is_cuda):
            for amount in 0, far * eps, -far * eps:
                torch.manual_seed(0)  # the same dropout for all
                moved = {k: nudged(p, amount) for k, p in leaves.items()}
                point = moved, nudged(X, amount)
                passes.append(gradients(outputs(model, *point), *point, u, names))
        for name in names:
            here, up, down = (grads[name] for grads in passes)
            if norm(here - truth[name]) <= LIMIT * rounding[name]:
                # A ReLU near zero that switches does so in one of two directions.
                off = sums[name][0].reshape(here.shape) - truth[name]
                rest = norm(off - (up + down - 2 * here))
                if rest < errors[name] / 3:
                    errors[name] = rest / 6**0.5  # the rounding of three passes
                if far == 1:
                    rounding[name] += max(norm(up - here), norm(down - here))
    return {k: error / rounding[k] if error else 0.0 for k, error in errors.items()}


def product_precision(fs):
    """Return the relative precision of products, which TF32 and bfloat16 lower."""
    eps, backends = torch.finfo(fs.dtype).eps, torch.backends
    if fs.dtype != torch.float32:
        return eps
    settings = backends.mkldnn.matmul, backends.mkldnn.conv
    if fs.is_cuda:
        settings = backends.cuda.matmul, backends.cudnn.conv
    lower = {"tf32": 2**-11, "bf16": 2**-8}
    return max(lower.get(setting.fp32_precision, eps) for setting in settings)


def check_blocks(blocks, fs, params):
    """Raise ``ValueError`` if ``blocks`` are not like the Jacobian of ``fs``."""
    got = list(blocks) if isinstance(blocks, dict) else type(blocks).__name__
    if not isinstance(blocks, dict) or set(blocks) != set(params):
        raise ValueError(f"a Jacobian is a dict of {list(params)}, but this is {got}")
    for name, p in params.items():
        block = blocks[name]
        wanted = f"{list(fs.shape + p.shape)}, {p.dtype}, {p.device}"
        got = f"{list(block.shape)}, {block.dtype}, {block.device}"
        if got != wanted:
            raise ValueError(f"the block of {name} must be {wanted}, but is {got}")


@contextmanager
def unchanged(model):
    """Ignore warnings, and put back what a call of the model changes."""
    values = [v for m in model.modules() for v in (vars(m), *vars(m).values())]
    containers = [(v, v.copy()) for v in values if isinstance(v, (dict, list, set))]
    tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    try:
        with warnings.catch_warnings(action="ignore"):
            # A reentrant checkpoint would hide its parameters from the gradient.
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            for module in model.modules():
                module._backward_hooks.clear()  # they could change the gradient
                module._backward_pre_hooks.clear()
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                    module.sparse = False  # vmap takes no sparse gradient
            yield
    finally:
        for now, before in containers:
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)
        for now, before in tensors:
            if not torch.equal(now, before):
                now.data.copy_(before)


@torch.inference_mode(False)
@torch.enable_grad()
def check_jacobian(model, X, jacobian, seed=0):
    """Compare a Jacobian of ``fs = model(X)``, ``[N, C]``, with gradients of ``fs``.

    ``jacobian`` is ``{name: [N, C, *p.shape]}`` for the parameters that require a
    gradient. Returns ``{name: error}`` in roundings of this model on this ``X``. Raises
    ``AssertionError`` with the errors of the parameters that have more than ``LIMIT``,
    and ``ValueError`` for other names, shapes, types or devices, and if ``model(X)`` is
    not finite. ``seed`` is for the random weights. Model and ``X`` stay as they are.
    """
    params = trainable(model)
    with unchanged(model):
        leaves, X = differentiable(params, X)
        fs = outputs(model, leaves, X)
        if not fs.isfinite().all():
            raise ValueError("model(X) is not finite")
        check_blocks(jacobian, fs, params)
        u = random_weights(fs, seed)
        sums = {name: weighted_sum(u, jacobian[name].detach()) for name in params}
        errors = errors_in_roundings(model, leaves, X, fs, u, sums)
    if wrong := [f"{k} {e:.2g}" for k, e in errors.items() if not e <= LIMIT]:
        raise AssertionError(f"wrong Jacobian, errors in roundings: {', '.join(wrong)}")
    return errors


# %%
# Your own model
# --------------
# Download ``check_jacobian.py``: ``from check_jacobian import LIMIT, check_jacobian``.
# Put in your model, your ``X`` of shape ``[N, ...]``, and your Jacobian as ``{name: [N,
# C, *p.shape]}`` for the parameters that require a gradient. An error is counted in
# roundings of your dtype, and up to ten pass. A model with random numbers has to be in
# ``eval()``. A model with a mask or other inputs: pass a module that holds these and
# calls yours, and put its name for your model before the names of ``J``.

model, X = mlp(12, 20, 8, 4), torch.rand(16, 12)
J = vmap_jacrev(model, X)
errors = check_jacobian(model, X, J)
for name, error in errors.items():
    print(f"{name}: {error:.1f} roundings")
assert max(errors.values()) < LIMIT

# %%
# A flat Jacobian ``[N, C, P]`` becomes such a dictionary, if its columns are in the
# order of ``named_parameters``, without those of frozen parameters. If nearly all are
# wrong, the order is another one, or the model was in another mode.

flat = torch.cat([block.flatten(2) for block in J.values()], 2)  # yours
params = {k: p for k, p in model.named_parameters() if p.requires_grad}
parts = flat.split([p.numel() for p in params.values()], 2)
J = {k: b.reshape(*b.shape[:2], *p.shape) for (k, p), b in zip(params.items(), parts)}
assert max(check_jacobian(model, X, J).values()) < LIMIT

# %%
# A wrong block raises, with its name and its error. Here it lacks one percent.

try:
    check_jacobian(model, X, J | {"2.bias": 0.99 * J["2.bias"]})
    raise RuntimeError("the wrong Jacobian passes")
except AssertionError as error:
    assert "2.bias" in str(error)
    print(f"AssertionError: {error}")

# %%
# What it catches
# ---------------
# The figure has six models of ``float32`` in sizes of practice, a right Jacobian of
# each, and four wrong ones. Each wrong one differs in one block, that of the first
# parameter or of its bias: two samples swapped, 1 % off, the bias zero, 36 % off.
# Between right and wrong there is room, with ``LIMIT`` in it.
#
# Two models are hard for a fixed tolerance. Layer norm on inputs of mean 2000 rounds so
# much that a right Jacobian looks wrong. Behind eight sigmoids the first block is so
# small that a wrong one looks right, if you compare with the whole.

# fold: The models


class ResidualPart(nn.Module):
    def __init__(self, width):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        norms = [nn.BatchNorm2d(width) for _ in range(2)]
        self.body = nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])

    def forward(self, X):
        return torch.relu(X + self.body(X))


def attention(D, tokens):
    """Return a transformer layer on pixels in groups, with 10 outputs."""
    layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True)
    embed = nn.Unflatten(1, (tokens, -1)), nn.Linear(768 // tokens, D)
    return nn.Sequential(*embed, layer, nn.Flatten(), nn.Linear(tokens * D, 10))


sigmoids = mlp(*[20] * 9, 4)
for place in range(1, len(sigmoids), 2):
    sigmoids[place] = nn.Sigmoid()
resnet = conv_net(3, 12).insert(2, ResidualPart(12))
models = {
    "MLP": (mlp(256, 128, 64, 10), torch.rand(32, 256)),
    "CNN, 32 px": (conv_net(3, 12, 16), torch.rand(8, 3, 32, 32)),
    "ResNet, eval": (resnet.eval(), torch.rand(8, 3, 24, 24)),
    "Transformer": (attention(32, 16), torch.rand(8, 768)),
    "LayerNorm, mean 2000": (
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10)),
        torch.randn(32, 64) + 2000,
    ),
    "8 sigmoids": (sigmoids, torch.rand(32, 20)),
}

# %%
# ``error_of`` returns the largest error, whether the check passes or raises.

# fold: How the errors are collected


def error_of(model, X, jacobian):
    """Return the largest error in roundings of a Jacobian, right or wrong."""
    try:
        return max(check_jacobian(model, X, jacobian).values())
    except AssertionError as error:
        return float(str(error).split()[-1])  # of the only wrong block


def corrupted(jacobian):
    """Yield a name, and a Jacobian with one wrong block."""
    first = next(iter(jacobian))
    bias = next(name for name in jacobian if name.endswith("bias"))
    J = jacobian[first]
    yield "two samples swapped", {first: torch.cat([J[:2].flip(0), J[2:]])}
    yield "1 % off", {first: 1.01 * J}
    yield "36 % off", {first: 0.64 * J}
    yield "a bias zero", {bias: torch.zeros_like(jacobian[bias])}


with warnings.catch_warnings():
    # vmap runs attention sample by sample: slower, and as right
    warnings.filterwarnings("ignore", "There is a performance drop")
    jacobians = {name: vmap_jacrev(*case) for name, case in models.items()}
right, wrong = {}, {}
for name, (model, X) in models.items():
    right[name] = error_of(model, X, jacobians[name])
    for kind, block in corrupted(jacobians[name]):
        wrong.setdefault(kind, []).append(error_of(model, X, jacobians[name] | block))
smallest = min(min(errors) for errors in wrong.values())
assert max(right.values()) < LIMIT < smallest
print(f"Right Jacobians: at most {max(right.values()):.1f} roundings. {LIMIT = }.")
print(f"Wrong Jacobians: at least {smallest:.0f} roundings.")

# %%
# The axis counts roundings.

# fold: The figure

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
colors, names = ("#E69F00", "#56B4E9", "#CC79A7", "#D55E00"), list(right)
ax.scatter(right.values(), names, s=120, color="#009E73", label="right")
for (kind, errors), color, mark in zip(wrong.items(), colors, "sD^v"):
    ax.scatter(errors, names, s=80, marker=mark, color=color, label=kind)
_ = ax.axvline(LIMIT, color="black", linestyle="--", label="LIMIT")
ax.set(xscale="log", xlabel="error in roundings", ylim=(len(right) - 0.5, -0.5))
ax.xaxis.set_major_formatter("{x:g}")
largest = max(right.values())
fig.suptitle(f"Right: at most {largest:.1f} roundings.\nWrong: {smallest:.0f} and more")
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# What it refuses
# ---------------
# A model with ``checkpoint(use_reentrant=True)`` hides its parameters from
# ``autograd.grad``: a Jacobian of zeros would pass. The check raises instead, and so it
# does for a ``model(X)`` that is not finite, and for other names, shapes and types.


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, X):
        return self.last(checkpoint(self.first, X, use_reentrant=True))


model, X = mlp(12, 20, 8, 4), torch.rand(16, 12)
J = vmap_jacrev(model, X)
zeros = {k: p.new_zeros(16, 4, *p.shape) for k, p in Reentrant().named_parameters()}
for arguments in (
    (Reentrant(), X, zeros),
    (model, X / 0, J),
    (model, X, J | {"0.bias": J["0.bias"].mT}),
):
    try:
        check_jacobian(*arguments)
    except (RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError("a bad argument passes")

# %%
# What it cannot see
# ------------------
# - What autograd leaves out, the check leaves out. The row ``padding_idx`` of an
#   embedding changes the outputs, but its gradient is zero by convention.
# - If samples mix, as in batch norm in training, the true Jacobian passes. It is that
#   of this batch, and not of one sample.
# - With random numbers, such as dropout in training, or a count of its calls, each
#   forward pass is another function, and a right Jacobian of one is wrong for the next.
#   Take ``eval()``.
# - The third rounding is that of a model that is continuous. Behind a jump, such as a
#   parameter that is rounded to an integer, wrong blocks can pass.
# - A small part of a block hides below the rounding of the whole: one column that is
#   1 % off, or one filter of one sample. In ``float32``, check the same method in
#   ``float64``, too. In ``bfloat16`` and ``float16`` whole blocks can hide.

wide, X_wide = copy.deepcopy(models["MLP"])
found = {}
for dtype in torch.float32, torch.float64:
    wide, X_wide = wide.to(dtype), X_wide.to(dtype)
    J = vmap_jacrev(wide, X_wide)
    J["2.weight"][:, :, 0, 42] *= 1.01  # one column
    found[dtype] = error_of(wide, X_wide, J)
    print(f"{dtype}: one column 1 % off is {found[dtype]:.2g} roundings. {LIMIT = }.")
assert found[torch.float32] < LIMIT < found[torch.float64]

# %%
# And it can take a right Jacobian for a wrong one: in ``float32`` a ReLU whose input is
# nearly zero may be on for one method, and off for another. In a deep network with many
# ReLUs that happens now and then. Again, ``float64`` tells.

# fold: The reference, with samples that mix


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
# The first three, one cell each.

words = torch.randint(4, (16, 3))
embedding = nn.Embedding(4, 5, padding_idx=0)
model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(15, 4))
J, before = autograd_loop(model, words), model(words)
check_jacobian(model, words, J)
with torch.no_grad():
    embedding.weight[0] += 1
change = (model(words) - before).norm()
assert change > 1 and not J["0.weight"][..., 0, :].any()
print(f"padding_idx: Jacobian 0, but the outputs change by {change:.1f}")

# %%
# Batch norm in training mode:

model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
errors = check_jacobian(model, X, autograd_loop(model, X))
print(f"Samples mix: the true Jacobian passes, {max(errors.values()):.1f} roundings")

# %%
# Dropout in training mode:

model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 4))
try:
    check_jacobian(model, X, autograd_loop(model, X))
    raise RuntimeError("dropout passes")
except AssertionError:
    print("Dropout in training: the check raises")
_ = check_jacobian(model.eval(), X, autograd_loop(model, X))

# %%
# The largest relative error of a block that passes, within a factor of two. In early
# layers of a deep network roundings are larger:

for dtype in (torch.float64, torch.float32, torch.bfloat16):
    model, data = mlp(12, 20, 8, 4).to(dtype), X.to(dtype)
    J = autograd_loop(model, data)
    off = 64.0
    while error_of(model, data, J | {"2.bias": (1 + off) * J["2.bias"]}) > LIMIT:
        off /= 2
    print(f"{dtype}: a block that is off by {off:.0e} passes")

# %%
# Precision of products
# ---------------------
# ``torch.set_float32_matmul_precision`` lets ``float32`` products lose digits where the
# hardware is faster for it: to TF32 on a GPU, to ``bfloat16`` on some CPUs. A right
# Jacobian then holds fewer digits, so the check takes its rounding from this setting.
# Convolutions on a GPU have one of their own, and it allows TF32 by default:
# ``torch.backends.cudnn.allow_tf32``.

model, X = mlp(96, 128, 64, 10), torch.rand(32, 96)
default = torch.get_float32_matmul_precision()
for precision in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(precision)
    error = max(check_jacobian(model, X, vmap_jacrev(model, X)).values())
    one = product_precision(model(X))
    print(f"{precision}: {error:.2f} roundings, where products round to {one:.0e}")
torch.set_float32_matmul_precision(default)

# %%
# Cost
# ----
# A check of a right Jacobian takes one forward and one backward pass, and reads ``J``
# twice: for the sum and for its norm. Where gradients round much, up to four more
# backward passes follow. We print what computing ``J`` takes beside it.

# fold: How the time is measured


def median_ms(function, *args):
    timer = Timer("function(*args)", globals={"function": function, "args": args})
    return timer.blocked_autorange(min_run_time=0.1).median * 1e3


for name in ("MLP", "CNN, 32 px", "Transformer"):
    case = *models[name], jacobians[name]
    with warnings.catch_warnings(action="ignore"):
        both = median_ms(vmap_jacrev, *case[:2]), median_ms(check_jacobian, *case)
    print(f"{name}: vmap(jacrev) {both[0]:.0f} ms, check_jacobian {both[1]:.0f} ms")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Check a Jacobian once for each new model, on a batch of the size that you use: it
#   takes a few backward passes.
# - The error counts roundings, so there is no tolerance to choose.
# - It shows that a Jacobian agrees with autograd. What autograd leaves out, it leaves
#   out.
#
# Next: ``trust/silent_failures.py`` lists where methods are wrong without an error. The
# alternative: ``trust/layer_support.py`` says which method is right for which layer.

# sphinx_gallery_parallel = False
