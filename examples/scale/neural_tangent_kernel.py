r"""
Neural tangent kernel without the Jacobian
==========================================

After this page you can compute the empirical neural tangent kernel (NTK) of a network,
of one batch or between two, and the norm of every sample's gradient: without the
Jacobian where layers are linear, and in tiles where convolutions need a part of it.
"""

# fold: Imports
import copy
import math
import time
import timeit
import warnings
from contextlib import contextmanager
from itertools import combinations_with_replacement, pairwise, product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import one_hot, unfold
from torch.testing import assert_close

# %%
# Kernel of a small network
# -------------------------
# The NTK holds the inner products of the rows of the Jacobian ``J``: ``K = J J^T``, of
# shape ``[N, C, N, C]``. A linear layer with inputs ``a [N, I]`` and outputs ``[N, O]``
# has ``J[n, c, o, i] = delta[n, c, o] a[n, i]`` for its weight and ``delta`` for its
# bias, where ``delta [N, C, O]`` is the derivative of ``fs = model(X)`` by the layer's
# output. So its share of the kernel is a product of two small ones:
# ``(delta_nc . delta_md) (a_n . a_m + 1)``.

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)
N, C = 6, 4
model, X = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, C)), torch.rand(N, 9)

K = torch.zeros(N, C, N, C)
for i in 0, 2:
    a = model[:i](X)
    delta = vmap(jacrev(model[i + 1 :]))(model[: i + 1](X))
    A = (a @ a.mT + 1)[:, None, :, None]
    K += (torch.einsum("nco,mdo->ncmd", delta, delta) * A).detach()
print(f"K of shape {list(K.shape)} from factors: trace {K.view(N * C, -1).trace():.4f}")

# %%
# The reference multiplies all of ``J``, from one backward pass for each output of each
# sample.

# fold: The Jacobian from a loop, and its kernel


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def dense_ntk(J, other):
    """Return the NTK ``[N, C, M, C]`` from two Jacobians ``{name: block}``."""
    pairs = [(J[name].flatten(2), other[name].flatten(2)) for name in J]
    return sum(torch.einsum("ncp,mdp->ncmd", block, b) for block, b in pairs)


J = autograd_loop(model, X)
assert_close(K, dense_ntk(J, J))
print(f"J has {N * C} rows of {sum(b[0, 0].numel() for b in J.values())} numbers.")
print("The kernel from factors agrees with J J^T.")

# %%
# Factors of any model
# --------------------
# ``jacobian_factors`` finds the factors in any model. To the output of a layer it adds
# zeros, inside ``vmap(jacrev)``: the derivative by these zeros is ``delta``, and the
# layer's input comes along as an auxiliary output.
#
# - On sequences and images, the outer products for the ``T`` positions add up:
#   ``delta [N, C, T, O]`` and ``a [N, T, I]``. A convolution is a linear layer on the
#   patches that ``unfold`` cuts out. An embedding is one on one-hot inputs.
# - A bias is a weight for an input that is always 1, a last column of ``a``.
# - A layer that is called twice, or shares its weight, has more positions.
# - Factors pay if they hold fewer numbers than the block: ``T (C O + I) < C O I``. Long
#   sequences and large images have blocks, and so has every other parameter.

# fold: How the factors of a layer are found

AT_ONCE = 2**23  # derivatives by outputs of layers that are in memory


def has_factors(layer):
    """Return whether the layer is linear in inputs that we know how to arrange."""
    if type(layer) is nn.Conv2d:
        plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq
    return type(layer) is nn.Linear


def by_position(layer, delta, a):
    """Return ``delta [N, C, T, O]`` and ``a [N, T, I]`` of one call of a layer."""
    N, C = delta.shape[:2]
    if type(layer) is nn.Conv2d:
        a = a.reshape(-1, *a.shape[-3:])  # [N * images, channels, height, width]
        a = unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        delta = delta.flatten(-2).mT
    if type(layer) is nn.Embedding:
        a = one_hot(a, layer.num_embeddings).to(delta)
        if layer.padding_idx is not None:
            a[..., layer.padding_idx] = 0  # this row gets no gradient
        delta = delta.reshape(N, C, -1, delta.shape[-1])
    return delta.reshape(N, C, -1, delta.shape[-1]), a.reshape(N, -1, a.shape[-1])


def layer_calls(model, leaves, x):
    """Return the calls of layers with factors, ``[(layer, zeros like its output)]``."""
    layers = [m for m in model.modules() if has_factors(m)]
    layers = [m for m in layers if not m.weight.is_complex()]
    calls = []

    def record(layer, args, output):
        calls.append((layer, torch.zeros_like(output)))

    with hooked(layers, record):
        outputs(model, leaves, x)
    return calls


def called_together(model, leaves, calls, C):
    """Return ``{names: places in calls}`` where factors hold fewer than the block."""
    groups, together = {}, {}
    for name, p in model.named_parameters():
        owners = [(m.weight, getattr(m, "bias", None)) for m, _ in calls]
        places = [i for i, owned in enumerate(owners) if any(p is o for o in owned)]
        if places and name in leaves:
            groups.setdefault(tuple(places), []).append(name)
    for places, names in groups.items():
        layer, zeros = calls[places[0]]
        n_out = zeros.shape[1 if type(layer) is nn.Conv2d else -1]
        n_in = layer.weight.numel() // n_out
        T = sum(calls[i][1].numel() for i in places) // n_out
        is_one_kind = len({type(calls[i][0]) for i in places}) == 1
        if is_one_kind and T * (C * n_out + n_in) < C * n_out * n_in:
            together[tuple(names)] = places
    return together


def factors_from_vmap(model, leaves, X, C):
    """Return ``{names: (delta, a)}`` and, for other parameters, ``{name: block}``."""
    calls = layer_calls(model, leaves, X[:1])
    together = called_together(model, leaves, calls, C)
    places = set().union(*together.values())
    zeros = {i: calls[i][1] for i in places}
    values = {name: p.detach() for name, p in leaves.items()}
    fixed = {name: values.pop(name) for names in together for name in names}

    def f(values, zeros, x):
        place, inputs = iter(range(len(calls))), {}

        def add(layer, args, output):
            if (i := next(place)) in zeros:
                inputs[i] = args[0]
                return output + zeros[i]

        with hooked({layer for layer, _ in calls}, add):
            return outputs(model, fixed | values, x[None])[0], inputs

    numbers = C * sum(zero.numel() for _, zero in calls)  # of a sample, in backward
    options = {"chunk_size": max(1, AT_ONCE // max(1, numbers))}
    f_jacobian = vmap(jacrev(f, (0, 1), has_aux=True), (None, None, 0), **options)
    (blocks, deltas), inputs = f_jacobian(values, zeros, X.detach())
    factors = {}
    for names, of_names in together.items():
        parts = [by_position(calls[i][0], deltas[i], inputs[i]) for i in of_names]
        delta, a = (torch.cat(tensors, -2) for tensors in zip(*parts))
        ones = torch.ones_like(a[..., :1])
        columns = [a if leaves[name].ndim > 1 else ones for name in names]
        factors[names] = delta, torch.cat(columns, 2)
    return factors, blocks


# %%
# The factors are checked as ``trust/check_a_jacobian.py`` checks a Jacobian: for random
# ``u [N, C]``, the sum of ``u[n, c] J[n, c]`` is a gradient of the network. The sum
# comes from the factors, without ``J``. What differs, or cannot go through ``vmap``,
# comes from backward passes of the samples, and in the end of each output.

# fold: How the sums are compared, and how the model stays as it is

LIMIT = 10  # roundings: a right Jacobian is off by fewer


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


@contextmanager
def hooked(layers, hook):
    handles = [layer.register_forward_hook(hook, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def from_rows(rows, leaves, names):
    """Return ``{name: block}`` from the rows ``fs[n]``, each of shape ``[C]``."""
    values, blocks = [leaves[name] for name in names], []
    for row in rows:
        E = torch.eye(len(row)).to(row)
        try:
            options = {"is_grads_batched": True, "allow_unused": True}
            grads = autograd.grad(row, values, E, retain_graph=True, **options)
            zeros = (p.new_zeros(len(E), *p.shape) for p in values)
            blocks.append([zero if g is None else g for g, zero in zip(grads, zeros)])
        except Exception:  # an operation that cannot be batched
            options = {"retain_graph": True, "materialize_grads": True}
            grads = [autograd.grad(row, values, e, **options) for e in E]
            blocks.append([torch.stack([g.to_dense() for g in p]) for p in zip(*grads)])
    return dict(zip(names, map(torch.stack, zip(*blocks))))


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
# With these, ``jacobian_factors`` is short. A complex block gets a last axis for real
# and imaginary part, so that the kernel is ``Re(J J^H)``.

# fold: How the factors are checked and returned


def sums_of(model, factors, blocks, u):
    """Return ``{name: (the sum of u * J, the norm of J or a bound for it)}``."""
    sums = {}
    for names, (delta, a) in factors.items():
        size = norm(delta.flatten(2).norm(dim=2) * a.flatten(1).norm(dim=1)[:, None])
        weighted = torch.einsum("nc,ncto->nto", u.to(delta), delta)
        total = weighted.flatten(0, 1).mT @ a.flatten(0, 1)  # [O, I + 1]
        if type(model.get_submodule(names[0].rpartition(".")[0])) is nn.Embedding:
            total = total.mT
        widths = [total.shape[1] - 1, 1] if len(names) == 2 else [total.shape[1]]
        sums |= {k: (part, size) for k, part in zip(names, total.split(widths, 1))}
    for name, block in blocks.items():
        sums[name] = torch.tensordot(u.to(block.dtype), block, 2), norm(block)
    return sums


@torch.inference_mode(False)
@torch.enable_grad()
def jacobian_factors(model, X, structure=True):
    """Return J of ``fs = model(X)``, ``[N, C]``, as ``factors, blocks``.

    ``factors`` is ``{names: (delta [N, C, T, O], a [N, T, I])}``, with a last column of
    ones for a bias, and ``blocks`` is ``{name: J [N, C, *p.shape]}``; only these if
    ``structure`` is false. The names are those of the parameters that require a
    gradient. The model and ``X`` stay as they are. Raises ``ValueError`` if there are
    none, and if ``fs`` is not ``[N, C]``, real and finite.
    """
    left, factors, blocks = list(trainable(model)), {}, {}
    with unchanged(model):
        leaves, X = differentiable(trainable(model), X)
        copies = {name: p.clone() for name, p in leaves.items()}  # the model may write
        fs = outputs(model, copies, X)
        if fs.is_complex() or not fs.isfinite().all():
            raise ValueError("model(X) is not real and finite")
        u = random_weights(fs)
        rows = (outputs(model, leaves, x)[0] for x in X.split(1))
        ways = {
            "structure": lambda: factors_from_vmap(model, leaves, X, fs.shape[1]),
            "sample by sample": lambda: ({}, from_rows(rows, leaves, left)),
            "definition": lambda: ({}, from_rows(fs, leaves, left)),
        }
        for way in list(ways)[not structure :]:
            try:
                pairs, dense = ways[way]()
            except Exception:
                if way == "definition":
                    raise
                continue
            wrong = set()
            if way != "definition":
                sums = sums_of(model, pairs, dense, u)
                errors = errors_in_roundings(model, leaves, X, fs, u, sums)
                wrong = {name for name, error in errors.items() if not error <= LIMIT}
            for names, pair in pairs.items():
                if wrong.isdisjoint(names):
                    factors[names] = [tensor.detach().to(fs.dtype) for tensor in pair]
            for name in dense.keys() - wrong:
                block = dense[name].detach()
                block = torch.view_as_real(block) if block.is_complex() else block
                blocks[name] = block.to(fs.dtype)
            left = [k for k in left if k not in blocks and k not in sum(factors, ())]
            if not left:
                return factors, blocks


# %%
# Kernel of two batches
# ---------------------
# ``from ntk import ntk``: ``ntk(model, X)`` is the kernel of a batch with itself,
# ``ntk(model, X, Z)`` that of two. Both take any model with outputs ``[N, C]``. With
# ``traced=True`` it is the sum over equal outputs, the trace, ``[N, M]``.

# fold: How the kernel is summed up


def tiles(K, is_symmetric):
    """Yield ``n, m, K[n, :, m]`` for an eighth of the rows, up to the diagonal."""
    step = -(-len(K) // 8)
    for start in range(0, len(K), step):
        n = slice(start, start + step)
        m = slice(start + step if is_symmetric else None)
        yield n, m, K[n, :, m]


def add_factors(K, delta, a, delta_Z, a_Z):
    """Add the inner products of blocks that are given as factors to ``K``."""
    (C, T, n_out), (S, n_in) = delta.shape[1:], a_Z.shape[1:]
    is_symmetric = delta is delta_Z
    if T * S * (n_in + C * n_out) + C * C * T * n_out > C * C * n_out * n_in:
        rows = torch.einsum("ncto,nti->ncoi", delta, a)
        others = rows if is_symmetric else torch.einsum("ncto,nti->ncoi", delta_Z, a_Z)
        return add_blocks(K, rows, others)
    if T == S == 1:
        for n, m, tile in tiles(K, is_symmetric):
            D = torch.einsum("nco,mdo->ncmd", delta[n, :, 0], delta_Z[m, :, 0])
            tile.addcmul_(D, (a[n, 0] @ a_Z[m, 0].mT)[:, None, :, None])
        return
    rows, weights = delta.flatten(2), delta_Z.permute(0, 2, 3, 1).flatten(2)
    positions, memory = a.flatten(0, 1), a.new_empty(len(a) * T, weights.shape[2])
    for m, (weight, a_m) in enumerate(zip(weights, a_Z)):  # [S, O * C] and [S, I]
        start = m if is_symmetric else 0
        products = positions[start * T :] @ a_m.mT
        moved = torch.mm(products, weight, out=memory[start * T :])
        K[start:, :, m] += rows[start:] @ moved.view(-1, T * n_out, K.shape[3])


def add_blocks(K, rows, rows_Z):
    """Add the inner products of the rows of two blocks to ``K``."""
    for n, m, tile in tiles(K, rows is rows_Z):
        left, right = (
            r.reshape(r.shape[0] * r.shape[1], -1) for r in (rows[n], rows_Z[m])
        )
        tile.view(len(left), len(right)).addmm_(left, right.mT)


def kernel(J, J_Z):
    """Return the NTK ``[N, C, M, C]`` from two results of ``jacobian_factors``."""
    pairs = [(*pair, *J_Z[0][names]) for names, pair in J[0].items()]
    pairs_of_blocks = [(block, J_Z[1][name]) for name, block in J[1].items()]
    rows, rows_Z = pairs[0][::2] if pairs else pairs_of_blocks[0]
    K = rows.new_zeros(*rows.shape[:2], *rows_Z.shape[:2])
    for pair in pairs:
        add_factors(K, *pair)
    for pair in pairs_of_blocks:
        add_blocks(K, *pair)
    if J is J_Z:  # the other half
        for n in range(len(K) - 1):
            K[n, :, n + 1 :] = K[n + 1 :, :, n].permute(2, 0, 1)
    return K


def with_all_outputs_as_one(J):
    """Return J with the outputs as further columns, of shape ``[N, 1, ...]``."""
    factors, blocks = J
    pairs = {
        k: (d.transpose(1, 2).flatten(2)[:, None], a) for k, (d, a) in factors.items()
    }
    return pairs, {name: block[:, None] for name, block in blocks.items()}


def ntk(model, X, Z=None, traced=False):
    """Return the NTK ``[N, C, M, C]`` of ``X`` and ``Z``, or of ``X`` with itself.

    If ``traced``, return its sum over equal outputs, ``[N, M]``. Of complex parameters
    it is ``Re(J J^H)``. Raises as ``jacobian_factors`` does.
    """
    J = jacobian_factors(model, X)
    J_Z = J if Z is None else jacobian_factors(model, Z)
    if J[0].keys() != J_Z[0].keys():  # as for sequences of other lengths
        J, J_Z = (jacobian_factors(model, x, structure=False) for x in (X, Z))
    if traced:
        J, is_same = with_all_outputs_as_one(J), J is J_Z
        J_Z = J if is_same else with_all_outputs_as_one(J_Z)
    K = kernel(J, J_Z)
    return K[:, 0, :, 0] if traced else K


class Tagger(nn.Module):
    """A tied embedding and a norm; a layer that runs twice, on sequences."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, C)

    def forward(self, X):
        h = torch.tanh(self.twice(self.norm(self.words(X))))
        return self.head(torch.tanh(self.twice(h)).mean(1))


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def small_cnn(width, C):
    """Return two convolutions with average pooling, and a linear layer."""
    first = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
    second = nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2 * width, C))


cases = {
    "images": (small_cnn(8, C), torch.rand(N, 1, 8, 8), torch.rand(5, 1, 8, 8)),
    "words": (Tagger(), torch.randint(50, (N, 3)), torch.randint(50, (5, 3))),
}

# %%
# Call the model's ``eval()`` first. If samples mix, as for batch norm in training mode,
# blocks come from the definition, and take long. If ``fs`` is random, as for dropout,
# each call returns another kernel.

model_of_images, X_images, Z_images = cases["images"]
K = ntk(model_of_images.eval(), X_images, Z_images)
print(f"Between {N} and {len(Z_images)} images: {list(K.shape)}")

for title, (case, X_case, Z_case) in cases.items():
    J, J_Z = autograd_loop(case, X_case), autograd_loop(case, Z_case)
    K_XZ = ntk(case, X_case, Z_case)
    assert_close(ntk(case, X_case), dense_ntk(J, J))
    assert_close(K_XZ, dense_ntk(J, J_Z))
    assert_close(ntk(case, X_case, Z_case, traced=True), torch.einsum("ncmc->nm", K_XZ))
    factors, blocks = jacobian_factors(case, X_case)
    print(f"{title}: the kernel {list(K_XZ.shape)} agrees, and so does its trace.")
    print(f"  factors: {sorted(sum(factors, ()))}, blocks: {sorted(blocks)}")

# %%
# A pair of samples with ``T`` and ``S`` positions needs ``T S (I + C O) + C C T O``
# operations from factors and ``C C O I`` from blocks. ``add_factors`` counts, and takes
# the cheaper one. Of a kernel of one batch with itself it computes one half.
#
# Will it fit, and how long does it take?
# ---------------------------------------
# ``from ntk import ntk_cost``: it looks at a few samples. Factors and blocks take time
# and memory in proportion to ``N``, or ``N + M`` for two batches, their products to ``N
# ** 2``, or ``N M``. The peak is up to five times the memory of the factors and blocks,
# with ``K`` and some 200 MB on top, all counted. Pass 32 samples or more, or it says
# too much; the first call in a process takes some seconds more. Here for 2000 images,
# and for 2000 with 300 others:

# fold: ntk_cost


def ntk_cost(model, few, N, M=None):
    """Return about how many seconds ``ntk`` takes, and bytes at most, as a dictionary.

    It is for ``N`` samples like the few, with themselves or with ``M`` others.
    """
    J = jacobian_factors(model, few)
    J_Z = J if M is None else jacobian_factors(model, few)
    of_J = timeit.repeat(lambda: jacobian_factors(model, few), number=1, repeat=2)
    of_K = timeit.repeat(lambda: kernel(J, J_Z), number=1, repeat=5)
    samples, pairs = (N + (M or 0)) / len(few), N * (M or N) / len(few) ** 2
    tensors = [*sum(map(list, J[0].values()), []), *J[1].values()]
    held = sum(tensor.nbytes for tensor in tensors) * samples
    held += AT_ONCE * tensors[0].itemsize
    return {
        "seconds": min(of_J) * samples + min(of_K) * pairs,
        "bytes": 5 * held + kernel(J, J_Z).nbytes * pairs,
    }


# %%

layers = nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.ReLU()
mean = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
cnn, few = nn.Sequential(*layers, *mean).float(), torch.rand(32, 3, 32, 32).float()
for sizes in (2000,), (2000, 300):
    cost = ntk_cost(cnn, few, *sizes)
    gigabytes = cost["bytes"] / 1e9
    print(f"{sizes}: about {cost['seconds']:.0f} s, at most {gigabytes:.1f} GB")

# %%
# Kernel in tiles
# ---------------
# If ``K``, or ``J`` of convolutions, does not fit, write tiles into ``out``: of shape
# ``[N, C, N, C]``, or ``[N, N]`` for the sum over equal outputs, the trace. A tile of
# ``samples`` by ``samples`` needs memory for two of their Jacobians, twice. It computes
# them anew: time grows as ``N ** 2 / samples``, so take as many as fit. ``out`` may be
# a ``numpy.memmap`` in ``torch.from_numpy``. A tile knows only its samples, so
# ``samples_apart`` looks first, at two tiles at a time, whether others influence them.

# fold: How the kernel is written in tiles


@torch.inference_mode(False)
@torch.enable_grad()
def errors_of_chunks(model, X, samples):
    """Return how far chunks of samples are from J, in roundings, and ``C``.

    For random ``u [N, C]`` it compares the gradient of ``u * fs`` with the sum of those
    of chunks of so many samples, whose norms estimate that of J.
    """
    params = trainable(model)
    leaves, X = differentiable(params, X)
    with unchanged(model):
        fs = outputs(model, leaves, X).detach()
    if not fs.isfinite().all():
        raise ValueError("model(X) is not finite")
    u, sums = random_weights(fs), dict.fromkeys(params, (0, 0))
    for x, weights in zip(X.split(samples), u.split(samples)):
        with unchanged(model):  # no chunk finds what another one wrote
            leaves, x = differentiable(params, x)
            rows, values = outputs(model, leaves, x), leaves.values()
            grads = autograd.grad(rows, values, weights, materialize_grads=True)
            for (name, (total, size)), grad in zip(sums.items(), grads):
                grad = grad.to_dense()
                sums[name] = total + grad, math.hypot(size, norm(grad))
    with unchanged(model):
        leaves, X = differentiable(params, X)
        fs = outputs(model, leaves, X)
        return errors_in_roundings(model, leaves, X, fs, u, sums), fs.shape[1]


def above_limit(errors):
    """Return the names of what is off by more than ``LIMIT`` roundings."""
    return [name for name, error in errors.items() if not error <= LIMIT]


@contextmanager
def in_double(model, X, wrong):
    """Give a copy of the model and of ``X`` in float64, where hardly a ReLU switches.

    Raises ``ValueError`` that ``wrong`` is wrong if the model does not run like that.
    """
    members = [v for m in model.modules() for v in vars(m).values()]
    kept = {id(v): v.detach() for v in members if isinstance(v, torch.Tensor)}
    try:
        wide = X.double() if X.is_floating_point() else X
        yield copy.deepcopy(model, kept).double(), wide  # kept may have a graph
    except Exception as error:
        raise ValueError(f"wrong, and not computable in float64: {wrong}") from error


def samples_apart(model, X, samples):
    """Return ``N`` and ``C``, or raise if chunks of so many samples are not J.

    Looks at two chunks at a time, and needs memory for their activations. Raises
    ``ValueError`` if samples influence each other, or ``fs = model(X)`` is random, not
    finite or not ``[N, C]``.
    """
    differentiable(trainable(model), X)  # raises if X is no tensor [N, ...]
    for two_chunks in X.split(2 * samples):
        errors, C = errors_of_chunks(model, two_chunks, samples)
        if wrong := above_limit(errors):
            with in_double(model, two_chunks, wrong) as copies:
                wrong = above_limit(errors_of_chunks(*copies, samples)[0])
        if wrong:
            raise ValueError(f"samples influence each other, or fs is random: {wrong}")
    return len(X), C


def write_ntk(model, X, out, samples):
    """Write the NTK into ``out``, ``[N, C, N, C]`` or, traced, ``[N, N]``, in tiles.

    Each tile is of so many samples. Raises ``ValueError`` before it writes if ``out``
    has another shape, or samples influence each other.
    """
    N, C = samples_apart(model, X, samples)
    if list(out.shape) not in ([N, C, N, C], [N, N]):
        raise ValueError(f"out is {list(out.shape)}, not {[N, C, N, C]} or {[N, N]}")
    for i, j in combinations_with_replacement(range(0, N, samples), 2):
        n, m = slice(i, i + samples), slice(j, j + samples)
        tile = ntk(model, X[n], None if i == j else X[m], traced=out.ndim == 2)
        if out.ndim == 2:
            out[n, m], out[m, n] = tile, tile.mT
        else:
            out[n, :, m], out[m, :, n] = tile, tile.permute(2, 3, 0, 1)


# %%
# ``from ntk import write_ntk``. For a trace whose Jacobian does not fit that is
# ``write_ntk(model, X, torch.empty(N, N), samples=100)``. Here both forms are checked:

case, X_case, _ = cases["words"]
K = ntk(case, X_case)
for out in torch.empty_like(K), torch.empty(N, N):
    write_ntk(case, X_case, out, samples=4)
    assert_close(out, K if out.ndim == 4 else torch.einsum("ncmc->nm", K))
    print(f"Tiles of 4 samples make up the kernel {list(out.shape)}.")

mixing = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Linear(5, C))
try:
    write_ntk(mixing, X, torch.empty(N, N), samples=4)
except ValueError as error:
    print(f"Batch norm in training mode: ValueError: {error}")
else:
    raise AssertionError("tiles of samples that influence each other pass")
assert_close(ntk(mixing, X), dense_ntk(*[autograd_loop(mixing, X)] * 2))
print("In one piece, its kernel agrees: blocks come from the definition there.")

# %%
# Norms of gradients
# ------------------
# The diagonal of ``K`` holds the squared norms of the rows of ``J``. The gradient of a
# loss of sample ``n`` is the sum of ``u[n, c] J[n, c]``, where ``u`` is the derivative
# of the loss by ``fs``; its norm needs no more. With dropout, call ``eval()`` first: in
# training mode these are norms for other masks than those of your loss.


def squared_norms(model, X, u=None):
    """Return the squared norms of the rows of J, ``[N, C]``.

    With ``u [N, C]``, return those of the sums of ``u[n, c] J[n, c]``, ``[N]``.
    """
    factors, blocks = jacobian_factors(model, X)
    total = 0
    for delta, a in factors.values():
        if u is not None:
            delta = torch.einsum("nc,ncto->nto", u, delta)[:, None]
        total = total + (delta @ delta.mT * (a @ a.mT)[:, None]).sum((2, 3))
    for block in blocks.values():
        block = block.reshape(*block.shape[:2], -1)
        if u is not None:
            block = torch.einsum("nc,ncp->np", u, block)[:, None]
        total = total + block.square().sum(2)
    return total if u is None else total[:, 0]


assert_close(squared_norms(case, X_case), torch.einsum("ncnc->nc", K))
fs, targets = case(X_case), torch.arange(N) % C
losses = nn.functional.cross_entropy(fs, targets, reduction="none")
(u,) = autograd.grad(losses.sum(), fs, retain_graph=True)
norms = squared_norms(case, X_case, u).sqrt()
for loss, found in zip(losses, norms):
    grads = autograd.grad(loss, list(case.parameters()), retain_graph=True)
    assert_close(found, torch.cat([grad.flatten() for grad in grads]).norm())
print("Norms of the gradients:", ", ".join(f"{found:.3f}" for found in norms))

# %%
# Time against the contraction of J
# ---------------------------------
# `PyTorch's tutorial on the NTK
# <https://docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html>`_
# computes ``J`` with ``vmap(jacrev)``, and contracts each block with itself. Both run
# in turn, in single precision on one thread, and we take the time of the processor. How
# other packages compare with torch.func was measured on another machine.

# fold: How the time is measured, and what others took


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def contracted(model, X):
    """Return the NTK from a Jacobian in memory."""
    J = vmap_jacrev(model, X)
    return dense_ntk(J, J)


def seconds(function, *args):
    """Return the time of the processor for one call."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


OTHERS = {  # ms of torch.func / ms of the package, not measured here
    "nngeometry 0.4, elsewhere": [631 / 88, 1745 / 108, 172 / 732],
    "TorchJD 0.18, elsewhere": [631 / 695, 1745 / 2101, 172 / 175],
}

# %%
# No large block of ``J`` is built. A convolution has one ``delta`` and one ``a`` for
# each position of its image: the inner products of all ``a`` of two samples weight the
# ``delta`` of one, and the inner products with the ``delta`` of the other follow.

# fold: The measurement

threads = torch.get_num_threads()
torch.set_num_threads(1)
benchmark = {  # model, X, rounds
    "MLP 64-128-128-10, N = 128": (mlp(64, 128, 128, 10), torch.rand(128, 64), 2),
    "MLP 784-256-256-10, N = 64": (mlp(784, 256, 256, 10), torch.rand(64, 784), 1),
    "CNN 17-34, 8x8, N = 128": (small_cnn(17, 10), torch.rand(128, 1, 8, 8), 2),
}
ratios = {}
for title, (case, X_case, rounds) in benchmark.items():
    case, X_case = case.float(), X_case.float()
    times = [
        [seconds(f, case, X_case) for f in (ntk, contracted)] for _ in range(rounds)
    ]
    ours, dense = map(min, zip(*times))
    ratios[title] = dense / ours
    print(f"{title}: from J {1e3 * dense:.0f} ms, from factors {1e3 * ours:.0f} ms")

# %%
# The picture shows the ratios.

# fold: The picture

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
shown = {"factors, measured here": list(ratios.values()), **OTHERS}
styles = zip("osD", ("#0072B2", "#E69F00", "#CC79A7"))
for (label, speeds), (marker, color) in zip(shown.items(), styles):
    ax.plot(speeds, list(ratios), marker, color=color, label=label, markersize=11)
ax.axvline(1, color="black", zorder=0)
ax.set(
    xscale="log", xlabel="times as fast as torch.func's contraction", ylim=(2.5, -0.5)
)
ax.xaxis.set_major_formatter("{x:g}")
fig.legend(loc="outside lower center", ncols=2)
_, of_mlp, of_cnn = ratios.values()
fig.suptitle(
    f"NTK from factors: {of_mlp:.0f} times as fast on an MLP,\n{of_cnn:.1f} on a CNN"
)
plt.show()

# %%
# Where ``J`` is larger than the memory of most machines, the factors are still small.

huge, X_huge = mlp(784, 3000, 3000, 10).float(), torch.rand(64, 784).float()
gigabytes = 64 * 10 * sum(p.nbytes for p in huge.parameters()) / 1e9
duration = seconds(ntk, huge, X_huge)
torch.set_num_threads(threads)
print(f"J would have {gigabytes:.0f} GB, its kernel takes {duration:.1f} s.")

# %%
# What to take home
# -----------------
# - The kernel of a linear layer is a product of two small kernels. ``J`` is not needed.
# - Convolutions on small images, sequences and embeddings have factors, too; count
#   operations before you use them.
# - ``ntk`` checks its factors against a gradient, and falls back to blocks.
#
# Next: ``scale/distributed_jacobians.py`` splits ``J`` over processes. The alternative:
# ``scale/jacobians_without_memory.py`` streams ``J`` in chunks, for other sums over it.

# sphinx_gallery_parallel = False
