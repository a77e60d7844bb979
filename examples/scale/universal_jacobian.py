"""
Jacobian of any model, fast and checked
=======================================

After this page you have one function for the Jacobian of a network's outputs with
respect to its parameters, for a whole batch. It takes any model with outputs of shape
``[N, C]``, checks its own result, and writes it into memory that you allocate once. You
build it step by step, and see how close it comes to the speed of memory.
"""

import contextlib
import copy
import gc
import math
import mmap
import os
import resource
import warnings
from collections import defaultdict
from itertools import accumulate, chain, pairwise, product
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import SqrtGGNExact
from torch import autograd, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, jacrev, vjp, vmap
from torch.linalg import vector_norm
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.benchmark import Timer

os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr
torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)

# %%
# The block of a layer is an outer product
# ----------------------------------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``. A linear layer maps its inputs
# ``a``, of shape ``[N, I]``, to ``a @ weight.T + bias``, of shape ``[N, O]``. Let
# ``delta[c, n]``, of shape ``[O]``, be the derivative of ``fs[n, c]`` by the layer's
# output. The Jacobian of the weight is ``J[n, c, o, i] = delta[c, n, o] * a[n, i]``,
# and that of the bias is ``delta``. Two small arrays determine ``N * C * O * I``
# numbers.
#
# A forward hook sees ``a`` and the output. One backward pass with a stack of ``C``
# cotangents gives ``delta`` for all samples at once: row ``c`` asks for the sum of
# ``fs[:, c]``, and each sample finds its own part in it, as samples do not mix.

N, C = 6, 4
model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, C))
X = torch.rand(N, 7)
seen = []
handle = model[0].register_forward_hook(lambda *call: seen.extend(call))
fs = model(X)
handle.remove()
_, (a,), output = seen

E = torch.eye(C)[:, None].expand(C, N, C)
(delta,) = autograd.grad(fs, output, E, is_grads_batched=True, retain_graph=True)
block = torch.einsum("cno,ni->ncoi", delta, a)


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


assert_close(block, autograd_loop(model, X)["0.weight"])
print(f"delta {list(delta.shape)} and a {list(a.shape)} give J {list(block.shape)}.")

# %%
# The rest of the page makes a function for any model of this:
#
# - ``forward`` records the calls of all modules, and ``pull`` gets their deltas.
# - ``factors`` and ``from_module`` make blocks from the calls of a module. ``owners``
#   says which module that is, and ``from_layer`` collects its blocks.
# - ``Check`` tests each block with one backward pass. Those that fail are computed by
#   ``whole_batch``, and in the end by ``one_by_one``.
# - ``prepare`` looks at the memory, and ``batched_jacobian`` puts all together.
#
# To take it away, copy the functions up to ``batched_jacobian``, and the imports.
#
# Calls, from hooks
# -----------------
# In general a module takes several arguments, returns several tensors and is called
# more than once, so we record every call. A later in-place operation, such as
# ``ReLU(inplace=True)``, changes what an output stands for. So the hook notes the
# gradient edge: the output's place in the graph at that moment.
#
# A forward pass can change a model: batch norm moves its running statistics, a module
# may assign an attribute. ``forward`` passes copies of the buffers, and removes its
# hooks, also after an error. ``restored`` puts attributes and buffers back. Random
# layers draw their numbers as ever.


def frobenius(x):
    """Return the norm, in double precision, where no square is lost."""
    return vector_norm(x, dtype=None if x.is_complex() else torch.float64).item()


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def copies(module):
    """Return the buffers, which a call may change."""
    return {name: b.clone() for name, b in module.named_buffers()}


@contextlib.contextmanager
def restored(model):
    """Put back the attributes and the buffers that a call changes."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for now, attributes in before:
            now.clear()
            now.update(attributes)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)


class Call(NamedTuple):
    args: tuple
    kwargs: dict
    inputs: list  # the tensors among them
    outputs: dict  # place in the flat output: tensor, for those that carry a gradient
    edges: list  # of the graph, behind the outputs


def forward(model, X, watched):
    """Return ``model(X)`` and ``{module: its calls}`` for the watched modules."""
    calls, handles = {}, []

    def record(module, args, kwargs, output):
        inputs = list(filter(is_tensor, tree_leaves((args, kwargs))))
        leaves = enumerate([output] if is_tensor(output) else tree_leaves(output))
        outputs = {i: t for i, t in leaves if is_tensor(t) and t.requires_grad}
        edges = list(map(get_gradient_edge, outputs.values()))
        call = Call(args, kwargs, inputs, outputs, edges)
        calls.setdefault(module, []).append(call)

    try:
        for module in watched:
            handles.append(module.register_forward_hook(record, with_kwargs=True))
        x, buffers = X.detach().clone(), copies(model)
        return functional_call(model, buffers, x) if buffers else model(x), calls
    finally:
        for handle in handles:
            handle.remove()


norm = nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace=True), nn.BatchNorm1d(5))
_, calls = forward(norm, X, [norm[0]])
edge = calls[norm[0]][0].edges[0]
assert edge.node.name() == "AddmmBackward0" and norm[2].num_batches_tracked == 0
print(f"The edge belongs to the linear layer, not to the ReLU: {edge.node.name()}.")

# %%
# All deltas, from a stack of cotangents
# --------------------------------------
# ``vmap`` sends the stack through one backward pass. Where an operation has no batching
# rule it warns or raises, and we send one cotangent after the other.


def pull(outputs, inputs, rows):
    """Return, for each input, the products of ``rows`` with the Jacobian."""
    inputs, options = list(inputs), {"retain_graph": True, "materialize_grads": True}

    def one(row):
        return autograd.grad(outputs, inputs, row, **options)

    try:
        with warnings.catch_warnings(action="error"):  # an operation without a rule
            return vmap(one)(rows)
    except Exception:  # also one that a module raises for a batch of one
        one_by_one = rows if is_tensor(rows) else zip(*rows)
        return [torch.stack(grads) for grads in zip(*map(one, one_by_one))]


assert_close(pull(fs, [output], E)[0], delta)
print(f"pull(fs, [output], E) returns the deltas, {list(delta.shape)}.")

# %%
# Convolutions, from windows
# --------------------------
# A convolution is a linear layer on a window of its input, at each of ``T`` positions.
# Its block sums over positions: a product of matrices. A linear layer on sequences
# ``[N, T, I]`` is the same, and its windows are its inputs. A transposed convolution
# takes its windows from ``delta``. We pad the input first, so every padding mode works.
# In the shapes below, a group has ``R`` outputs, and a window has ``S`` entries.

CONV = nn.Conv1d, nn.Conv2d, nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
PRODUCT = nn.Linear, *CONV, *TRANSPOSED


def windows(layer, x, size):
    """Return what each position reads: ``[B, groups, positions, channels * K]``."""
    mode = layer.padding_mode.replace("zeros", "constant")
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    steps = zip(layer.kernel_size, layer.stride, layer.dilation, size)
    for axis, (kernel, stride, dilation, length) in enumerate(steps, 2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)
        x = x.narrow(axis, 0, length)[..., ::dilation]
    d = len(size)  # x: [B, channels, *L, *K]
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, 2 + d)
    return x.flatten(2 + d).flatten(2, 1 + d)


def factors(layer, a, delta):
    """Return ``left [C, N, groups, R, T]`` and ``right [N, groups, T, S]``."""
    if type(layer) is nn.Linear:
        left = delta.flatten(2, -2).mT if delta.ndim > 3 else delta[..., None]
        return left[:, :, None], a.reshape(len(a), 1, -1, a.shape[-1])
    batch, groups = delta.shape[:2], layer.groups
    if type(layer) in CONV:
        left = delta.flatten(3).unflatten(2, (groups, -1))
        return left, windows(layer, a, delta.shape[3:])
    left = windows(layer, delta.flatten(0, 1), a.shape[2:]).unflatten(0, batch)
    return left.mT, a.flatten(2).unflatten(1, (groups, -1)).mT


conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular", groups=2)
images = torch.rand(N, 4, 5, 7)
_, right = factors(conv, images, torch.rand(C, *conv(images).shape))
outputs = conv.weight.unflatten(0, (2, 3)).flatten(2) @ right.mT
assert_close(outputs.view(N, 6, 3, 4) + conv.bias[:, None, None], conv(images))
print(f"The weight times the windows {list(right.shape)} is the convolution's output.")

# %%
# Normalization layers, and any other module
# ------------------------------------------
# The scale of a normalization multiplies the normalized input. That is the output of
# the same module with scale one and shift zero, so one rule serves all kinds: multiply
# by ``delta``, and sum over positions.
#
# For any other module, ``vjp`` pulls ``delta`` back through a call of this module
# alone, and ``vmap`` does so for all samples and outputs. Where ``vmap`` fails, as it
# does for an RNN or an attention kernel, samples take turns.

LAST_AXES = nn.LayerNorm, nn.RMSNorm
NORM = *LAST_AXES, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
NORM += nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


def normalized(layer, x):
    """Return the output of a normalization with scale one and shift zero."""
    start = {"weight": torch.ones_like, "bias": torch.zeros_like}
    plain = {name: start[name](p) for name, p in layer.named_parameters()}
    return functional_call(layer, (plain, copies(layer)), x)


def from_module(layer, call, params, deltas):
    """Return ``{name: [N, C, *p.shape]}``, pulled back through one call of a module."""
    N, buffers = deltas[0].shape[1], copies(layer)
    leaves, spec = tree_flatten((call.args, call.kwargs))
    leaves = [x.detach().clone() if is_tensor(x) else x for x in leaves]
    split = [is_tensor(x) and x.ndim > 0 and len(x) == N for x in leaves]

    def outputs(params, leaves):
        args, kwargs = tree_unflatten(leaves, spec)
        result = functional_call(layer, (params, buffers), args, kwargs)
        return [tree_leaves(result)[i] for i in call.outputs]

    def sample(leaves, deltas):
        leaves = [x[None] if s else x for x, s in zip(leaves, split)]
        _, back = vjp(lambda params: outputs(params, leaves), params)
        return vmap(lambda rows: back([row[None] for row in rows])[0])(deltas)

    try:
        with warnings.catch_warnings(action="error"):  # an operation without a rule
            return vmap(sample, ([0 if s else None for s in split], 1))(leaves, deltas)
    except Exception:  # also one that a module raises for a batch of one
        rows, live = [], {k: p.clone().requires_grad_() for k, p in params.items()}
        for n in range(N):
            part = [x[n : n + 1] if s else x for x, s in zip(leaves, split)]
            fs = outputs(live, part)
            rows.append(pull(fs, live.values(), [d[:, n : n + 1] for d in deltas]))
        return dict(zip(params, map(torch.stack, zip(*rows))))


prelu = nn.PReLU(7)
_, calls = forward(nn.Sequential(prelu), X, [prelu])
(call,) = calls[prelu]
deltas = [torch.rand(C, N, 7)]
blocks = from_module(prelu, call, dict(prelu.named_parameters()), deltas)
(sums,) = autograd.grad(call.outputs[0], prelu.weight, deltas[0].sum(0))
assert_close(blocks["weight"].sum((0, 1)), sums)
print(f"PReLU: the blocks {list(blocks['weight'].shape)} sum to the gradient.")

# %%
# The module that owns a parameter
# --------------------------------
# Some parameters have no call of their own: attention uses the weight of its output
# layer as a function, a parametrization computes a weight from others. And some calls
# have no samples on their first axis. Then the module around owns the parameter, and in
# the end that is the model.


def owners(model, calls, N):
    """Return ``{module: {its name of a parameter: the model's name}}``.

    The owner of a parameter is the smallest module around it that was called, and whose
    first input and whose outputs have the samples on their first axis.
    """
    modules, names = dict(model.named_modules(remove_duplicate=False)), {}

    def batched(call):
        tensors = [*call.inputs[:1], *call.outputs.values()]
        return len(tensors) > 1 and all(t.ndim and len(t) == N for t in tensors)

    good = {module for module, made in calls.items() if all(map(batched, made))}
    own = defaultdict(dict)
    for path, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            name = names.setdefault(p, path)
            prefix, _, local = path.rpartition(".")
            while prefix and modules[prefix] not in good:
                prefix, _, last = prefix.rpartition(".")
                local = f"{last}.{local}"
            if name not in own[modules[prefix]].values():
                own[modules[prefix]][local] = name
    return own


attention = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True), nn.Tanh())
attention.forward = lambda x: attention[1](attention[0](x, x, x)[0].flatten(1))
fs, calls = forward(attention, torch.rand(N, 2, 4), attention.modules())
for module, names in owners(attention, calls, N).items():
    print(f"{type(module).__name__} owns {', '.join(names.values())}.")

# %%
# Blocks, with what a check needs
# -------------------------------
# The sum over ``n`` and ``c`` of ``u[n, c] * J[n, c]`` must equal the gradient of the
# sum of ``u[n, c] * fs[n, c]``. For random ``u`` that is a check of all of ``J``, for
# one backward pass. Reading a large block back takes time, too. So each rule yields a
# function that writes its block, the sum, computed from the factors, and a bound of
# that sum, to compare its rounding with.


def from_factors(layer, own, pairs, u):
    """Yield what ``from_layer`` yields, for a weight and its bias."""
    left = torch.cat([left for left, _ in pairs], 4) if pairs[1:] else pairs[0][0]
    right = torch.cat([right for _, right in pairs], 2) if pairs[1:] else pairs[0][1]
    (C, N, groups, R, T), S = left.shape, right.shape[-1]
    weighted = u[:, None].to(left.dtype) @ left.flatten(2).transpose(0, 1)
    weighted = weighted.view(N, groups, R, T)
    norm, order = frobenius(weighted), "sr" if type(layer) in TRANSPOSED else "rs"

    def write(out):
        if groups == 1 and order == "rs":
            rows = left.flatten(2, 3).transpose(0, 1).flatten(1, 2)
            torch.bmm(rows, right[:, 0], out=out.view(N, C * R, S))
        else:
            block = torch.einsum(f"cngrt,ngts->ncg{order}", left, right)
            out.copy_(block.reshape(out.shape))

    rows = weighted.permute(1, 2, 0, 3).flatten(2)  # [groups, R, N * T]
    if "weight" in own:
        sums = rows @ right.transpose(0, 1).flatten(1, 2)
        sums = sums if order == "rs" else sums.mT
        yield own["weight"], write, sums, norm * frobenius(right)
    if "bias" in own and order == "rs":
        block = (left.sum(4) if T > 1 else left[..., 0]).transpose(0, 1)
        bound = norm * (N * T) ** 0.5
        yield (
            own["bias"],
            lambda out: out.view_as(block).copy_(block),
            rows.sum(2),
            bound,
        )


def from_layer(layer, own, made, params, check):
    """Yield ``(name, write, sums, bound)``, from a layer's calls and their deltas.

    ``write(out)`` fills ``out`` with the block of the parameter; ``sums`` is the sum
    over n and c of ``u`` times the block, and its norm cannot exceed ``bound``.
    """
    plain = set(own) <= {"weight", "bias"}  # and no factors of a weight, say
    kind, pairs, dense = type(layer) if plain else None, [], []
    for call, deltas in made:
        rest, a, delta = dict(own), call.inputs[0].detach(), deltas[0]
        if kind in PRODUCT:
            pairs.append(factors(layer, a, delta))
            rest = {"bias": own["bias"]} if kind in TRANSPOSED and "bias" in own else {}
        elif kind in NORM:
            rest, terms = {}, {"weight": delta * normalized(layer, a), "bias": delta}
            for local, name in own.items():
                term, p = terms[local], params[name]
                last = range(2, term.ndim - p.ndim), range(3, term.ndim)
                axes = list(last[kind not in LAST_AXES])
                block = term.sum(axes) if axes else term
                bound = frobenius(term) * (term[0, 0].numel() / p.numel()) ** 0.5
                dense.append((name, block.transpose(0, 1), bound))
        if rest:
            values = {k: params[name].detach().clone() for k, name in rest.items()}
            with torch.random.fork_rng([delta.device] * delta.is_cuda):
                result = from_module(layer, call, values, deltas)
            dense += [(rest[local], b, frobenius(b)) for local, b in result.items()]
    if pairs:
        yield from from_factors(layer, own, pairs, check.u)
    for name, block, bound in dense:
        sums, bound = check.sums(block), bound * frobenius(check.u)
        yield name, lambda out, block=block: out.copy_(block), sums, bound


# %%
# Check, and two fallbacks
# ------------------------
# Where the structure does not hold, the sum is another: samples mix in batch norm in
# training mode, a weight is read again outside its layer, a rule of ``vmap`` is wrong.
# Then the names that fail go to the next method: cotangents for ``fs`` over the whole
# batch, which costs ``N`` times more. What fails again gets one backward pass per
# entry, the definition. A difference counts if it exceeds the rounding of the sum. In
# low precision rounding is large: in bfloat16 the check sees coarse errors only.


class Jacobian(dict):
    """``{name: [N, C, *p.shape]}``, and ``method[name]``: how the block was made."""


class Check:
    """Whether a Jacobian gives the gradients of the sum of ``u[n, c] * fs[n, c]``."""

    def __init__(self, fs, params, edges):
        generator = torch.Generator(fs.device).manual_seed(0)  # not the global one
        options = {"dtype": fs.dtype, "device": fs.device}
        self.u = torch.randn(fs.shape, generator=generator, **options)
        inputs, options = [*params.values(), *edges], {"retain_graph": True}
        grads = autograd.grad(fs, inputs, self.u, allow_unused=True, **options)
        self.used = [
            edge for edge, g in zip(edges, grads[len(params) :]) if g is not None
        ]
        self.truth = {
            name: torch.zeros_like(p) if g is None else g.to_dense()
            for (name, p), g in zip(params.items(), grads)
        }
        self.total = math.hypot(*map(frobenius, self.truth.values()))
        self.eps = max(torch.finfo(t.dtype).eps for t in (fs, *params.values()))

    def sums(self, block):
        u = self.u.flatten().to(block.dtype)
        return (u @ block.flatten(0, 1).flatten(1)).view(block.shape[2:])

    def fails(self, name, sums, bound):
        off = self.truth[name] - sums.reshape(self.truth[name].shape)
        limit = self.eps**0.75 * bound
        return not frobenius(off) <= limit < math.inf if limit else bool(off.any())


def structured(J, fs, calls, own, params, check):
    """Fill ``J`` layer by layer, and return the names of what fails its check."""
    E = torch.eye(fs.shape[1], dtype=fs.dtype, device=fs.device)[:, None]
    rows, used = E.expand(-1, *fs.shape), check.used
    deltas = dict(zip(used, pull(fs, used, rows))) if used else {}

    def of_outputs(call):
        for edge, t in zip(call.edges, call.outputs.values()):
            yield deltas[edge] if edge in deltas else t.new_zeros(len(E), *t.shape)

    total = {}
    for layer, local in own.items():
        made = [(call, list(of_outputs(call))) for call in calls.get(layer, ())]
        try:
            for name, write, sums, bound in from_layer(
                layer, local, made, params, check
            ):
                if name in total:
                    write(extra := torch.empty_like(J[name]))
                    J[name] += extra
                else:
                    write(J[name])
                before, size = total.get(name, (0, 0))
                total[name] = before + sums.reshape(params[name].shape), size + bound
                J.method[name] = type(layer).__name__
        except Exception:
            continue  # the check finds what is missing
    return [k for k in params if k not in total or check.fails(k, *total[k])]


def whole_batch(J, names, parts, params, check):
    """Fill ``J`` from each part of ``fs`` at once, and return what fails its check."""
    inputs, n = [params[name] for name in names], 0
    options = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
    for part in parts:
        E = torch.eye(part.numel(), dtype=part.dtype, device=part.device)
        try:
            grads = autograd.grad(part, inputs, E.view(-1, *part.shape), **options)
        except Exception:  # an operation without a batching rule
            return names
        for name, grad in zip(names, grads):
            out = J[name][n : n + len(part)]
            out.copy_(grad.view_as(out)) if is_tensor(grad) else out.zero_()
            J.method[name] = "whole batch"
        n += len(part)
    u = frobenius(check.u)  # the total: J may be zero but for its own rounding
    bounds = {name: u * frobenius(J[name]) + check.total for name in names}
    return [k for k in names if check.fails(k, check.sums(J[k]), bounds[k])]


def one_by_one(J, names, fs, params):
    """Fill ``J`` from a backward pass for each entry of ``fs``: the definition."""
    options = {"retain_graph": True, "materialize_grads": True}
    for n, c in product(*map(range, fs.shape)):
        grads = autograd.grad(fs[n, c], [params[name] for name in names], **options)
        for name, grad in zip(names, grads):
            J[name][n, c] = grad.to_dense()
    J.method.update(dict.fromkeys(names, "one by one"))


fs, check = model(X), Check(model(X), dict(model.named_parameters()), [])
right = autograd_loop(model, X)["0.weight"]
wrong = right.clone()
wrong[1, 2, 3, 4] += 1e-6
for title, block in {"right": right, "one entry off by 1e-6": wrong}.items():
    bound = frobenius(check.u) * frobenius(block)
    fails = check.fails("0.weight", check.sums(block), bound)
    print(f"{title}: {'fails' if fails else 'passes'}")

# %%
# New memory on large pages
# -------------------------
# A program that asks for a large array gets addresses. The memory behind them comes
# page by page, when it is first written: each time the system stops the program, finds
# a page and clears it. On Linux we can ask for pages of 2 MB instead of 4 kB. What that
# changes is measured below.


def allocate(shape, like):
    """Return new memory, for large arrays on large pages where the system has them."""
    size = math.prod(shape) * like.element_size()
    if size < 2**25 or like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


# %%
# Errors that say where
# ---------------------
# A result must go into memory of its own, and a model that cannot be differentiated
# should say which module is in the way.


def culprit(model, X, params):
    """Name the first module whose output cannot be differentiated, with its shapes."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    with torch.random.fork_rng([X.device] * X.is_cuda):
        _, calls = forward(model, X, names)
    for module, made in calls.items():
        for call in made:
            outputs = [t.sum() for t in call.outputs.values()]
            inputs = [*call.inputs, *module.parameters()]
            try:
                if outputs:
                    options = {"retain_graph": True, "allow_unused": True}
                    autograd.grad(outputs, params.values(), **options)
                    continue
            except RuntimeError:
                pass
            if outputs or any(t.requires_grad for t in inputs):
                shapes = ", ".join(str(list(t.shape)) for t in call.inputs)
                return f"{names[module]} ({type(module).__name__}), called on {shapes}"
    return f"{type(model).__name__}, called on {list(X.shape)}"


def check_input(X, params):
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    if not is_tensor(X) or X.ndim == 0 or len(X) == 0:
        got = list(X.shape) if is_tensor(X) else type(X).__name__
        raise ValueError(f"X must be a tensor [N, ...] with N > 0, but is {got}")
    name, p = next(iter(params.items()))
    if X.device != p.device:
        raise ValueError(f"X is on {X.device}, but the parameter {name} on {p.device}")


def check_output(fs, N):
    if not is_tensor(fs) or fs.ndim != 2 or len(fs) != N or not fs.is_floating_point():
        got = f"{list(fs.shape)}, {fs.dtype}" if is_tensor(fs) else type(fs).__name__
        raise ValueError(f"model(X) must be a tensor [N={N}, C], but is {got}")


def span(t):
    """Return the first byte of a tensor, and the first one after it."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def prepare(out, fs, params, model, X):
    """Return ``{name: [N, C, *p.shape]}``: new, or ``out`` if it is fit for that."""
    if out is None:
        return {k: allocate((*fs.shape, *p.shape), p) for k, p in params.items()}
    if not isinstance(out, dict):
        raise ValueError(f"out must be a dict, but is {type(out).__name__}")
    if set(out) != set(params):
        raise ValueError(f"out must have the names {list(params)}, but has {list(out)}")
    for name, p in params.items():
        got, shape = out[name], (*fs.shape, *p.shape)
        if not is_tensor(got):
            got = type(got).__name__
            raise ValueError(f"out[{name!r}] must be a tensor, but is {got}")
        if (got.shape, got.dtype, got.device) != (shape, p.dtype, p.device):
            wanted = f"{list(shape)}, {p.dtype}, on {p.device}"
            got = f"{list(got.shape)}, {got.dtype}, on {got.device}"
            raise ValueError(f"out[{name!r}] must be {wanted}, but is {got}")
        if not got.is_contiguous() or got.requires_grad:
            raise ValueError(f"out[{name!r}] must be contiguous, without a gradient")
    spans = [(*span(t), f"out[{name!r}]") for name, t in out.items()]
    grads = [(f"{k}.grad", p.grad) for k, p in params.items() if is_tensor(p.grad)]
    taken = chain(model.named_parameters(), model.named_buffers(), grads, [("X", X)])
    end, last = 0, ""
    for start, stop, name in sorted(spans + [(*span(t), name) for name, t in taken]):
        if start < end and "out[" in name + last:
            raise ValueError(f"{last} and {name} share memory: out must have its own")
        end, last = max((end, last), (stop, name))
    return dict(out)


# %%
# The function
# ------------
# For tiny problems the calls themselves take the time, not their work. The whole batch
# at once needs fewer calls. Its price is high for convolutions, so not for those.

SMALL = 2**16  # up to this N * N * P, take the whole batch at once


@torch.enable_grad()
def batched_jacobian(model, X, *, out=None):
    """Return the Jacobian of ``fs = model(X)``: ``{name: [N, C, *p.shape]}``.

    ``X`` is a tensor ``[N, ...]``, and ``model(X)`` one of shape ``[N, C]``. The names
    are those of the parameters that require a gradient. ``method[name]`` of the result
    is the module whose structure gave the block, or ``whole batch`` or ``one by one``
    where it gave none. ``out`` is a result of the same shapes to write into. The model
    stays as it is; a random model draws its numbers once, as in ``model(X)``.

    Raises ``ValueError`` for arguments or outputs of another type, shape, dtype, device
    or memory, and ``RuntimeError`` if the model cannot be differentiated.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_input(X, params)
    N, P = len(X), sum(p.numel() for p in params.values())
    modules = list(model.modules())
    tiny = N * N * P <= SMALL and not any(type(m) in PRODUCT[1:] for m in modules)
    watched = [
        m for m in modules if not tiny and next(m.parameters(), None) is not None
    ]
    with restored(model):
        try:
            fs, calls = forward(model, X, watched)
        except RuntimeError as error:
            name, p = next(iter(params.items()))
            if (
                X.dtype in {p.dtype for p in params.values()}
                or not X.is_floating_point()
            ):
                raise
            text = f"X is {X.dtype}, but the parameter {name} is {p.dtype}"
            raise ValueError(text) from error
        check_output(fs, N)
        J = Jacobian(prepare(out, fs, params, model, X))
        J.method, names = {}, list(params)
        own = owners(model, calls, N) if watched else {}
        made = [call for layer in own for call in calls.get(layer, ())]
        try:
            check = Check(fs, params, [edge for call in made for edge in call.edges])
        except RuntimeError as error:
            where = culprit(model, X, params)
            raise RuntimeError(f"cannot differentiate {where}: {error}") from error
        if watched:
            names = structured(J, fs, calls, own, params, check)
        if names:
            parts = fs.split(1) if watched else [fs]
            names = whole_batch(J, names, parts, params, check)
        if names:
            one_by_one(J, names, fs, params)
    return J


J = batched_jacobian(model, X)
assert_close(dict(J), autograd_loop(model, X))
print(f"batched_jacobian agrees with the loop for {len(J)} parameters.")

# %%
# Memory that is used again
# -------------------------
# In a loop over batches, pass the last result as ``out``: no new memory for J.

again = batched_jacobian(model, X + 1, out=J)
assert all(again[name] is J[name] for name in J)
assert_close(dict(again), autograd_loop(model, X + 1))
print("The second result lies in the memory of the first.")

# %%
# Models of many kinds
# --------------------
# ``method`` says what gave each block. With ``SMALL = 0`` these tiny models are treated
# like large ones.


class Tied(nn.Module):
    """Words in, and a score for each word out, with one weight for both."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 5)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, words):
        return (self.words(words).mean(1) * self.scale) @ self.words.weight.T


class Turned(nn.Sequential):
    """A recurrent layer with time in its first axis, as is the default."""

    def forward(self, sequences):
        return super().forward(sequences.transpose(0, 1))[0][-1]


layer = nn.Linear(7, 7)
encoder = nn.TransformerEncoderLayer(6, 2, 5, dropout=0, batch_first=True)
cases = {
    "layer called twice": (nn.Sequential(layer, nn.Tanh(), layer), X),
    "CNN": (nn.Sequential(conv, nn.GroupNorm(3, 6), nn.Flatten()), images),
    "RNN, batch in axis 1": (Turned(nn.RNN(3, 2)), torch.rand(N, 5, 3)),
    "transformer": (nn.Sequential(encoder, nn.Flatten()), torch.rand(N, 3, 6)),
    "tied weight": (Tied(), torch.randint(9, (N, 4))),
    "batch norm, training": (nn.Sequential(layer, nn.BatchNorm1d(7)), X),
}
small, SMALL = SMALL, 0
for case, (net, inputs) in cases.items():
    J = batched_jacobian(net, inputs)
    assert_close(dict(J), autograd_loop(net, inputs))
    made = sorted(set(J.method.values()))
    print(f"{case}: right, from {', '.join(made)}")
SMALL = small

# %%
# A graph that is cut, another type, no samples, other outputs, memory that is shared:
# each error says where, and the memory is as it was.


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


out = {name: torch.zeros_like(block) for name, block in again.items()}
out["0.bias"] = out["0.weight"].flatten()[: N * C * 5].view(N, C, 5)
bad = {
    "cut graph": (nn.Sequential(nn.Linear(7, 5), Cut()), X, None),
    "dtype": (model, X.float(), None),
    "empty batch": (model, X[:0], None),
    "shape of fs": (nn.Sequential(nn.Linear(7, C), nn.Unflatten(1, (2, 2))), X, None),
    "out": (model, X, out),
}
for case, (net, inputs, memory) in bad.items():
    try:
        batched_jacobian(net, inputs, out=memory)
    except (RuntimeError, ValueError) as error:
        print(f"{case}: {type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{case} raises no error any more")
assert not any(block.any() for block in out.values())

# %%
# Cost of new memory
# ------------------
# We write 134 MB to new memory, to new memory on large pages, and to memory in use,
# here and below with one thread.


def write_new(J):
    return {name: torch.ones_like(block) for name, block in J.items()}


def write_large_pages(J):
    return {name: allocate(block.shape, block).fill_(1) for name, block in J.items()}


def write_same(J):
    return {name: block.fill_(1) for name, block in J.items()}


def seconds(function, *args):
    """Return the median time of a call. ``Timer`` warms up and repeats it."""
    names = {"f": function, "args": args}
    timer = Timer("f(*args)", globals=names, num_threads=THREADS)
    return timer.adaptive_autorange(min_run_time=0.005, max_run_time=0.12).median


def page_faults(function, *args):
    """Return how often the system had to hand out a page during a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function(*args)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


THREADS, default_threads = 1, torch.get_num_threads()
torch.set_num_threads(THREADS)
J = {"134 MB": torch.empty(2**25, dtype=torch.float32)}
times = {
    write: seconds(write, J) for write in (write_new, write_large_pages, write_same)
}
for write, time in times.items():
    faults, ratio = page_faults(write, J), time / times[write_same]
    print(f"{write.__name__}: {faults} page faults, x {ratio:.1f} the last time")

# %%
# Speed on five workloads
# -----------------------
# In single precision, and each method has to be right on two small models first. The
# yardstick is the time to write as many bytes to memory in use.


def mlp(*widths):
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def cnn(width, C):
    first = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
    second = nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2 * width, C))


def vmap_jacrev(model, X):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params, x):
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def sqrt_ggn(model, X):
    model, X = extend(copy.deepcopy(model)), X.detach().requires_grad_()
    fs, params = model(X), dict(model.named_parameters())
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, [X, *params.values()])
    V = {name: p.sqrt_ggn_exact.contiguous() for name, p in params.items()}
    return {name: v.div_(2**0.5).transpose(0, 1) for name, v in V.items()}


METHODS = {
    "vmap(jacrev)": vmap_jacrev,
    "SqrtGGNExact": sqrt_ggn,
    "batched_jacobian": batched_jacobian,
}
torch.set_default_dtype(torch.float64)
for model, X in (mlp(5, 4, 3), torch.rand(6, 5)), (cnn(2, 3), torch.rand(4, 1, 8, 8)):
    for method in METHODS.values():
        assert_close(dict(method(model, X)), autograd_loop(model, X))
torch.set_default_dtype(torch.float32)
WORK = {
    "MLP 10-7-5, N=15": (mlp(10, 7, 5), torch.rand(15, 10)),
    "MLP 64-128-128-10, N=128": (mlp(64, 128, 128, 10), torch.rand(128, 64)),
    "MLP 784-256-256-10, N=64": (mlp(784, 256, 256, 10), torch.rand(64, 784)),
    "CNN, N=128": (cnn(17, 10), torch.rand(128, 1, 8, 8)),
    "MLP 64-64-64-100, N=32": (mlp(64, 64, 64, 100), torch.rand(32, 64)),
}


def reuse(model, X, J):
    return batched_jacobian(model, X, out=J)


results = {}
for work, (model, X) in WORK.items():
    J = batched_jacobian(model, X)
    times = {"write to new memory": seconds(write_new, J)}
    times |= {name: seconds(method, model, X) for name, method in METHODS.items()}
    times["batched_jacobian, out="] = seconds(reuse, model, X, J)
    times["write to the same memory"] = limit = seconds(write_same, J)
    results[work] = times
    ours, reused = times["batched_jacobian"], times["batched_jacobian, out="]
    other = min(times["vmap(jacrev)"], times["SqrtGGNExact"])
    size = sum(block.nbytes for block in J.values()) / 1e6
    print(f"{work}, J of {size:.3g} MB:")
    print(f"  {ours * 1e3:.3g} ms, with out= {reused * 1e3:.3g} ms")
    print(f"  the fastest other method takes x {other / ours:.2f} of the first,")
    print(f"  and x {other / reused:.2f} of the second;")
    print(f"  writing to the same memory takes x {limit / reused:.2f} of the second.")
    del J
    _ = gc.collect()

# %%
# The picture shows the times as multiples of the last bar, the time to write J to the
# same memory. The first bar writes J to memory that PyTorch has just allocated.

COLORS = "0.7 #E69F00 #009E73 #56B4E9 #0072B2 0.4".split()
fig, axes = plt.subplots(len(WORK), figsize=(5.5, 9), layout="constrained")
for ax, (work, times) in zip(axes, results.items()):
    ratios = {name: t / times["write to the same memory"] for name, t in times.items()}
    bars = ax.barh(list(ratios), ratios.values(), color=COLORS)
    ax.bar_label(bars, [f"x {ratio:.3g}" for ratio in ratios.values()], padding=2)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set_title(work, loc="left")
axes[-1].set_xlabel("time / time to write J to the same memory")
fig.suptitle("Time of each method, in units of writing J")
plt.show()

# %%
# Growth with N
# -------------
# The work grows as ``N``. We fit how the time and the memory grow, on logarithmic axes.
# The memory is the Jacobian, and the peak of what is allocated beside it.

sizes, times, peaks = (64, 128, 256), [], []
model = mlp(64, 128, 128, 10)
for size in sizes:
    X = torch.rand(size, 64)
    J = batched_jacobian(model, X)
    times.append(seconds(reuse, model, X, J))
    with autograd.profiler.profile(profile_memory=True) as recorded:
        batched_jacobian(model, X, out=J)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events))
    peaks.append(peak + sum(block.nbytes for block in J.values()))
slopes = {}
for quantity, values in {"time": times, "memory": peaks}.items():
    slopes[quantity], _ = np.polyfit(np.log(sizes), np.log(values), 1)
    print(f"The {quantity} grows as N to the power of {slopes[quantity]:.2f}.")
torch.set_num_threads(default_threads)

# %%
# Where to go next
# ----------------
# Next: ``scale/jacobians_without_memory.py`` keeps the factors and never builds J. The
# alternative: ``compute/choosing_a_method.py`` compares the methods with less code.
