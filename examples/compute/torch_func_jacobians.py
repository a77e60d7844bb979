"""
Jacobians with torch.func
=========================

Compute the Jacobian of a network's outputs with respect to its parameters, for a whole
batch, with the functions that PyTorch has. You copy one function, you see what the
other methods cost, and you bring models with buffers, several inputs or other output
shapes into its form.
"""

import copy
import itertools
import warnings

import matplotlib.pyplot as plt
import torch
from backpack import extend
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, jacfwd, jacrev, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)
N, D_in, D_hidden, C = 15, 10, 7, 5
X = torch.rand(N, D_in)
model = nn.Sequential(nn.Linear(D_in, D_hidden), nn.ReLU(), nn.Linear(D_hidden, C))

# %%
# The recipe: functional_call, jacrev, vmap
# -----------------------------------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``. The Jacobian of a parameter has
# shape ``[N, C, *param.shape]``: it holds the gradient of every ``fs[n, c]``.
#
# ``functional_call`` makes the module a function of its parameters. ``jacrev``
# differentiates the ``C`` outputs of one sample. ``vmap`` does so for all samples:
# ``in_dims=(None, 0)`` shares the parameters and splits ``X`` along its first axis.


def f(params, x):
    """Return the outputs for a sample ``[D_in]`` or for a batch ``[N, D_in]``."""
    return functional_call(model, params, (x,))


params = {name: p.detach() for name, p in model.named_parameters()}
recipe = vmap(jacrev(f), in_dims=(None, 0))
J = recipe(params, X)
for name, block in J.items():
    print(f"The Jacobian of {name} has shape {list(block.shape)}.")

# %%
# The check: a loop over samples and outputs
# ------------------------------------------
# The loop calls ``autograd.grad`` for each ``fs[n, c]``. It takes outputs of any shape,
# and it is the reference for every result on this page.


def loop(model, *inputs, create_graph=False):
    """Return ``{name: [*fs.shape, *param.shape]}`` for ``fs = model(*inputs)``."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "create_graph": create_graph}
    fs, values = model(*inputs), tuple(params.values())
    places = itertools.product(*map(range, fs.shape))
    rows = [torch.autograd.grad(fs[place], values, **options) for place in places]
    columns = zip(*rows)
    blocks = [torch.stack(column).unflatten(0, fs.shape) for column in columns]
    return dict(zip(params, blocks))


J_loop = loop(model, X)
assert_close(J, J_loop)
print("vmap(jacrev) agrees with the loop, for every parameter.")

# %%
# A function to copy
# ------------------
# ``jacobians`` adds what other models need. It skips frozen parameters. It passes the
# buffers too, so a forward pass that assigns one does not change the module. It gives
# each sample a batch axis of length one, for layers such as ``Flatten``. It detaches
# parameters and inputs, or the result would carry a graph back to them. Inside
# ``torch.no_grad`` the recipe can be wrong: see ``trust/silent_failures.py``.


@torch.enable_grad()
def jacobians(model, *inputs):
    """Return the Jacobian of ``fs = model(*inputs)`` for the parameters of ``model``.

    ``inputs`` are tensors ``[N, ...]``. The model returns ``[N, C]`` and treats each
    sample alone. The result is ``{name: [N, C, *param.shape]}``, for the parameters
    that require a gradient. The model stays as it is. Raises ``ValueError`` if no
    parameter requires a gradient, or if the output is not a tensor ``[N, C]``.
    """
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    buffers, inputs = dict(model.named_buffers()), [x.detach() for x in inputs]

    def outputs(params, *sample):
        batch_of_one = tuple(x.unsqueeze(0) for x in sample)
        fs = functional_call(model, (params, buffers), batch_of_one)
        if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != 1:
            got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
            raise ValueError(f"for one sample the output must be [1, C], but is {got}")
        return fs.squeeze(0)

    return vmap(jacrev(outputs), (None,) + (0,) * len(inputs))(params, *inputs)


J = jacobians(model, X)
assert_close(J, J_loop)
assert not any(block.requires_grad for block in J.values())
print("jacobians(model, X) agrees with the loop, and carries no graph.")

# %%
# The whole batch at once: jacrev, autograd.grad, jacobian
# --------------------------------------------------------
# Three more methods take the ``N * C`` entries of ``fs`` together. ``jacrev`` runs over
# the whole batch. ``autograd.grad`` starts from a cotangent: a weight for each output,
# of shape ``[N, C]``. With ``is_grads_batched=True`` it takes a stack of them, here
# ``E`` of shape ``[N * C, N, C]`` with one for each entry. ``functional.jacobian``
# takes a tuple of parameters and loops over the entries.


def grads_batched():
    E = torch.eye(N * C).reshape(N * C, N, C)
    weights = tuple(model.parameters())
    grads = torch.autograd.grad(model(X), weights, E, is_grads_batched=True)
    return [grad.unflatten(0, (N, C)) for grad in grads]


def from_values(*values):
    return f(dict(zip(params, values)), X)


values = tuple(params.values())
methods = {
    "jacrev over the batch": lambda: jacrev(f)(params, X).values(),
    "is_grads_batched": grads_batched,
    "functional.jacobian": lambda: jacobian(from_values, values),
}
for name, method in methods.items():
    assert_close(list(method()), list(J_loop.values()))
    print(f"{name} agrees with the loop.")

# %%
# The cost: N times more for the whole batch
# ------------------------------------------
# A counter of floating-point operations (FLOPs) in matrix products also sees the shape
# of every cotangent at the ReLU: ``threshold_backward`` is its derivative. The three
# methods push ``N * C`` cotangents ``[N, D_hidden]``, stacked or one by one.
# ``vmap(jacrev)`` pushes ``C`` cotangents ``[D_hidden]`` for each sample. We print the
# number of arrays, their shape, and the FLOPs without the forward pass: ``N`` times
# those of ``vmap(jacrev)``.


def observe(method, *args):
    """Return the FLOPs of matrix products, and the shapes of cotangents at the ReLU."""
    shapes = []

    def record(*_, out_shape, **__):
        shapes.append(list(out_shape))
        return 0

    relu = {torch.ops.aten.threshold_backward: record}
    with FlopCounterMode(display=False, custom_mapping=relu) as counter:
        method(*args)
    return counter.get_total_flops(), shapes


forward, _ = observe(model, X)
total, shapes = observe(recipe, params, X)
print(f"vmap(jacrev): {len(shapes)} x {shapes[0]}")
for name, method in methods.items():
    flops, shapes = observe(method)
    ratio = (flops - forward) / (total - forward)
    assert ratio == N
    print(f"{name}: {len(shapes)} x {shapes[0]}, FLOPs x {ratio:g}")

# %%
# The picture shows the cotangents that reach the ReLU: the Jacobian with respect to its
# output ``phi`` of shape ``[N, D_hidden]``. Each row belongs to one ``fs[n, c]``. This
# output does not depend on the other samples, so over the whole batch its row is zero
# outside the columns of sample ``n``. ``vmap(jacrev)`` computes these columns only.

phi = model[:-1](X).detach()
whole, single = jacrev(model[-1])(phi), vmap(jacrev(model[-1]))(phi)
assert_close(torch.einsum("ncnd->ncd", whole), single)
print(f"Cotangents: {list(whole.shape)} for the batch, {list(single.shape)} with vmap.")

fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained", width_ratios=[N, 1])
for ax, cotangents in zip(axes, (whole, single)):
    nonzero = (cotangents != 0).reshape(N * C, -1).numpy()
    ax.imshow(nonzero, cmap="cividis", aspect="auto", vmin=0)
fig.suptitle("Cotangents at the ReLU: nonzero entries are yellow")
axes[0].set(title="whole batch", ylabel="sample and output (index)")
axes[0].set_xlabel("sample and hidden unit (index)")
axes[1].set(title="vmap", xlabel="unit", xticks=[0, D_hidden - 1])
plt.show()

# %%
# Zeros from a closure over the parameters
# ----------------------------------------
# A function that ignores its arguments and calls ``model(X)`` looks constant to
# ``jacobian``. It returns zeros and no error. So does ``jacrev``. ``strict=True`` makes
# ``jacobian`` raise. The fix is ``functional_call``, as in ``f``.

zeros = jacobian(lambda *_: model(X), values)
zeros += tuple(jacrev(lambda _: model(X))(params).values())
print(f"Nonzero entries: {sum(block.count_nonzero().item() for block in zeros)}.")
try:
    jacobian(lambda *_: model(X), values)
except RuntimeError as error:
    print(f"RuntimeError: {error}")

# %%
# Forward mode: jacfwd
# --------------------
# ``jacfwd`` pushes one tangent forward for each parameter entry, the derivative of the
# hidden values. ``jacrev`` pushes one cotangent back for each output. So ``jacfwd`` is
# right where there are fewer entries than outputs. We count for a scalar that
# multiplies ``X``, for one bias, and for all ``P`` entries. The arrays at the ReLU are
# ``[N, tangents or cotangents, D_hidden]``. The FLOPs are multiples of a forward pass.
# The first ``jacfwd`` may warn that PyTorch itself uses ``torch.jit``: we ignore that.

warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
P = sum(p.numel() for p in params.values())
cases = {
    "A scalar, 1 entry": (lambda s, x: f(params, s * x), torch.ones(())),
    f"One bias, {D_hidden} entries": (f, {"0.bias": params["0.bias"]}),
    f"All parameters, {P} entries": (f, params),
}
for case, (g, value) in cases.items():
    print(f"{case}:")
    for mode in (jacfwd, jacrev):
        method = vmap(mode(g), in_dims=(None, 0))
        flops, shapes = observe(method, value, X)
        print(f"  {mode.__name__}: {shapes[0]}, FLOPs x {flops / forward:.1f}")
    assert_close(vmap(jacfwd(g), in_dims=(None, 0))(value, X), method(value, X))

# %%
# Some of the parameters, or the last layer
# -----------------------------------------
# ``functional_call`` takes the parameters that you leave out from the module. With the
# last layer alone, no cotangent goes back through the ReLU.
#
# The last layer needs no differentiation at all. Its inputs are ``phi`` from above, and
# its Jacobian is an outer product with the identity :math:`\delta`:
#
# .. math::
#
#    \frac{\partial f_{nc}}{\partial W_{oi}} = \delta_{co} \, \phi_{ni}, \qquad
#    \frac{\partial f_{nc}}{\partial b_o} = \delta_{co}.

last = {name: params[name] for name in ("2.weight", "2.bias")}
J_last = recipe(last, X)
assert_close(J_last, {name: J_loop[name] for name in last})
_, shapes = observe(recipe, last, X)
print(f"The last layer agrees. Arrays at the ReLU: {len(shapes)}.")

eye = torch.eye(C)
closed = {"2.weight": torch.einsum("co,ni->ncoi", eye, phi)}
closed["2.bias"] = eye.expand(N, C, C)
assert_close(closed, J_last)
print("The outer product agrees.")

# %%
# Inputs instead of parameters
# ----------------------------
# The Jacobian of the inputs has shape ``[N, C, D_in]``. ``jacobian(model, X)`` returns
# ``[N, C, N, D_in]``, zero between different samples: take its diagonal.
#
# An input row belongs to one sample. So the Jacobian of ``fs`` summed over the batch,
# ``[C, N, D_in]``, holds the same numbers. Parameters belong to all samples: with them,
# this trick returns the sum of the Jacobians, and the sample axis is lost.

J_X, full = vmap(jacrev(model))(X), jacobian(model, X)
leaf = X.clone().requires_grad_()
fs = model(leaf)
rows = [
    torch.autograd.grad(fs[n, c], leaf, retain_graph=True)[0]
    for n in range(N)
    for c in range(C)
]
assert_close(full, torch.stack(rows).unflatten(0, (N, C)))
assert_close(torch.einsum("ncnd->ncd", full), J_X)
print(f"jacobian(model, X): {list(full.shape)}, its diagonal: {list(J_X.shape)}.")

summed = jacrev(lambda X: model(X).sum(0))(X)
assert_close(summed.movedim(0, 1), J_X)
print("For the inputs, the Jacobian of the sum agrees.")

summed = jacrev(lambda params: f(params, X).sum(0))(params)
assert_close(summed, {name: block.sum(0) for name, block in J_loop.items()})
print(f"For 0.weight it has shape {list(summed['0.weight'].shape)}, without samples.")

# %%
# A gradient through the Jacobian
# -------------------------------
# Parameters that are not detached leave a graph in the Jacobian. So you can penalize
# its squared norm in a loss. We differentiate the penalty, and compare with a loop that
# has ``create_graph=True``. The Jacobian does not depend on the last bias:
# ``materialize_grads=True`` gives zeros there instead of an error.

weights = dict(model.named_parameters())


def penalty_gradient(J):
    penalty = sum(block.square().sum() for block in J.values())
    return torch.autograd.grad(penalty, tuple(weights.values()), materialize_grads=True)


gradient = penalty_gradient(recipe(weights, X))
assert_close(gradient, penalty_gradient(loop(model, X, create_graph=True)))
print("The gradient of the squared norm agrees with the loop, for every parameter.")

# %%
# Buffers, eval mode, frozen parameters, several inputs
# -----------------------------------------------------
# In eval mode, batch norm reads its buffers and treats each sample alone. The frozen
# bias ``0.bias`` has no entry in the result. The second model takes two inputs and
# assigns a buffer in its forward pass: the buffer keeps its value.

norm = nn.Sequential(
    nn.Linear(D_in, D_hidden), nn.BatchNorm1d(D_hidden), nn.Linear(D_hidden, C)
)
_ = norm(X)  # one step of the running averages
norm.eval()[0].bias.requires_grad_(False)
J = jacobians(norm, X)
assert_close(J, loop(norm, X))
print(f"Batch norm in eval mode agrees with the loop: {', '.join(J)}.")


class Pair(nn.Linear):
    def forward(self, x, z):
        self.largest = x.max()
        return super().forward(torch.cat([x, z], dim=1))


pair, Z = Pair(D_in + 4, C), torch.rand(N, 4)
pair.register_buffer("largest", torch.zeros(()))
J = jacobians(pair, X, Z)
assert pair.largest == 0
assert_close(J, loop(pair, X, Z))
print("Two inputs agree with the loop, and the buffer is the same as before.")

# %%
# Outputs that are not [N, C]
# ---------------------------
# ``jacobians`` raises for other outputs. Add a last layer that makes them ``[N, C]``:
# ``Unflatten`` for one number per sample, ``Flatten`` for sequences and images. The
# names get the prefix ``0.``. To bring a block of the Jacobian back, ``reshape`` it to
# ``[*fs.shape, *param.shape]``.

one = nn.Sequential(nn.Linear(D_in, 1), nn.Flatten(0))
cases = {
    "[N]": (one, X, nn.Unflatten(0, (-1, 1))),
    "[N, T, C]": (model, torch.rand(N, 3, D_in), nn.Flatten()),
    "[N, C, H, W]": (nn.Conv2d(1, 2, 3), torch.rand(N, 1, 5, 6), nn.Flatten()),
}
for shape, (net, inputs, last_layer) in cases.items():
    flat = jacobians(nn.Sequential(net, last_layer), inputs)
    for name, expected in loop(net, inputs).items():
        assert_close(flat[f"0.{name}"].reshape(expected.shape), expected)
    print(f"Outputs {shape} = {list(net(inputs).shape)} agree with the loop.")
try:
    jacobians(net, inputs)
except ValueError as error:
    print(f"ValueError: {error}")

# %%
# Models extended with BackPACK
# -----------------------------
# ``extend`` adds hooks that ``torch.func`` cannot transform, and a copy of an extended
# model has them too. Copy the model before you extend it.

plain = copy.deepcopy(model)
extended = extend(model)
try:
    jacobians(extended, X)
except RuntimeError as error:
    print(f"RuntimeError: {error}")
assert_close(jacobians(plain, X), J_loop)
print("The copy made before extend agrees with the loop.")

# %%
# Known failures
# --------------
# Recurrent layers raise under ``vmap``. Batch norm in training mode raises when it
# updates its buffers. ``PReLU`` raises too, but with ``N == C`` it gives wrong numbers
# and no error: only the comparison with the loop fails. The same holds for a layer that
# mixes samples, such as a softmax over the batch.


def compare(net, X):
    assert_close(jacobians(net, X), loop(net, X))


prelu = nn.Sequential(nn.Linear(D_in, C), nn.PReLU())
mixing = nn.Sequential(nn.Linear(D_in, C), nn.Softmax(dim=0))
cases = {
    "RNN": (vmap(nn.RNN(D_in, D_hidden)), torch.rand(N, 3, D_in)),
    "Batch norm": (jacobians, norm.train(), X),
    "PReLU": (compare, prelu, X),
    "PReLU with N == C": (compare, prelu, X[:C]),
    "Softmax over the batch": (compare, mixing, X),
}
for name, (call, *args) in cases.items():
    try:
        call(*args)
    except (RuntimeError, AssertionError) as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        raise AssertionError(f"{name} works now: correct this section")

# %%
# Where to go next
# ----------------
# Next: ``compute/choosing_a_method.py`` measures every method on the same work. The
# alternative: ``batched_jacobians.py`` computes this Jacobian with BackPACK.
