r"""
Jacobians with torch.func
=========================

After this page you can compute the Jacobian of a network's outputs with respect to its
parameters, for a whole batch, with the functions that PyTorch has: by a recipe of six
lines, or by a function to copy that takes buffers and several inputs. You see what
other methods cost, how to get other derivatives, and which layers fail.
"""

# fold: Imports
import copy
import warnings
from contextlib import contextmanager
from itertools import product

import matplotlib.pyplot as plt
import torch
from backpack import extend
from torch import autograd, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, jacfwd, jacrev, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)
N, D_in, D_hidden, C = 6, 5, 4, 3
X = torch.randn(N, D_in)
model = nn.Sequential(nn.Linear(D_in, D_hidden), nn.ReLU(), nn.Linear(D_hidden, C))

# %%
# The recipe: functional_call, jacrev, vmap
# -----------------------------------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``. The Jacobian of a parameter ``p``
# has shape ``[N, C, *p.shape]``: it holds the gradient of every ``fs[n, c]``.
#
# ``functional_call`` makes the module a function of its parameters. ``jacrev``
# differentiates the ``C`` outputs of one sample. ``vmap`` does so for all samples:
# ``(None, 0)`` shares the parameters and splits ``X`` along its first axis. The model
# sees each sample as a batch of one, ``x[None]``.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


J = vmap_jacrev(model, X)
for name, block in J.items():
    print(f"The Jacobian of {name} has shape {list(block.shape)}.")

# %%
# The check: a loop over samples and outputs
# ------------------------------------------
# The loop calls ``autograd.grad`` for each entry of ``fs``. It takes outputs of any
# shape, and it is the reference for every result on this page.


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


J_loop = autograd_loop(model, X)
assert_close(J, J_loop)
print("vmap(jacrev) agrees with the loop, for every parameter.")

# %%
# A function to copy
# ------------------
# ``jacobians`` adds what other models need: several inputs, errors that say what is
# wrong, and a model that stays as it is. A forward pass may assign buffers and
# attributes, and under ``vmap`` these would be tensors that nobody can use afterwards:
# ``unchanged`` puts back what was there. Inside ``torch.no_grad`` the recipe can be
# wrong, so gradients are switched on (see ``trust/silent_failures.py``).

# fold: unchanged


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


# %%
# Backward hooks can change a gradient, and are no part of the outputs: they are left
# out.


@torch.inference_mode(False)
@torch.enable_grad()
def jacobians(model, *inputs):
    """Return the Jacobian of ``fs = model(*inputs)`` for the parameters of ``model``.

    ``inputs`` are tensors ``[N, ...]``. The model returns ``[N, C]`` and treats each
    sample alone. The result is ``{name: [N, C, *p.shape]}``, for the parameters that
    require a gradient. The model stays as it is. Raises ``ValueError`` if no parameter
    requires a gradient, or if the output is not a tensor ``[N, C]``.
    """
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")

    def f(params, *sample):
        fs = functional_call(model, params, tuple(x[None] for x in sample))
        if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != 1:
            got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
            raise ValueError(f"for one sample the output must be [1, C], but is {got}")
        return fs[0]

    in_dims = (None,) + (0,) * len(inputs)
    with unchanged(model):
        return vmap(jacrev(f), in_dims)(params, *(x.detach().clone() for x in inputs))


# %%
# A model with two inputs, which writes to itself:


class Pair(nn.Linear):
    """Two inputs, and a forward pass that assigns a buffer and an attribute."""

    def forward(self, x, z):
        self.largest, self.kept = x.max(), z
        return super().forward(torch.cat([x, z], dim=1))


pair, Z = Pair(D_in + 2, C), torch.rand(N, 2)
pair.register_buffer("largest", torch.zeros(()))
J = jacobians(pair, X, Z)
assert pair.largest == 0 and not hasattr(pair, "kept")
joined = nn.Linear(D_in + 2, C)
_ = joined.load_state_dict({"weight": pair.weight, "bias": pair.bias})
assert_close(J, autograd_loop(joined, torch.cat([X, Z], dim=1)))
print("Two inputs agree with the loop, and the model is the same as before.")

# %%
# In eval mode, batch norm reads its buffers and treats each sample alone. A frozen
# parameter has no entry in the result.

norm = nn.Sequential(
    nn.Linear(D_in, D_hidden), nn.BatchNorm1d(D_hidden), nn.Linear(D_hidden, C)
)
_ = norm(X)  # one step of the running averages
norm.eval()[0].bias.requires_grad_(False)
J = jacobians(norm, X)
assert_close(J, autograd_loop(norm, X))
print(f"Batch norm in eval mode agrees with the loop: {', '.join(J)}.")

# %%
# The whole batch at once: jacrev, autograd.grad, jacobian
# --------------------------------------------------------
# Three more methods take the ``N * C`` entries of ``fs`` together. ``jacrev`` runs over
# the whole batch. ``autograd.grad`` starts from a cotangent: a weight for each output,
# of shape ``[N, C]``. With ``is_grads_batched=True`` it takes a stack of them, here
# ``E`` of shape ``[N * C, N, C]`` with one for each entry. ``functional.jacobian``
# takes a tuple of parameters and loops over the entries.

params = {name: p.detach() for name, p in model.named_parameters()}


def f(params, X):
    """Return the outputs for a sample ``[D_in]`` or for a batch ``[N, D_in]``."""
    return functional_call(model, params, X)


def from_values(*values):
    return f(dict(zip(params, values)), X)


def grads_batched(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one batched backward pass."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)  # [N * C, N, C]
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


assert_close(jacrev(f)(params, X), J_loop)
assert_close(grads_batched(model, X), J_loop)
assert_close(jacobian(from_values, tuple(params.values())), tuple(J_loop.values()))
print("jacrev over the batch, is_grads_batched, functional.jacobian: all agree.")

# %%
# The cost: N times more for the whole batch
# ------------------------------------------
# The three methods push ``N * C`` cotangents through the whole batch, stacked or one by
# one. ``vmap(jacrev)`` pushes ``C`` cotangents through each sample. We count the
# floating-point operations (FLOPs) in matrix products, less those of the forward pass.


def flops(function, *args):
    """Return the number of floating-point operations in matrix products."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


forward = flops(model, X)
least = flops(vmap_jacrev, model, X) - forward
for name, total in {
    "jacrev over the batch": flops(jacrev(f), params, X),
    "is_grads_batched": flops(grads_batched, model, X),
    "functional.jacobian": flops(jacobian, from_values, tuple(params.values())),
}.items():
    assert total - forward == N * least
    print(f"{name}: {(total - forward) / least:g} times the FLOPs of vmap(jacrev)")

# %%
# The picture shows the cotangents that reach the ReLU: the Jacobian with respect to its
# output ``phi`` of shape ``[N, D_hidden]``. Each row belongs to one ``fs[n, c]``. This
# output does not depend on the other samples, so over the whole batch its row is zero
# outside the columns of sample ``n``. ``vmap(jacrev)`` computes these columns only.

phi = model[:-1](X).detach()
whole, single = jacrev(model[-1])(phi), vmap(jacrev(model[-1]))(phi)
assert_close(torch.einsum("ncnd->ncd", whole), single)
print(f"Cotangents: {list(whole.shape)} for the batch, {list(single.shape)} with vmap.")

# %%
# Nonzero entries are yellow.

# fold: How the picture is drawn
fig, axes = plt.subplots(
    1, 2, figsize=(5, 3.2), sharey=True, layout="constrained", width_ratios=[4, 1]
)
for ax, cotangents in zip(axes, (whole, single)):
    nonzero = (cotangents != 0).reshape(N * C, -1)
    ax.imshow(nonzero.numpy(), cmap="cividis", aspect="auto", vmin=0, vmax=1)
zeros = (whole == 0).double().mean().item()
fig.suptitle(f"Cotangents at the ReLU:\n{zeros:.0%} of the batch's are zero")
axes[0].set_title("whole batch", loc="left")
axes[0].set(xlabel="sample and hidden unit (index)", ylabel="sample and output (index)")
axes[1].set_title("vmap", loc="left")
axes[1].set(xlabel="unit", xticks=[0, D_hidden - 1])
plt.show()

# %%
# Zeros from a closure over the parameters
# ----------------------------------------
# A function that ignores its arguments and calls ``model(X)`` looks constant to
# ``jacobian``. It returns zeros and no error, and so does ``jacrev``. The fix is
# ``functional_call``, as in ``f``. With ``strict=True``, ``jacobian`` raises.


def show_error(kind, function, *args, **options):
    """Print the error that a call raises, or fail if it raises none of this kind."""
    try:
        function(*args, **options)
    except kind as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return
    raise LookupError(f"no {kind.__name__} any more: correct this section")


def closure(*values):
    return model(X)


zeros = jacobian(closure, tuple(params.values()))
zeros += jacrev(closure, argnums=(0, 1, 2, 3))(*params.values())
print(f"Nonzero entries: {sum(block.count_nonzero().item() for block in zeros)}.")
show_error(RuntimeError, jacobian, closure, tuple(params.values()), strict=True)

# %%
# Forward mode: jacfwd
# --------------------
# ``jacfwd`` pushes one tangent forward for each parameter entry, ``jacrev`` one
# cotangent back for each output. So ``jacfwd`` costs less where there are fewer entries
# than outputs, as for one factor on the inputs. The FLOPs are multiples of those of a
# forward pass.

# The first jacfwd of a process uses torch.jit inside PyTorch, which is deprecated.
warnings.filterwarnings("ignore", ".*torch.jit.script")


def scaled(scale, x):
    return model(scale * x)


P = sum(p.numel() for p in params.values())
cases = {"1 entry": (scaled, torch.ones(())), f"{P} entries": (f, params)}
for case, (function, value) in cases.items():
    by_jacfwd = vmap(jacfwd(function), (None, 0))
    by_jacrev = vmap(jacrev(function), (None, 0))
    assert_close(by_jacfwd(value, X), by_jacrev(value, X))
    ratios = [flops(method, value, X) / forward for method in (by_jacfwd, by_jacrev)]
    print(f"{case}: jacfwd {ratios[0]:.1f}, jacrev {ratios[1]:.1f} forward passes")

# %%
# Some of the parameters, or the last layer
# -----------------------------------------
# Pass all parameters, detached, and differentiate by some. What you leave out,
# ``functional_call`` takes from the module, and ``J`` keeps its graph, and its memory.
# The last layer alone needs no differentiation at all: with its inputs ``phi`` from
# above, its Jacobian is an outer product with the identity :math:`\delta`. With many
# classes nearly all of it is zero and it fits nowhere: keep ``phi``, as
# ``use/classifier_confidence.py`` does in its last section.
#
# .. math::
#
#    \frac{\partial f_{nc}}{\partial W_{oi}} = \delta_{co} \, \phi_{ni}, \qquad
#    \frac{\partial f_{nc}}{\partial b_o} = \delta_{co}.

last = {name: params[name] for name in ("2.weight", "2.bias")}
J_last = vmap(jacrev(lambda last, x: f(params | last, x)), (None, 0))(last, X)
assert_close(J_last, {name: J_loop[name] for name in last})
assert not J_last["2.weight"].requires_grad
eye = torch.eye(C)
closed = {"2.weight": torch.einsum("co,ni->ncoi", eye, phi)}
closed["2.bias"] = eye.expand(N, C, C)
assert_close(closed, J_last)
print("The last layer agrees, and so does the outer product.")

# %%
# Inputs instead of parameters
# ----------------------------
# The Jacobian of the inputs has shape ``[N, C, D_in]``. ``jacobian(model, X)`` returns
# ``[N, C, N, D_in]``, zero between different samples: take its diagonal.
#
# An input row belongs to one sample. So the Jacobian of ``fs`` summed over the batch,
# ``[C, N, D_in]``, holds the same numbers. Parameters belong to all samples: with them,
# this trick returns the sum of the Jacobians, and the sample axis is lost.

J_X = vmap(jacrev(f, 1), (None, 0))(params, X)  # by x; of X.detach(), if it has a graph
full = jacobian(model, X)
leaf = nn.Parameter(X)
fs = model(leaf)
rows = [
    autograd.grad(fs[n, c], leaf, retain_graph=True)[0]
    for n, c in product(range(N), range(C))
]
assert_close(full, torch.stack(rows).unflatten(0, (N, C)))
assert_close(torch.einsum("ncnd->ncd", full), J_X)
print(f"jacobian(model, X): {list(full.shape)}, its diagonal: {list(J_X.shape)}.")

by_X, by_params = jacrev(lambda X, params: f(params, X).sum(0), (0, 1))(X, params)
assert_close(by_X.movedim(0, 1), J_X)
assert_close(by_params, {name: block.sum(0) for name, block in J_loop.items()})
print("The Jacobian of the sum agrees by X, and has no samples by the parameters.")

# %%
# A gradient through the Jacobian
# -------------------------------
# Parameters that are not detached leave a graph in the Jacobian. So you can penalize
# its squared norm in a loss. We compare with a loop that has ``create_graph=True``. The
# Jacobian does not depend on the last bias: ``materialize_grads=True`` gives zeros
# there instead of an error.

weights = dict(model.named_parameters())


def gradient_of_squares(tensors):
    penalty = sum(tensor.square().sum() for tensor in tensors)
    return autograd.grad(penalty, tuple(weights.values()), materialize_grads=True)


fs, rows = model(X), []
for place in product(range(N), range(C)):
    rows += autograd.grad(fs[place], tuple(weights.values()), create_graph=True)
J = vmap(jacrev(f), (None, 0))(weights, X)
assert_close(gradient_of_squares(J.values()), gradient_of_squares(rows))
print("The gradient of the squared norm agrees with the loop, for every parameter.")

# %%
# Outputs that are not [N, C]
# ---------------------------
# ``jacobians`` raises for other outputs. Add a last layer that makes them ``[N, C]``:
# ``Unflatten`` for one number per sample, ``Flatten`` for sequences and images. The
# names get the prefix ``0.``. To bring a block of the Jacobian back, ``reshape`` it to
# ``[*fs.shape, *p.shape]``.

one = nn.Sequential(nn.Linear(D_in, 1), nn.Flatten(0))
cases = {
    "[N]": (one, X, nn.Unflatten(0, (-1, 1))),
    "[N, T, C]": (model, torch.rand(N, 2, D_in), nn.Flatten()),
    "[N, C, H, W]": (nn.Conv2d(1, 2, 3), torch.rand(N, 1, 5, 6), nn.Flatten()),
}
for shape, (net, X_net, last_layer) in cases.items():
    flat = jacobians(nn.Sequential(net, last_layer), X_net)
    for name, expected in autograd_loop(net, X_net).items():
        assert_close(flat[f"0.{name}"].reshape(expected.shape), expected)
    print(f"Outputs {shape} = {list(net(X_net).shape)} agree with the loop.")
show_error(ValueError, jacobians, net, X_net)

# %%
# Models extended with BackPACK
# -----------------------------
# ``extend`` adds backward hooks that ``torch.func`` cannot transform, and a copy of an
# extended model has them too. Copy the model before you extend it, or take
# ``jacobians``, which leaves the hooks out.

extended = extend(copy.deepcopy(model))
show_error(RuntimeError, vmap_jacrev, extended, X)
assert_close(jacobians(extended, X), J_loop)
print("jacobians agrees with the loop, for the extended model, too.")

# %%
# Known failures
# --------------
# ``nn.GRU``, ``nn.RNN`` and, in double precision, ``nn.LSTM`` raise under ``vmap``. In
# single precision on a CPU, PyTorch has another kernel for ``nn.LSTM``, which may work:
# we print what this release does, and check the numbers if it does. Batch norm in
# training mode raises when it updates its buffers.


class Last(nn.Module):
    """The last hidden state of a recurrent layer, for ``[N, T, D_in]``."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer(D_in, C, batch_first=True)

    def forward(self, X):
        return self.layer(X)[0][:, -1]


def compare(net, X):
    assert_close(jacobians(net, X), autograd_loop(net, X))


X_time = torch.rand(N, 2, D_in)
for layer in nn.GRU, nn.RNN, nn.LSTM:
    print(f"{layer.__name__}, float64: ", end="")
    show_error(RuntimeError, compare, Last(layer), X_time)
print("Batch norm: ", end="")
show_error(RuntimeError, jacobians, norm.train(), X)

try:
    compare(Last(nn.LSTM).float(), X_time.float())
    verdict = "agrees with the loop"
except RuntimeError as error:
    verdict = f"RuntimeError: {str(error).splitlines()[0]}"
print(f"LSTM, float32, torch {torch.__version__}, {X.device}: {verdict}")

# %%
# ``PReLU`` raises too, but with ``N == C`` it gives wrong numbers and no error: only
# the comparison with the loop fails. The same holds for a layer that mixes samples,
# such as a softmax over the batch.

prelu = nn.Sequential(nn.Linear(D_in, C), nn.PReLU())
mixing = nn.Sequential(nn.Linear(D_in, C), nn.Softmax(dim=0))
print("PReLU: ", end="")
show_error(RuntimeError, compare, prelu, X)
print("PReLU with N == C: ", end="")
show_error(AssertionError, compare, prelu, X[:C])
print("Softmax over the batch: ", end="")
show_error(AssertionError, compare, mixing, X)

# %%
# What to take home
# -----------------
# - ``vmap(jacrev)`` does ``N`` times less work than the methods over the whole batch.
# - Copy ``vmap_jacrev`` for a plain model, ``jacobians`` for buffers or several inputs.
# - Compare with the loop once, on a few samples: not every failure is an error.
#
# Next: ``compute/choosing_a_method.py`` measures every method on the same work. The
# alternative: ``batched_jacobians.py`` computes this Jacobian with BackPACK.
