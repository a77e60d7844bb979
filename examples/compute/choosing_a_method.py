"""
Choosing a method for the Jacobian
==================================

After this page you know which method to take for your network and your batch: for
networks of real sizes and for small ones, you see which one takes the least time and
which one the least memory. All methods run on the same models, on your machine, in
single precision, and each has to be right before it is timed.
"""

import copy
import gc
import os
import platform
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import accumulate, pairwise, product
from pathlib import Path
from time import process_time

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark.utils.timer import timer

# %%
# The recipe and its time
# -----------------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``, the Jacobian of a parameter ``p``
# has shape ``[N, C, *p.shape]``. The recipe takes each sample alone, and it is what the
# other methods have to beat. ``timer`` returns seconds, and waits for a GPU. The first
# call in a process loads code: time a later one.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


torch.set_default_dtype(torch.float32)
default_threads = torch.get_num_threads()
torch.set_num_threads(1)  # least disturbed by other programs: more on an idle machine
model, X = nn.Linear(20, 5), torch.rand(32, 20)
for call in "first", "second":
    start = timer()
    J = vmap_jacrev(model, X)
    print(f"{call} call: {1e3 * (timer() - start):.3g} ms, {list(J['weight'].shape)}")

# %%
# Methods and models
# ------------------
# ``autograd_loop`` is the definition, a backward pass through the whole batch for each
# of the ``N * C`` entries of ``fs``. ``grads_batched`` sends these passes together.

# fold: autograd_loop and grads_batched


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def grads_batched(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one batched backward pass."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)  # [N * C, N, C]
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


# %%
# BackPACK's methods take a model that went through ``extend``.
# ``batched_jacobians.py`` explains them.

# fold: batch_grad and sqrt_ggn


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


# %%
# ``batched_jacobian`` takes any model and checks its result: the check is part of its
# time. ``scale/universal_jacobian.py`` explains it; this is the same text.

# fold: batched_jacobian

METHODS = "linear layers", "vmap(jacrev)", "sample by sample", "definition"
LARGE = 2**17  # N * weight.numel() of a layer for which an outer product pays
LIMIT = 10  # roundings: a right Jacobian is off by fewer


class Jacobian(dict):
    """``{name: [N, C, *p.shape]}``, and the ``method`` that gave it."""

    method = None


@torch.inference_mode(False)
@torch.enable_grad()
def batched_jacobian(model, X, *, out=None, method=None):
    """Return the Jacobian of ``fs = model(X)``: ``{name: [N, C, *p.shape]}``.

    ``X`` is a tensor ``[N, ...]``, and ``model(X)`` is ``[N, C]`` and finite. The names
    are those of the parameters that require a gradient. The result is checked, and its
    ``method`` says which of ``METHODS`` it took. In a loop, pass this ``method`` to
    skip the check, and a result as ``out`` to write into. The model and ``X`` stay as
    they are; backward hooks do not run, and forward hooks more than once. Raises
    ``ValueError`` if an argument or ``model(X)`` is not as above.
    """
    params = trainable(model)
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {METHODS}, but is {method!r}")
    J, left = Jacobian.fromkeys(params), list(params)
    with unchanged(model):
        leaves, X = differentiable(params, X)
        fs, layers = forward(model, leaves, X)
        if out is not None:
            check_blocks(out, fs, params)

        def fill():
            blocks = blocks_by(J.method, model, leaves, left, X, fs, layers)
            for name, block in blocks.items():
                J[name] = write(block, out and out[name])
            return blocks

        quick = METHODS[0 if layers else 1 : -1]
        for J.method in quick if method is None else ():
            try:
                blocks = fill()
            except Exception:
                continue
            u = random_weights(fs)
            sums = {name: weighted_sum(u, block) for name, block in blocks.items()}
            errors = errors_in_roundings(model, leaves, X, fs, u, sums)
            left = [name for name, error in errors.items() if not error <= LIMIT]
            if not left:
                return J
        J.method = method or "definition"
        fill()
        return J


def trainable(model):
    """Return the parameters that require a gradient, by name."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("pass the model inside, model.module")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    return params


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
            for module in model.modules():  # hooks that could change the gradient
                module._backward_hooks.clear()
                module._backward_pre_hooks.clear()
            yield
    finally:
        for now, before in containers:
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)
        for now, before in tensors:
            if not torch.equal(now, before):
                now.data.copy_(before)


def differentiable(params, X):
    """Return detached parameters and a copy of ``X``, both to differentiate by."""
    if not isinstance(X, torch.Tensor) or X.ndim == 0 or len(X) == 0:
        got = list(X.shape) if isinstance(X, torch.Tensor) else type(X).__name__
        raise ValueError(f"X must be a tensor [N, ...] with N > 0, but is {got}")
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return leaves, X.detach().clone().requires_grad_(X.is_floating_point())


def forward(model, leaves, X):
    """Return ``fs``, and the large linear layers that see one vector of each sample."""
    owners = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    layers = [m for m in layers if len(X) * m.weight.numel() >= LARGE]
    layers = [m for m in layers if {m.weight, m.bias} == set(m.parameters())]
    layers = [m for m in layers if all(owners[p] == 1 for p in m.parameters())]
    layers = [m for m in layers if m.weight.requires_grad and m.bias.requires_grad]
    vectors = Counter()

    def count(layer, args, output):
        vectors[layer] += output.numel() // output.shape[-1]

    copies = {name: p.clone() for name, p in leaves.items()}  # the model may write
    with hooked(layers, count):
        fs = outputs(model, copies, X)
    if not fs.isfinite().all():
        raise ValueError("model(X) is not finite")
    return fs, [layer for layer in layers if vectors[layer] == len(X)]


def outputs(model, leaves, X):
    """Return ``fs = model(X)``, with copies of the buffers, or say what it is not."""
    values = {b: b.detach().clone() for b in model.buffers()}
    values |= {p: leaves[k] for k, p in model.named_parameters() if k in leaves}
    places = {}  # each once: functional_call breaks a module that has two names
    for prefix, module in model.named_modules():
        for named in module.named_parameters, module.named_buffers:
            places |= named(prefix, recurse=False, remove_duplicate=False)
    places = {place: values[t] for place, t in places.items() if t in values}
    fs = functional_call(model, places, X.clone(), tie_weights=False)
    if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != len(X):
        got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
        raise ValueError(f"model(X) must be a tensor [N={len(X)}, C], but is {got}")
    return fs


def check_blocks(blocks, fs, params):
    """Raise ``ValueError`` if ``blocks`` are not like the Jacobian of ``fs``."""
    if not isinstance(blocks, dict):
        kind = type(blocks).__name__
        raise ValueError(f"a Jacobian is a dict by name, but this is a {kind}")
    if set(blocks) != set(params):
        got = list(blocks)
        raise ValueError(f"a Jacobian has the names {list(params)}, but this has {got}")
    for name, p in params.items():
        block = blocks[name]
        wanted = f"{list(fs.shape + p.shape)}, {p.dtype}, {p.device}"
        got = f"{list(block.shape)}, {block.dtype}, {block.device}"
        if got != wanted:
            raise ValueError(f"the block of {name} must be {wanted}, but is {got}")


def blocks_by(method, model, leaves, names, X, fs, layers):
    """Return ``{name: block}``, where a block is ``J`` or a pair with this product."""
    if method == "linear layers":
        return from_vmap(model, leaves, names, X, layers)
    if method == "vmap(jacrev)":
        return from_vmap(model, leaves, names, X, [])
    if method == "sample by sample":
        rows = (outputs(model, leaves, x)[0] for x in X.split(1))
        return from_rows(rows, leaves, names)
    return from_rows(fs, leaves, names)


def from_vmap(model, leaves, names, X, layers):
    """Return ``{name: block}`` from ``vmap(jacrev)``.

    The block of a bias is ``delta``, the derivative by what its layer returns. Where
    ``layers`` have one, that of the weight is ``(delta [N, C, O], a [N, I])``, with
    the layer's input ``a``: ``J[n, c, o, i] = delta[n, c, o] * a[n, i]``.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    linear = {m: (name_of[m.weight], name_of[m.bias]) for m in layers}
    fixed = {weight: leaves[weight].detach() for weight, _ in linear.values()}
    rest = {name: leaves[name].detach() for name in names if name not in fixed}

    def f(rest, x):
        inputs = {}

        def keep(layer, args, output):
            inputs[layer] = args[0].flatten()

        with hooked(layers, keep):
            return outputs(model, fixed | rest, x[None])[0], inputs

    blocks, inputs = vmap(jacrev(f, has_aux=True), (None, 0))(rest, X.detach())
    pairs = {w: (blocks[b], inputs[layer]) for layer, (w, b) in linear.items()}
    return blocks | pairs


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


def write(block, out):
    """Return a block as a tensor ``[N, C, *p.shape]``: in ``out``, if that is given."""
    if isinstance(block, torch.Tensor):
        return block.detach().contiguous() if out is None else out.copy_(block)
    delta, a = block
    if out is None:
        out = delta.new_empty(*delta.shape, a.shape[1])
    column, row = delta.flatten(1)[:, :, None], a[:, None].to(delta.dtype)
    torch.bmm(column, row, out=out.view(len(a), -1, a.shape[1]))
    return out


def random_weights(fs, seed=0):
    """Return normal numbers like ``fs``, without the global random generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(fs.shape, generator=generator, device="cpu").to(fs)


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


def errors_in_roundings(model, leaves, X, fs, u, sums):
    """Return how far sums of ``u * J`` are from gradients of ``u * fs``, in roundings.

    ``sums`` maps names to the sum and the norm of ``J``. One rounding is what ``u * J``
    loses, and what the backward pass loses: it is linear in ``u``, so the gradients for
    two parts of ``u`` would add up without rounding. If that is not enough, it is also
    what the gradient changes if ``X`` and the parameters change by their precision,
    unless it is another one in each call.
    """

    def gradients(fs, leaves, X, u, names):
        inputs = [leaves[name] for name in names] + [X] * X.requires_grad
        grads = autograd.grad(fs, inputs, u, retain_graph=True, materialize_grads=True)
        return {name: g.to_dense() for name, g in zip(names, grads)}

    def nudged(tensor):
        if not tensor.requires_grad:
            return tensor
        change = eps * tensor.detach() * random_weights(tensor, seed=2)
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
    if names := doubtful():
        moved = {k: nudged(p) for k, p in leaves.items()}, nudged(X)
        passes = []
        with torch.random.fork_rng([X.device] * X.is_cuda):
            for point in (leaves, X), moved:
                torch.manual_seed(0)  # the same dropout for both
                passes.append(gradients(outputs(model, *point), *point, u, names))
        for name in names:
            if norm(passes[0][name] - truth[name]) <= LIMIT * rounding[name]:
                rounding[name] += norm(passes[0][name] - passes[1][name])
    return {k: error / rounding[k] if error else 0.0 for k, error in errors.items()}


def product_precision(fs):
    """Return the relative precision of products, which TF32 and bfloat16 lower."""
    backends = torch.backends
    if fs.dtype != torch.float32:
        return torch.finfo(fs.dtype).eps
    settings = backends.mkldnn.matmul, backends.mkldnn.conv
    if fs.is_cuda:
        settings = backends.cuda.matmul, backends.cudnn.conv
    modes = [setting.fp32_precision for setting in settings]
    if "bf16" in modes:
        return 2**-8
    return 2**-11 if "tf32" in modes else torch.finfo(fs.dtype).eps


# %%
# The models: a multilayer perceptron (MLP), small and wide, a CNN on RGB images of 32
# by 32 pixels, and a vision transformer with 36 patches.

# fold: The models and the batches


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def cnn(C):
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(32)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, C))


class Block(nn.Module):
    """Attention with four heads, in plain operations, and an MLP, on ``[N, T, D]``."""

    def __init__(self, D):
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * D))
        self.out = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), *mlp(D, 2 * D, D))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, D, C):
        super().__init__()
        self.patches = nn.Conv2d(3, D, 5, stride=5)
        self.blocks = nn.Sequential(Block(D), Block(D))
        self.head = nn.Linear(D, C)

    def forward(self, X):
        return self.head(self.blocks(self.patches(X).flatten(2).mT).mean(1))


_ = torch.manual_seed(0)
cases = {
    "small MLP, N = 2, C = 1": (mlp(16, 32, 32, 1), torch.rand(2, 16)),
    "small MLP, N = 32, C = 5": (mlp(16, 32, 32, 5), torch.rand(32, 16)),
    "wide MLP, N = 1, C = 10": (mlp(784, 256, 256, 10), torch.rand(1, 784)),
    "wide MLP, N = 16, C = 10": (mlp(784, 256, 256, 10), torch.rand(16, 784)),
    "CNN, N = 12, C = 10": (cnn(10), torch.rand(12, 3, 32, 32)),
    "transformer, N = 12, C = 9": (Transformer(32, 9), torch.rand(12, 3, 30, 30)),
}
device = "cuda" if torch.cuda.is_available() else "cpu"
cases = {case: (model.to(device), X.to(device)) for case, (model, X) in cases.items()}

# %%
# Each method must match the loop in double precision, on two samples and for each set
# of kinds of layers, before it is timed in single precision. BackPACK has no rule for
# some layers: it raises, or it warns, which counts as an error here. The loop is timed
# where it is short.

# fold: The check of each method on each model
FEW = 40  # the loop is timed if N * C is at most this


def calls(model, X):
    """Return ``{method: (function, model, X)}`` for all methods."""
    extended = extend(copy.deepcopy(model))  # BackPACK's hooks stay with a model
    return {
        "autograd loop": (autograd_loop, model, X),
        "is_grads_batched": (grads_batched, model, X),
        "vmap(jacrev)": (vmap_jacrev, model, X),
        "BatchGrad": (batch_grad, extended, X),
        "SqrtGGNExact": (sqrt_ggn, extended, X),
        "batched_jacobian": (batched_jacobian, model, X),
    }


def agrees(J, function, *args):
    """Return whether a method has rules for the model, or raise if it is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Extension saving to")
            result = function(*args)
    except (NotImplementedError, UserWarning, AssertionError):  # of BackPACK
        return False
    assert_close(dict(result), J)
    return True


torch.set_default_dtype(torch.float64)  # BackPACK's rule for AvgPool2d takes this type
timed, right = {}, {}
for case, (model, X) in cases.items():
    layers = frozenset(map(type, model.modules()))
    if layers not in right:
        double, X_double = copy.deepcopy(model).double(), X[:2].double()
        J, checks = autograd_loop(double, X_double), calls(double, X_double)
        right[layers] = [name for name, call in checks.items() if agrees(J, *call)]
        absent = (
            ", ".join(name for name in checks if name not in right[layers]) or "none"
        )
        print(f"{case}: {len(right[layers])} methods agree. Without rules: {absent}.")
    short = model(X).numel() <= FEW
    timed[case] = [name for name in right[layers] if short or name != "autograd loop"]
torch.set_default_dtype(torch.float32)

# %%
# Your case: take this, because
# -----------------------------
# Each method is called once for its peak memory, and then in turn with the others: the
# smallest time counts, since other programs only add time. On a CPU it is the time that
# this process computes, on one thread. Methods within ``TIE`` of the fastest tie: then
# the one with the lower peak comes first.

# fold: How time and peak memory are measured
SECONDS = 0.2  # what the repeated calls of a case take; a longer call is not repeated
TIE = 1.2
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr


def peak_bytes(function, *args):
    """Return the peak of the bytes that PyTorch allocates in ``function(*args)``."""
    gc.collect()  # nothing older may be freed in the call
    if any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function(*args)
        return torch.cuda.max_memory_allocated() - start
    with profile(profile_memory=True) as recorded:
        function(*args)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def seconds_of(function, *args):
    """Return the seconds of a call: of this process, or of a GPU that it waits for."""
    clock = timer if device == "cuda" else process_time
    start = clock()
    function(*args)
    return clock() - start


def smallest_seconds(calls, limit):
    """Return the smallest seconds of each of ``{name: (function, *args)}``."""
    seconds = {name: seconds_of(*call) for name, call in calls.items()}
    fast = [name for name in calls if seconds[name] < limit]
    end = process_time() + limit
    while fast and process_time() < end:
        for name in fast:
            seconds[name] = min(seconds[name], seconds_of(*calls[name]))
    return seconds


gc.freeze()  # what exists now is no garbage, and a search through it takes long
cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
cpus = re.findall(r"model name\s*: (.*)", cpuinfo) + [platform.machine()]
print(f"{cpus[0]}, one thread, device {device}, torch {torch.__version__}")

# %%
# We print what to take, and the peak as a multiple of the bytes of the Jacobian. The
# Jacobian is part of the peak, so the least is about one.

# fold: How the table is made
times, memory = {}, {}
for case, (model, X) in cases.items():
    methods = {k: call for k, call in calls(model, X).items() if k in timed[case]}
    peaks = {name: peak_bytes(*call) for name, call in methods.items()}
    seconds = smallest_seconds(methods, SECONDS)
    J_bytes = 4 * model(X).numel() * sum(p.numel() for p in model.parameters())
    times[case] = {name: t / min(seconds.values()) for name, t in seconds.items()}
    memory[case] = {name: peak / J_bytes for name, peak in peaks.items()}
    ties = [name for name, t in times[case].items() if t <= TIE]
    ties.sort(key=memory[case].get)
    others = {name: t for name, t in times[case].items() if name not in ties}
    print(f"{case}, J {J_bytes / 1e6:.3g} MB: take {' or '.join(ties)},")
    print(f"  because of {1e3 * min(seconds.values()):.3g} ms", end="")
    if others:
        name = min(others, key=others.get)
        print(f"; the next, {name}, takes x {others[name]:.1f}", end="")
    least = min(peaks, key=peaks.get)
    print(f";\n  least memory: {least}, {memory[case][least]:.2f} J.")

# %%
# Why do they differ? The methods over the whole batch push ``N * C`` cotangents through
# all ``N`` samples. The others push ``C`` through each sample: ``N`` times less work,
# which pays when ``N`` is large, at a fixed cost, which counts when ``N * C`` or the
# network is small. And each result has to be written, which takes most of the time
# where the Jacobian is large.

# fold: How the picture is drawn
COLORS = "black #E69F00 #009E73 #56B4E9 #CC79A7 #D55E00".split()
STYLES = dict(zip(calls(model, X), zip(COLORS, "os^vDP")))


def draw(values, title, xlabel):
    """Draw a row for each case of ``values``, with a mark for each method."""
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, (color, marker) in STYLES.items():
        marks = [(row[name], y) for y, row in enumerate(values.values()) if name in row]
        xs, ys = zip(*marks)
        style = {"color": color, "marker": marker, "markersize": 11, "zorder": 3}
        ax.plot(xs, ys, linestyle="", markeredgecolor="white", label=name, **style)
    ax.set(xscale="log", xlabel=xlabel)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(range(len(values)), values)
    ax.invert_yaxis()
    ax.grid(color="0.85")
    fig.suptitle(title)
    fig.legend(loc="outside lower center", ncols=3)
    plt.show()


worst = {name: max(row.get(name, 1) for row in times.values()) for name in STYLES}
title = f"vmap(jacrev): at most {worst['vmap(jacrev)']:.1f} times the fastest method"
draw(times, title, "time as a multiple of the fastest")
print(f"batched_jacobian: at most {worst['batched_jacobian']:.1f} times the fastest.")

# %%
# Peak memory
# -----------
# What is not the Jacobian is mostly cotangents: in a CNN many pixels share a parameter,
# so they can be larger. Then compute a few samples at a time, as
# ``scale/jacobians_without_memory.py`` does.

most = max(peak for row in memory.values() for peak in row.values())
title = f"Peak memory: up to {most:.3g} times the Jacobian"
draw(memory, title, "peak as a multiple of the Jacobian")

# %%
# Growth with N, C and P
# ----------------------
# We start from a small MLP, and change one size at a time. A method leaves after a call
# that takes more than ``LONG`` seconds. We print by how much the time grows from its
# first to its last point.

# fold: How the growth is measured and drawn
LONG = 0.03
SIZES = {"N": (2, 8, 32, 96), "C": (2, 6, 20), "width": (16, 48, 160)}
fig, axes = plt.subplots(1, 3, figsize=(8, 4), sharey=True, layout="constrained")
growth = {name: [] for name in STYLES}
for ax, (size, values) in zip(axes, SIZES.items()):
    lines = {name: {} for name in STYLES}
    for value in values:
        N, C, width = ({"N": 24, "C": 5, "width": 32} | {size: value}).values()
        X = torch.rand(N, 16, device=device)
        methods = calls(mlp(16, width, width, C).to(device), X)
        methods = {
            name: call
            for name, call in methods.items()
            if all(seconds <= LONG for seconds in lines[name].values())
        }
        for name, seconds in smallest_seconds(methods, LONG).items():
            lines[name][value] = seconds
    for name, line in lines.items():
        color, marker = STYLES[name]
        ys = [1e3 * seconds for seconds in line.values()]
        ax.loglog(list(line), ys, color=color, marker=marker, label=name)
        text = f"x {ys[-1] / ys[0]:.3g} for {size} {min(line)} to {max(line)}"
        growth[name].append(text)
    ax.set(xlabel=size, xticks=values, xticklabels=values)
    ax.minorticks_off()
axes[0].set_ylabel("time in ms")
fig.suptitle("Time against N, C and the width of a small MLP")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()
for name, texts in growth.items():
    print(f"{name}: {', '.join(texts)}")
torch.set_num_threads(default_threads)

# %%
# What to take home
# -----------------
# - The table above is from the machine that built this page. Run the script on yours,
#   with your model and batch in ``cases``.
# - ``vmap(jacrev)`` needs no other package and six lines; ``batched_jacobian`` checks
#   its result, and takes models that ``vmap`` does not.
# - With few samples and outputs the fixed cost decides, and ``grads_batched`` has less
#   of it: take it for ``N * C`` of about ten and fewer.
#
# Next: ``scale/universal_jacobian.py`` teaches ``batched_jacobian``. The alternative:
# ``compute/torch_func_jacobians.py`` teaches the methods of PyTorch alone.
