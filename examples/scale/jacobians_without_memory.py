r"""
Jacobians that do not fit in memory
===================================

After this page you can say beforehand whether a batched Jacobian fits in memory,
compute it in chunks, reduce it while it streams by, and multiply with it without
storing it. For linear layers you store two factors instead. From them you compute the
empirical neural tangent kernel (NTK), its trace, and gradient norms.
"""

import copy
import gc
import os
import re
import time
import warnings
from contextlib import suppress
from itertools import accumulate, chain, product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.autograd.graph import get_gradient_edge
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy, normalize, unfold
from torch.random import fork_rng
from torch.testing import assert_close
from torch.utils.benchmark import Timer

# %%
# Reference
# ---------
# ``fs = model(X)`` has shape ``[N, C]``. The Jacobian ``J`` of a parameter ``p`` has
# shape ``[N, C, *p.shape]``. We check in double precision on small models, against a
# loop over ``fs[n, c]``, and measure in single precision on larger ones. Your model,
# ``X`` and the state of the random generator stay as they are.

torch.set_default_dtype(torch.float64)
default_threads = torch.get_num_threads()
torch.set_num_threads(1)  # least disturbed by other programs
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr
warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
_ = torch.manual_seed(0)


def forward(model, X):
    """Return ``fs [N, C]`` and the parameters that require a gradient, or raise."""
    with torch.enable_grad(), fork_rng([X.device] if X.is_cuda else []):
        fs = model(X.detach().clone())
    shape = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != len(X):
        raise ValueError(f"model(X) is {shape}, but must be [N={len(X)}, C]")
    if not fs.numel():
        raise ValueError(f"model(X) is {shape}: no sample or no output")
    if not fs.requires_grad:
        raise ValueError("model(X) depends on no parameter that requires a gradient")
    return fs, {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop(fs, params):
    """Return ``{name: J [N, C, *p.shape]}`` from N * C backward passes."""
    J = {name: p.new_empty(*fs.shape, *p.shape) for name, p in params.items()}
    options = {"retain_graph": True, "materialize_grads": True}  # zero if unused
    for n, c in product(*map(range, fs.shape)):
        rows = autograd.grad(fs[n, c], params.values(), **options)
        for block, row in zip(J.values(), rows):
            block[n, c] = row
    return J


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU after each but the last."""
    layers = []
    for pair in zip(widths, widths[1:]):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


N, C = 6, 4
model, X = mlp(9, 8, 7, C), torch.rand(N, 9)
J = loop(*forward(copy.deepcopy(model), X))
print(f"J has {N} x {C} rows and {sum(b[0, 0].numel() for b in J.values())} columns.")

# %%
# Memory plan
# -----------
# Count before you compute. ``J`` has to fit once, and twice if your method copies it in
# the end. If it does not fit, some samples of it may. If you need some parameters only,
# such as the last layer, freeze the others.


def free_bytes(device):
    """Return the free bytes of a GPU, or of a Linux system, or all bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_plan(model, X, available):
    """Return the bytes of J, how many J fit, and how many samples of J fit."""
    fs, params = forward(copy.deepcopy(model), X)
    sample = fs.shape[1] * sum(p.nbytes for p in params.values())
    size = len(fs) * sample
    samples = min(len(fs), available // sample)
    return {"bytes": size, "times": available // size, "samples": samples}


plan = memory_plan(model, X, available=10_000)
assert plan["bytes"] == sum(block.nbytes for block in J.values())
print(f"J has {plan['bytes']} bytes. 10000 hold {plan['samples']} of {N} samples.")

large, X_large = mlp(784, 256, 256, 10).float(), torch.rand(64, 784).float()
plan = memory_plan(large, X_large, free_bytes(X_large.device))
large_bytes = plan["bytes"]
print(f"MLP 784-256-256-10, N = 64: {large_bytes / 1e6:.0f} MB")
print(f"It fits {plan['times']} times, and {plan['samples']} of the samples fit.")
last = copy.deepcopy(large).requires_grad_(False)
_ = last[-1].requires_grad_()
plan = memory_plan(last, X_large, free_bytes(X_large.device))
print(f"The last layer alone: {plan['bytes'] / 1e6:.1f} MB")

# %%
# Chunks of samples and outputs
# -----------------------------
# ``jacobian_chunks`` yields one part of ``J`` after the other, from ``vmap(jacrev)``.
# ``write_jacobian`` writes them into ``out``, which you allocate once and can use again
# in each step.
#
# Where samples influence each other, as in a softmax over the batch, a chunk on its own
# is no part of ``J``. One backward pass finds out: for random ``u`` of shape
# ``[N, C]``, the gradient of the sum of ``u * fs`` equals the sum of
# ``u[n, c] J[n, c]``. The error comes only after the last chunk was yielded.


def random_weights(fs):
    """Return the same ``u`` of the shape of ``fs`` in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(fs.shape, generator=generator, dtype=fs.dtype).to(fs.device)


def unequal(found, expected):
    """Return the names in ``expected`` for which ``found`` is missing or differs."""
    names = []
    for name, b in expected.items():
        bound = torch.finfo(b.dtype).eps ** (2 / 3) * b.norm()
        if name not in found or not (found[name] - b).norm() <= bound:  # nan differs
            names.append(name)
    return names


def vmap_jacrev(model, params, X, outputs=slice(None), chunk_sizes=(None, None)):
    """Return ``{name: J}`` for these outputs of each sample on its own."""

    def f(params, x):
        return functional_call(model, params, (x[None],))[0, outputs]

    values = {name: p.detach() for name, p in params.items()}
    jacobian = jacrev(f, chunk_size=chunk_sizes[1])
    with torch.no_grad():
        return vmap(jacobian, (None, 0), chunk_size=chunk_sizes[0])(values, X.clone())


def jacobian_chunks(model, X, samples, outputs):
    """Yield ``n, c, {name: J[n, c]}`` with slices of so many samples and outputs.

    Raises ``ValueError`` after the last chunk if the chunks do not make up J.
    """
    model = copy.deepcopy(model)
    fs, params = forward(model, X)
    u = random_weights(fs)
    grads = autograd.grad(fs, params.values(), u, materialize_grads=True)
    sums = {name: torch.zeros_like(p.detach()) for name, p in params.items()}
    starts = product(range(0, len(fs), samples), range(0, fs.shape[1], outputs))
    for n, c in starts:
        n, c = slice(n, n + samples), slice(c, c + outputs)
        chunk = vmap_jacrev(model, params, X[n], c)
        for name, block in chunk.items():
            sums[name] += torch.tensordot(u[n, c], block, 2)
        yield n, c, chunk
        del chunk, block  # before the next chunk is made
    if names := unequal(sums, dict(zip(params, grads))):
        raise ValueError(f"the chunks do not make up the Jacobian of {names}")


def check(title, tensors, shapes):
    """Raise ``ValueError`` unless ``tensors`` has these names and shapes."""
    for name in shapes | tensors:
        shape = list(tensors[name].shape) if name in tensors else None
        if shape != shapes.get(name):
            wanted = shapes.get(name)
            raise ValueError(f"{title}[{name!r}] is {shape}, but must be {wanted}")


def write_jacobian(model, X, out, samples, outputs):
    """Write J into ``out``, ``{name: [N, C, *p.shape]}``, in chunks.

    Raises ``ValueError`` before it writes if ``out`` has another name, shape or type,
    is not contiguous, or shares memory, and afterwards if the chunks do not make up J.
    """
    fs, params = forward(copy.deepcopy(model), X)
    check("out", out, {name: [*fs.shape, *p.shape] for name, p in params.items()})
    used = {"X": X, **dict(model.named_parameters()), **dict(model.named_buffers())}
    used = {key: tensor.untyped_storage() for key, tensor in used.items()}
    spans = {key: (s.data_ptr(), s.data_ptr() + s.nbytes()) for key, s in used.items()}
    for name, block in out.items():
        if (block.dtype, block.device) != (params[name].dtype, params[name].device):
            wanted = f"{params[name].dtype} on {params[name].device}"
            raise ValueError(f"out[{name!r}] is {block.dtype}, but must be {wanted}")
        if not block.is_contiguous():
            raise ValueError(f"out[{name!r}] is not contiguous")
        start, end = block.data_ptr(), block.data_ptr() + block.nbytes
        for other, (other_start, other_end) in spans.items():
            if start < other_end and other_start < end:
                raise ValueError(f"out[{name!r}] shares memory with {other}")
        spans[f"out[{name!r}]"] = start, end
    for n, c, chunk in jacobian_chunks(model, X, samples, outputs):
        for name, block in chunk.items():
            out[name][n, c] = block
        del chunk, block


out = {name: torch.empty_like(block) for name, block in J.items()}
write_jacobian(model, X, out, samples=4, outputs=3)
assert_close(out, J)
print("Chunks of 4 samples and 3 outputs make up J.")

mixing = nn.Sequential(nn.Linear(9, C), nn.Softmax(dim=0))
try:
    for _ in jacobian_chunks(mixing, X, samples=4, outputs=3):
        pass
except ValueError as error:
    print(f"Softmax over the samples: ValueError: {error}")
else:
    raise AssertionError("the check of the chunks is blind")

# %%
# Streaming
# ---------
# If you need a sum over ``J`` only, add up each chunk and drop it. An example is the
# diagonal of the matrix ``J^T J``. The loop variable keeps a chunk alive: ``del`` it,
# or two chunks exist at once.


def gram_diagonal(model, X, samples, outputs):
    """Return the diagonal of ``J^T J``, ``{name: [*p.shape]}``, from chunks."""
    diagonal = {}
    for _, _, chunk in jacobian_chunks(model, X, samples, outputs):
        for name, block in chunk.items():
            diagonal[name] = diagonal.get(name, 0) + block.square_().sum((0, 1))
        del chunk, block
    return diagonal


squares = {name: block.square().sum((0, 1)) for name, block in J.items()}
assert_close(gram_diagonal(model, X, samples=4, outputs=3), squares)
print("The streamed diagonal agrees with the loop.")

# %%
# Products with J and its transpose
# ---------------------------------
# ``J v`` is a derivative in forward mode, and ``J^T u`` is a gradient. Each is one
# pass, whatever the size of ``J``. `curvlinops <https://curvlinops.readthedocs.io>`_
# has both as linear operators that run over a whole data set.


def jacobian_product(model, X, v):
    """Return ``J v [N, C]`` for ``v``, ``{name: [*p.shape]}``."""
    model = copy.deepcopy(model)
    params = forward(model, X)[1]
    check("v", v, {name: list(p.shape) for name, p in params.items()})
    values = {name: p.detach() for name, p in params.items()}

    def f(values):  # writes to buffers go to the clones
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, buffers | values, (X.detach().clone(),))

    with fork_rng([X.device] if X.is_cuda else []):
        return jvp(f, (values,), (v,))[1]


def transposed_product(model, X, u):
    """Return ``J^T u``, ``{name: [*p.shape]}``, for ``u [N, C]``."""
    fs, params = forward(copy.deepcopy(model), X)
    check("u", {"": u}, {"": list(fs.shape)})
    grads = autograd.grad(fs, params.values(), u, materialize_grads=True)
    return dict(zip(params, grads))


v = {name: torch.rand_like(p) for name, p in model.named_parameters()}
u = torch.rand(N, C)
J_v = sum(torch.einsum("nc...,...->nc", block, v[name]) for name, block in J.items())
J_u = {name: torch.einsum("nc,nc...->...", u, block) for name, block in J.items()}
assert_close(jacobian_product(model, X, v), J_v)
assert_close(transposed_product(model, X, u), J_u)
print("J v and J^T u agree with the loop.")

# %%
# Peak memory and chunk_size
# --------------------------
# We measure the peak as the largest sum of the bytes that PyTorch allocates and frees
# in a call. ``chunk_size`` bounds what ``vmap`` or ``jacrev`` work on at once, but in
# the end they copy all chunks into one result. Where ``J`` is most of the memory, it
# raises the peak. Compare ``no chunks`` with ``chunks into out``, too: chunks pay where
# hidden values, not ``J``, take the memory, as in the CNN of
# ``compute/choosing_a_method.py``.


def peak_bytes(function, *args):
    """Return the peak of the bytes that PyTorch allocates in ``function(*args)``."""
    gc.collect()  # nothing older may be freed in the call
    with profile(profile_memory=True) as recorded:
        function(*args)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


gc.freeze()  # what exists now is no garbage, and a search through it takes long
net, X_net = mlp(64, 128, 128, 10).float(), torch.rand(64, 64).float()
weights = dict(net.named_parameters())
one = {name: p.detach() for name, p in weights.items()}


def chunked(*sizes):
    return vmap_jacrev(net, weights, X_net, slice(None), sizes)


def allocated():
    out = {name: p.new_empty(64, 10, *p.shape) for name, p in one.items()}
    write_jacobian(net, X_net, out, 8, 10)


methods = {
    "no chunks": lambda: chunked(None, None),
    "vmap, chunk_size=8": lambda: chunked(8, None),
    "jacrev, chunk_size=2": lambda: chunked(None, 2),
    "chunks into out": allocated,
    "streamed": lambda: gram_diagonal(net, X_net, 8, 10),
    "J v": lambda: jacobian_product(net, X_net, one),
    "J^T u": lambda: transposed_product(net, X_net, torch.ones(64, 10).float()),
}
net_bytes = memory_plan(net, X_net, free_bytes(X_net.device))["bytes"]
peaks = {name: peak_bytes(call) / net_bytes for name, call in methods.items()}
for name, peak in peaks.items():
    print(f"{name}: peak / J = {peak:.3f}")
for name in "vmap, chunk_size=8", "jacrev, chunk_size=2", "chunks into out":
    assert peaks[name] > peaks["no chunks"], f"{name} no longer raises the peak"

# %%
# Factors of linear layers
# ------------------------
# A linear layer with inputs ``a [N, I]`` and outputs ``[N, O]`` has
# ``J[n, c, o, i] = delta[n, c, o] a[n, i]`` for its weight, and ``delta`` for its bias.
# ``delta`` is the derivative of ``fs[n, c]`` with respect to the layer's outputs for
# sample ``n`` (in ``scale/universal_jacobian.py``, ``c`` comes first). The factors take
# ``N (C O + I)`` numbers, the product ``N C O I``.
#
# - A forward hook keeps ``a`` and the place of the outputs in the graph. One call of
#   ``autograd.grad`` with ``is_grads_batched=True`` and ``C`` cotangents gives all
#   ``delta``, as long as samples do not influence each other.
# - On sequences ``[N, T, I]``, the outer products for the ``T`` steps add up. So do
#   those of several calls, and of layers with one weight: we join them along ``T``.
# - Other parameters get their block from ``vmap(jacrev)``.
# - All is checked with ``u``, as the chunks are. What differs comes from the loop,
#   which is slow and exact.


def jacobian_factors(model, X):
    """Return ``layers, blocks``: J as factors, and as blocks for other parameters.

    ``layers`` is a list of ``delta [N, C, T, O], {name: a}``, with ``a [N, T, I]`` for
    a weight, and ones ``[N, T]`` for a bias. ``blocks`` is
    ``{name: J [N, C, *p.shape]}``. Raises ``ValueError`` if ``model(X)`` is not
    ``[N, C]``, is empty, or depends on no parameter that requires a gradient.
    """
    copied, calls, layers, blocks = copy.deepcopy(model), [], [], {}

    def keep(layer, inputs, output):
        if inputs and output.requires_grad:
            calls.append((layer, inputs[0].detach(), get_gradient_edge(output)))

    for module in copied.modules():
        if type(module) is nn.Linear:  # its forward pass may differ in a subclass
            module.register_forward_hook(keep)
    fs, params = forward(copied, X)
    N, C = fs.shape
    held, deltas, u = calls.copy(), [], random_weights(fs)
    options = {"retain_graph": True, "materialize_grads": True}
    truth = dict(zip(params, autograd.grad(fs, params.values(), u, **options)))
    with suppress(Exception):  # no calls, or no batched derivative
        E = torch.eye(C, dtype=fs.dtype, device=fs.device)[:, None].expand(C, N, C)
        edges = [edge for _, _, edge in held]
        options = {"retain_graph": True, "allow_unused": True}
        deltas = autograd.grad(fs, edges, E, is_grads_batched=True, **options)
    held = [(layer, a, d) for (layer, a, _), d in zip(held, deltas) if d is not None]

    groups = {}  # the names of the parameters that have their calls in common
    for name, p in params.items():
        own = [call[1:] for call in held if p is call[0].weight or p is call[0].bias]
        if own:
            key = tuple(id(a) for a, _ in own)
            groups.setdefault(key, (own, []))[1].append(name)
    for own, names in groups.values():
        with suppress(RuntimeError):  # axis 0 is not that of the samples
            a = torch.cat([a.reshape(N, -1, a.shape[-1]) for a, _ in own], 1)
            delta = [d.reshape(C, N, -1, d.shape[-1]) for _, d in own]
            delta = torch.cat(delta, 2).transpose(0, 1)
            ones = a.new_ones(a.shape[:2])
            inputs = {name: a if params[name].ndim == 2 else ones for name in names}
            found = transposed_factor_product(([(delta, inputs)], {}), u)
            wrong = unequal(found, {name: truth[name] for name in names})
            inputs = {name: a for name, a in inputs.items() if name not in wrong}
            layers += [(delta, inputs)] if inputs else []

    for _, inputs in layers:
        for name in inputs:
            del truth[name]
    if truth:
        with suppress(Exception):  # vmap does not take every model
            rest = {name: params[name] for name in truth}
            blocks = vmap_jacrev(copy.deepcopy(model), rest, X)
        found = transposed_factor_product(([], blocks), u)
        if names := unequal(found, truth):
            blocks |= loop(fs, {name: params[name] for name in names})
    return layers, blocks


def weighted(factors, u):
    """Return the factors of the sum over ``c`` of ``u[n, c] J[n, c]``, with C = 1."""
    layers, blocks = factors
    for rows in [delta for delta, _ in layers] + list(blocks.values()):
        check("u", {"": u}, {"": list(rows.shape[:2])})
    deltas = [torch.einsum("nc,ncto->nto", u, delta)[:, None] for delta, _ in layers]
    blocks = {k: torch.einsum("nc,nc...->n...", u, b) for k, b in blocks.items()}
    layers = [(delta, inputs) for delta, (_, inputs) in zip(deltas, layers)]
    return layers, {name: block[:, None] for name, block in blocks.items()}


def transposed_factor_product(factors, u):
    """Return ``J^T u``, ``{name: [*p.shape]}``, for ``u [N, C]``."""
    result = {}
    for name, block in factors[1].items():
        check("u", {"": u}, {"": list(block.shape[:2])})
        result[name] = torch.tensordot(u, block, 2)
    for delta, inputs in weighted((factors[0], {}), u)[0]:
        for name, a in inputs.items():
            result[name] = torch.einsum("ncto,nt...->o...", delta, a)
    return result


def factor_product(factors, v):
    """Return ``J v [N, C]`` for ``v``, ``{name: [*p.shape]}``."""
    layers, blocks = factors
    shapes = {name: list(block.shape[2:]) for name, block in blocks.items()}
    for delta, inputs in layers:
        shapes |= {k: [delta.shape[3], *a.shape[2:]] for k, a in inputs.items()}
    check("v", v, shapes)
    result = sum(torch.einsum("nc...,...->nc", b, v[k]) for k, b in blocks.items())
    for delta, inputs in layers:
        for name, a in inputs.items():
            outputs = torch.einsum("nt...,o...->nto", a, v[name])
            result = result + torch.einsum("ncto,nto->nc", delta, outputs)
    return result


def dense(factors):
    """Return ``{name: J [N, C, *p.shape]}``."""
    layers, blocks = factors
    return blocks | {
        name: torch.einsum("ncto,nt...->nco...", delta, a)
        for delta, inputs in layers
        for name, a in inputs.items()
    }


factors = jacobian_factors(model, X)
assert_close(dense(factors), J)
assert_close(factor_product(factors, v), J_v)
assert_close(transposed_factor_product(factors, u), J_u)
assert not factors[1], "linear layers have lost their factors"
print(f"Factors of {len(factors[0])} layers, {len(factors[1])} other blocks.")

# %%
# Tied and repeated layers on sequences, and parameters of other kinds. In training
# mode, batch norm mixes samples: layers before it get blocks.


class Sequence(nn.Module):
    """Tied and repeated layers on ``[N, T, 5]``, a norm, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.b.weight, self.scale = self.a.weight, nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, C)

    def forward(self, X):
        hidden = torch.tanh(self.a(torch.tanh(self.a(X))))
        return self.head((self.norm(self.b(hidden)) * self.scale).mean(1))


norm = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, C))
cases = {"sequence": (Sequence(), torch.rand(N, 3, 5)), "batch norm": (norm, X)}
for title, (case, inputs) in cases.items():
    reference = loop(*forward(copy.deepcopy(case), inputs))
    layers, blocks = jacobian_factors(case, inputs)
    assert_close(dense((layers, blocks)), reference)
    names = [name for _, inputs in layers for name in inputs]
    print(f"{title}: factors for {names}, blocks for {list(blocks)}")

# %%
# Empirical NTK
# -------------
# The NTK is ``J J^T``, of shape ``[N, C, N, C]``. The function ``ntk`` returns it, and
# the code calls it ``K``. Each linear layer adds the products of ``delta`` for the two
# rows, times those of ``a``, plus one for the bias:
# ``(delta_nc . delta_md) (a_n . a_m + 1)``. On sequences there is a term for each pair
# of steps. If there are more pairs than inputs, the block itself needs fewer products:
# ``slices`` makes some rows of the weight at a time.


def slices(delta, inputs):
    """Yield J for some outputs of the layer, ``[N, C, -1]``, no larger than delta."""
    N, C, steps, outputs = delta.shape
    width = sum(a[0, 0].numel() for a in inputs.values())
    for d in delta.split(max(1, steps * outputs // width), 3):
        parts = [torch.einsum("ncto,nt...->nco...", d, a) for a in inputs.values()]
        yield torch.cat([part.reshape(N, C, -1) for part in parts], 2)


def many_steps(inputs):
    """Return whether there are more pairs of steps than inputs of the layer."""
    return all(a.shape[1] ** 2 > a[0, 0].numel() for a in inputs.values())


def kernel(factors):
    """Return the NTK ``[N, C, N, C]``."""
    layers, blocks = factors
    first = [*(delta for delta, _ in layers), *blocks.values()][0]
    N, C = first.shape[:2]
    K = first.new_zeros(C, N, C, N)
    for delta, inputs in layers:
        if many_steps(inputs):
            continue
        D = delta.permute(2, 1, 0, 3).contiguous()  # [T, C, N, O]
        A = sum(torch.einsum("nt...,ms...->tsnm", a, a) for a in inputs.values())
        for c, t, s in product(range(C), range(len(D)), range(len(D))):
            products = D[t, c] @ D[s, c:].flatten(0, 1).T
            K[c, :, c:].addcmul_(products.view(N, C - c, N), A[t, s, :, None])
    for c in range(C):  # only the half with d >= c is computed
        K[c + 1 :, :, c] = K[c, :, c + 1 :].permute(1, 2, 0)
    long = [slices(*layer) for layer in layers if many_steps(layer[1])]
    for block in chain(blocks.values(), *long):
        flat = block.reshape(N * C, -1)
        K += (flat @ flat.T).view(N, C, N, C).permute(1, 0, 3, 2)
    return K.permute(1, 0, 3, 2)


def squared_norms(factors):
    """Return the squared norm of each row of J, the diagonal of the NTK, ``[N, C]``."""
    layers, blocks = factors
    result = sum(b.reshape(*b.shape[:2], -1).square().sum(2) for b in blocks.values())
    for delta, inputs in layers:
        if many_steps(inputs):
            result = result + sum(
                part.square().sum(2) for part in slices(delta, inputs)
            )
        else:
            A = sum(torch.einsum("nt...,ns...->nts", a, a) for a in inputs.values())
            result = result + (delta @ delta.mT * A[:, None]).sum((2, 3))
    return result


def ntk(model, X):
    """Return the NTK ``[N, C, N, C]``. Raises as ``jacobian_factors`` does."""
    return kernel(jacobian_factors(model, X))


flat = torch.cat([block.flatten(2) for block in J.values()], 2)
K = torch.einsum("ncp,mdp->ncmd", flat, flat)
assert_close(ntk(model, X), K)
diagonal = torch.einsum("ncnc->nc", K)
assert_close(squared_norms(factors), diagonal)
trace = K.flatten(0, 1).flatten(1).trace()
assert_close(squared_norms(factors).sum(), trace)
print(f"NTK {list(K.shape)}, its diagonal and its trace {trace:.3f} agree.")

# %%
# Gradient norms per sample
# -------------------------
# The gradient of a loss of sample ``n`` is the sum over ``c`` of ``g[n, c] J[n, c]``,
# where ``g`` is the derivative of the loss with respect to ``fs``. So ``weighted``
# gives its factors, and these its norm.

fs, params = forward(copy.deepcopy(model), X)
losses = cross_entropy(fs, torch.arange(N) % C, reduction="none")
(g,) = autograd.grad(losses.sum(), fs, retain_graph=True)
norms = squared_norms(weighted(factors, g))[:, 0].sqrt()
for loss, found in zip(losses, norms):
    grads = autograd.grad(loss, params.values(), retain_graph=True)
    assert_close(found, torch.cat([grad.flatten() for grad in grads]).norm())
print("Gradient norms:", ", ".join(f"{found:.3f}" for found in norms))

# %%
# NTK against the contraction of a dense Jacobian
# -----------------------------------------------
# `PyTorch's tutorial on the NTK
# <https://docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html>`_
# computes ``J`` with ``vmap(jacrev)`` and contracts the blocks of each parameter with
# themselves. ``dense_ntk`` does that. Both run on one thread, in the same process: the
# dense method once, cold, and the other many times, of which we take the median.


def dense_ntk(model, X):
    """Return the NTK ``[N, C, N, C]`` from a Jacobian in memory."""
    J = vmap_jacrev(model, dict(model.named_parameters()), X)
    blocks = [block.flatten(2) for block in J.values()]
    K = sum(torch.einsum("Naf,Mbf->NMab", block, block) for block in blocks)
    return K.transpose(1, 2)


def milliseconds(function, *args, run_time=0.05):
    names = {"function": function, "args": args}
    timer = Timer("function(*args)", globals=names)
    return 1e3 * timer.blocked_autorange(min_run_time=run_time).median


assert_close(dense_ntk(model, X), K)
start = time.perf_counter()
_ = dense_ntk(large, X_large)
dense_time = 1e3 * (time.perf_counter() - start)
dense_peak = peak_bytes(dense_ntk, large, X_large)
peak, ms = peak_bytes(ntk, large, X_large), milliseconds(ntk, large, X_large)
print(f"MLP 784-256-256-10, N = 64, C = 10: J has {large_bytes / 1e6:.0f} MB")
print(f"dense: {dense_time:.0f} ms, peak {dense_peak / 1e6:.1f} MB")
print(f"factors: {ms:.1f} ms, peak {peak / 1e6:.1f} MB")
print(f"The factors take 1/{dense_time / ms:.0f} of the time,")
print(f"and 1/{dense_peak / peak:.0f} of the peak.")
peaks["NTK from J"] = dense_peak / large_bytes
peaks["NTK from factors"] = peak / large_bytes

# %%
# Now take the width from the memory of the machine, so that ``J`` alone is larger.

machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
width = int((machine / (64 * 10 * 4)) ** 0.5)  # the middle layer alone fills it
huge = mlp(784, width, width, 10).float()
plan = memory_plan(huge, X_large, machine)
assert plan["times"] == 0
start = time.perf_counter()
peak = peak_bytes(ntk, huge, X_large)
seconds = time.perf_counter() - start
print(f"Width {width}: J has {plan['bytes'] / 1e9:.1f} GB")
print(f"The machine has {machine / 1e9:.1f} GB")
print(f"NTK from factors: {seconds:.1f} s, peak {peak / 1e9:.2f} GB")

# %%
# We draw the peaks as multiples of the Jacobian, the gray line. The last two bars
# belong to the MLP 784-256-256-10, the others to 64-128-128-10.

fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
bars = ax.barh(list(peaks), list(peaks.values()), color="#0072B2")
ax.bar_label(bars, [f" {peak:.2g}" for peak in peaks.values()])
ax.axvline(1, color="0.5")
ax.invert_yaxis()
ax.margins(x=0.2)
ax.set(xscale="log", xlabel="peak / Jacobian", title="Peak memory of each method")
plt.show()

# %%
# Picture of the NTK
# ------------------
# The NTK of two samples is large where a step that changes the output for one changes
# it for the other. We take three groups of similar samples. The rows are sorted by
# group, then by sample, then by output, so the two outputs alternate.

groups, members, C_groups = 3, 5, 2
centers = 3 * normalize(torch.randn(groups, 9)).repeat_interleave(members, 0)
grouped = centers + 0.2 * torch.randn(groups * members, 9)
K = ntk(mlp(9, 1000, C_groups), grouped).flatten(0, 1).flatten(1)
assert_close(K, K.T)

mean = K.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).mean((1, 3))
within, between = mean.diagonal(), mean[~torch.eye(groups, dtype=torch.bool)]
assert within.min() > between.max()
print(f"Mean entry: {within.mean():.2f} within groups, {between.mean():.2f} between.")

fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
image = ax.imshow(K.numpy(), cmap="cividis")
edges = [members * C_groups * g - 0.5 for g in range(groups + 1)]
ax.vlines(edges[1:-1], edges[0], edges[-1], color="white")
ax.hlines(edges[1:-1], edges[0], edges[-1], color="white")
middle = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
names = [f"group {g}" for g in range(groups)]
ax.set_xticks(middle, names)
ax.set_yticks(middle, names, rotation=90, va="center")
ax.set_title(f"NTK of {groups * members} samples, {C_groups} outputs each")
fig.colorbar(image, location="bottom", label="entry of the NTK")
plt.show()

# %%
# Sequences and convolutions
# --------------------------
# With ``T`` steps, the factors take ``N T (C O + I)`` numbers, the block still
# ``N C O I``: long sequences need the block. We print the ratio of the two, and those
# of time and peak of the NTK. A convolution is such a layer, with ``T`` positions and
# patches of ``I`` inputs, which ``unfold`` copies. ``jacobian_factors`` stores the
# block of a convolution, even where factors are smaller: here there are more pairs of
# positions than inputs, so the NTK needs the block anyway.


class Mean(nn.Module):
    def forward(self, X):
        return X.mean(1)


def against_dense(model, X):
    time = milliseconds(ntk, model, X) / milliseconds(dense_ntk, model, X)
    peak = peak_bytes(ntk, model, X) / peak_bytes(dense_ntk, model, X)
    return f"NTK: time x {time:.2f}, peak x {peak:.2f}"


for T in (1, 8, 64):
    layers = nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 48), nn.ReLU(), Mean()
    sequence, X_T = nn.Sequential(*layers, nn.Linear(48, 10)), torch.rand(16, T, 24)
    assert_close(ntk(sequence, X_T), dense_ntk(sequence, X_T))
    delta, inputs = jacobian_factors(sequence, X_T)[0][1]
    a = inputs["2.weight"]
    ratio = (delta.numel() + a.numel()) / (16 * 10 * 48 * 40)
    print(f"T = {T}: factors / block = {ratio:.2f}")
    print(f"  {against_dense(sequence.float(), X_T.float())}")

convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
convolutions += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4)]
cnn = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 10))
images = torch.rand(16, 1, 8, 8)
J = vmap_jacrev(cnn, dict(cnn.named_parameters()), images)
for i in (0, 3):
    a = unfold(cnn[:i](images), 3, padding=1).mT
    delta = vmap(jacrev(lambda h, i=i: cnn[i + 1 :](h[None])[0]))(cnn[: i + 1](images))
    block = torch.einsum("nctO,nti->ncOi", delta.detach().flatten(3).mT, a.detach())
    assert many_steps({"weight": a})
    assert_close(block.view_as(J[f"{i}.weight"]), J[f"{i}.weight"])
    ratio = (delta.numel() + a.numel()) / block.numel()
    print(f"convolution {i}: factors / block = {ratio:.2f}")
assert_close(ntk(cnn, images), dense_ntk(cnn, images))
print(f"  {against_dense(cnn.float(), images.float())}")
torch.set_num_threads(default_threads)

# %%
# Where to go next
# ----------------
# Next: ``scale/distributed_jacobians.py`` splits ``J`` over processes. The alternative:
# ``scale/universal_jacobian.py`` writes all of ``J``, and checks it.
