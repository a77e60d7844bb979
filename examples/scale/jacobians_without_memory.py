r"""
Jacobians that do not fit into memory
=====================================

After this page you can say beforehand whether a batched Jacobian fits into memory, and
get along without it if it does not: compute it in chunks, reduce it while it streams
by, write it to disk, or multiply with it without ever having it.
"""

# fold: Imports
import copy
import gc
import math
import os
import tempfile
import timeit
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise, product
from pathlib import Path
from time import process_time

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import autograd, nn
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

# %%
# Memory plan
# -----------
# Count before you compute. For ``fs = model(X)`` of shape ``[N, C]``, the Jacobian
# ``J`` of a parameter ``p`` has shape ``[N, C, *p.shape]``. If you need the Jacobian of
# some parameters only, freeze the others.

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)
wide = nn.Linear(784, 256).float()
size = 1000 * 256 * sum(p.nbytes for p in wide.parameters())
print(f"A layer of 784 x 256 weights, N = 1000: J has {size / 1e9:.1f} GB.")

# %%
# Beside ``J``, its computation needs memory: next to nothing for an MLP, many times
# ``J`` for a CNN with large images and few weights. ``memory_plan`` measures that on
# two samples, and multiplies: ``vmap`` over samples needs the same for each.

# fold: How the peak is measured

warnings.filterwarnings("ignore", ".*torch.jit.script.*")  # from within the profiler


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


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


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def pooled_cnn(width, C):
    """Return two convolutions, the mean over their positions, and a linear layer."""
    layers = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3)
    mean = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *mean, nn.Linear(width, C))


# %%
# All functions of this page use a few helpers: they leave the model as it is, and
# compare sums of ``J`` with gradients as ``trust/check_a_jacobian.py`` does.

# fold: How sums are compared, and how the model stays as it is

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


@torch.inference_mode(False)
@torch.enable_grad()
def shape_of_outputs(model, X):
    """Return the shape of ``model(X)``, which may differentiate by its inputs."""
    with unchanged(model):
        return outputs(model, *differentiable(trainable(model), X)).shape


# %%
# ``available`` is up to you: ``torch.cuda.mem_get_info()[0]`` on a GPU, and on a CPU
# what the system or the container leaves to your process.


def memory_plan(model, X, available):
    """Return bytes of J and of the peak of ``vmap(jacrev)``, and how much fits.

    The dictionary has ``bytes`` of J, ``peak`` in bytes, J included, and the number of
    ``samples`` whose rows fit into ``available`` bytes at once. Raises what ``vmap``
    raises, and ``ValueError`` if ``model(X)`` is not ``[N, C]``.
    """
    # In its first run, the profiler asks the environment what to write to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    _, C = shape_of_outputs(model, X[:2])
    few = X[:2].detach().clone()
    with unchanged(model):
        sample = peak_bytes(vmap_jacrev, model, few) / len(few)
    size = len(X) * C * sum(p.nbytes for p in trainable(model).values())
    samples = min(len(X), int(available // sample))
    return {"bytes": size, "peak": int(len(X) * sample), "samples": samples}


large = {
    "MLP": (mlp(64, 128, 128, 10).float(), torch.rand(64, 64).float()),
    "CNN": (pooled_cnn(16, 10).float(), torch.rand(40, 3, 12, 12).float()),
}
plans = {}
for name, (model, X) in large.items():
    plans[name] = plan = memory_plan(model, X, available=20e6)
    print(
        f"{name}: J has {plan['bytes'] / 1e6:.1f} MB, peak {plan['peak'] / 1e6:.1f} MB"
    )
    print(
        f"  The rows of {plan['samples']} of {len(X)} samples fit into 20 MB at once."
    )

# %%
# Chunks of samples and outputs
# -----------------------------
# ``from memory_plan import jacobian_chunks, memory_plan``. The first yields one part of
# ``J`` after the other, each checked against a gradient of its own samples before you
# get it. With a ``plan`` from above, ``size=(plan["samples"], C)`` fits; if that is 0,
# take one sample and fewer outputs. The plan counts what PyTorch allocates; leave some
# memory to the system. In ``float32`` a ReLU whose input is nearly zero may be on for
# one method and off for another, which changes single samples. A chunk that fails for
# that reason is computed again in ``float64``, with twice its memory, and has to pass.
#
# Where samples influence each other, as in a softmax over the batch, a chunk is no part
# of ``J``: ``samples_apart`` finds that out before the first chunk. It compares the
# gradient of two chunks with those of each, so all samples are never there at once.

# fold: errors_of_chunks, samples_apart and checked_rows


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


@torch.inference_mode(False)
@torch.enable_grad()
def rows_and_errors(model, X, c):
    """Return ``{name: J[:, c]}`` for a slice ``c`` of outputs, and its errors."""
    with unchanged(model):
        leaves, X = differentiable(trainable(model), X)

        def f(params, x):  # of one sample
            return outputs(model, params, x[None])[0, c]

        try:
            values = {name: p.detach() for name, p in leaves.items()}
            chunk = vmap(jacrev(f), (None, 0))(values, X.detach())
        except Exception:  # vmap does not take every model
            chunk = from_rows((f(leaves, x) for x in X), leaves, list(leaves))
        fs, sums = outputs(model, leaves, X), {}
        u = torch.zeros_like(fs)
        u[:, c] = random_weights(fs[:, c])
        for name, block in chunk.items():
            total = torch.tensordot(u[:, c].to(block.dtype), block, 2)
            sums[name] = total, norm(block)
        return chunk, errors_in_roundings(model, leaves, X, fs, u, sums)


def checked_rows(model, X, c):
    """Return ``{name: J[:, c]}`` for a slice ``c`` of outputs, or raise if wrong."""
    chunk, errors = rows_and_errors(model, X, c)
    if wrong := above_limit(errors):
        with in_double(model, X, wrong) as copies:
            chunk, errors = rows_and_errors(*copies, c)
        if wrong := above_limit(errors):
            raise ValueError(f"wrong Jacobian of {wrong}")
    params = trainable(model)
    return {name: b.detach().to(params[name]).contiguous() for name, b in chunk.items()}


# %%
# With these, the function is a loop.


def jacobian_chunks(model, X, size):
    """Yield ``n, c, {name: J[n, c]}``; ``size`` is how many samples and outputs.

    ``n`` and ``c`` are slices. Raises ``ValueError`` before the first chunk if samples
    of different chunks influence each other, and before a chunk that is wrong.
    """
    if not isinstance(size, (tuple, list)) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive numbers, but is {size}")
    N, C = samples_apart(model, X, size[0])
    for i, k in product(range(0, N, size[0]), range(0, C, size[1])):
        n, c = slice(i, i + size[0]), slice(k, k + size[1])
        yield n, c, checked_rows(model, X[n], c)


# %%
# We compare the chunks with parts of ``J`` from one backward pass for each output.

# fold: The autograd loop, slow and exact


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
# With a plan, each chunk has the rows of as many samples as fit.

N, C = 6, 4
model, X = mlp(9, 8, 7, C), torch.rand(N, 9)
plan = memory_plan(model, X, available=20e3)
for n, _, chunk in jacobian_chunks(model, X, size=(plan["samples"], C)):
    print(f"{min(n.stop, N)} of {N} samples: {len(chunk)} blocks of rows")
    del chunk  # else it is still there while the next one is computed

# %%
# Both the samples and the outputs can be split, and the last chunks may be smaller.

J = autograd_loop(model, X)
for n, c, chunk in jacobian_chunks(model, X, size=(4, 3)):
    assert_close(chunk, {name: block[n, c] for name, block in J.items()})
    del chunk
print("Chunks of 4 samples and 3 outputs are parts of J.")

mixing = nn.Sequential(nn.Linear(9, C), nn.Softmax(dim=0))
try:
    next(jacobian_chunks(mixing, X, size=(4, 3)))
except ValueError as error:
    print(f"Softmax over the samples: ValueError: {error}")
else:
    raise AssertionError("the check of the samples is blind")

# %%
# Streaming
# ---------
# If you need a sum over ``J`` only, add up each chunk and drop it. An example is the
# diagonal of ``J^T J``. The loop variable keeps a chunk alive: ``del`` it, or two
# chunks exist at once. For the norm of each row there is a quicker way, from factors:
# ``squared_norms`` of ``scale/neural_tangent_kernel.py``.


def gram_diagonal(model, X, size):
    """Return the diagonal of ``J^T J``, ``{name: [*p.shape]}``, from chunks."""
    diagonal = {}
    for _, _, chunk in jacobian_chunks(model, X, size):
        for name, block in chunk.items():
            diagonal[name] = diagonal.get(name, 0) + block.square_().sum((0, 1))
        del chunk, block
    return diagonal


squares = {name: block.square().sum((0, 1)) for name, block in J.items()}
assert_close(gram_diagonal(model, X, size=(4, 3)), squares)
print("The streamed diagonal agrees with the loop.")

# %%
# Jacobian on disk
# ----------------
# ``write_jacobian`` writes the chunks into ``out``, which you allocate once and can use
# again. Its blocks are tensors in memory or, with ``numpy.memmap``, files that are
# larger than the memory. Later you read the rows that you need. To see how far it is,
# take the loop in it, and print ``n.stop``.


def refuse_other_shapes(title, tensors, shapes):
    """Raise ``ValueError`` unless ``tensors`` has these names and shapes."""
    if not isinstance(tensors, dict):
        got = type(tensors).__name__
        raise ValueError(f"{title} must be a dictionary {{name: tensor}}, but is {got}")
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: list(shape) for name, shape in shapes.items()}
    if got != wanted:
        raise ValueError(f"{title} has the shapes {got}, but must have {wanted}")


def write_jacobian(model, X, out, size):
    """Write J into ``out``, ``{name: [N, C, *p.shape]}``, in chunks.

    Raises ``ValueError`` before it writes if ``out`` has other names or shapes, and as
    ``jacobian_chunks`` does.
    """
    params, N, (_, C) = trainable(model), len(X), shape_of_outputs(model, X[:2])
    refuse_other_shapes("out", out, {k: [N, C, *p.shape] for k, p in params.items()})
    for n, c, chunk in jacobian_chunks(model, X, size):
        for name, block in chunk.items():
            out[name][n, c] = block
        del chunk, block


# %%
# Here it writes a file for each parameter, and we read three samples.

with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    out, paths = {}, {}
    for name, p in model.named_parameters():
        paths[name], shape = Path(folder, f"{name}.npy"), (N, C, *p.shape)
        dtype = p.detach().numpy().dtype
        file = np.lib.format.open_memmap(paths[name], "w+", dtype, shape)
        out[name] = torch.from_numpy(file)
    write_jacobian(model, X, out, size=(4, 3))
    del out, file
    for name, block in J.items():
        rows = np.load(paths[name], mmap_mode="r")[2:5]  # reads these samples only
        assert_close(torch.tensor(rows), block[2:5])
    print(
        f"{len(paths)} files hold J, {sum(map(os.path.getsize, paths.values()))} bytes."
    )

# %%
# Products with J and its transpose
# ---------------------------------
# ``J^T u``, with ``u [N, C]``, is one gradient.


@torch.inference_mode(False)
@torch.enable_grad()
def transposed_product(model, X, u):
    """Return ``J^T u``, ``{name: [*p.shape]}``, for ``u [N, C]``."""
    with unchanged(model):
        leaves, X = differentiable(trainable(model), X)
        fs = outputs(model, leaves, X)
        refuse_other_shapes("u", {"u": u}, {"u": fs.shape})
        grads = autograd.grad(fs, leaves.values(), u, materialize_grads=True)
    return {name: grad.to_dense() for name, grad in zip(leaves, grads)}


u = torch.rand(N, C)
J_u = {name: torch.einsum("nc,nc...->...", u, block) for name, block in J.items()}
assert_close(transposed_product(model, X, u), J_u)
print("J^T u agrees with the loop.")

# %%
# It is linear in ``u``, so its derivative by ``u`` gives the other product, ``J v``:
# two backward passes, whatever the size of ``J``. ``torch.func.jvp`` takes one pass,
# but has no rule for some layers, and looks through ``torch.no_grad`` in a model
# without an error. A product fits the other one if ``u . (J v) = v . (J^T u)``, and
# both sides are at hand.


@torch.inference_mode(False)
@torch.enable_grad()
def jacobian_product(model, X, v):
    """Return ``J v [N, C]`` for ``v``, ``{name: [*p.shape]}``.

    Raises what PyTorch raises for an operation without a second derivative, such as
    ``NotImplementedError`` for ``nn.EmbeddingBag``, and ``ValueError`` if one is wrong.
    """
    params = trainable(model)
    refuse_other_shapes("v", v, {name: p.shape for name, p in params.items()})
    with unchanged(model), sdpa_kernel(SDPBackend.MATH):  # which has derivatives
        leaves, X = differentiable(params, X)
        fs = outputs(model, leaves, X)
        if not fs.isfinite().all():
            raise ValueError("model(X) is not finite")
        u, options = random_weights(fs).requires_grad_(), {"materialize_grads": True}
        grads = autograd.grad(fs, leaves.values(), u, create_graph=True, **options)
        J_u = dict(zip(leaves, grads))
        v = {name: tensor.clone().conj() for name, tensor in v.items()}
        v_J_u = sum((v[name] * J_u[name]).real.sum() for name in leaves)
        (J_v,) = autograd.grad(v_J_u, u)
    error = abs(v_J_u - (u * J_v).sum()).item()
    if not error <= torch.finfo(fs.dtype).eps ** 0.25 * norm(u) * norm(J_v):
        raise ValueError("u . (J v) is not v . (J^T u)")
    return J_v


v = {name: torch.rand_like(block[0, 0]) for name, block in J.items()}
J_v = sum(torch.einsum("nc...,...->nc", block, v[name]) for name, block in J.items())
assert_close(jacobian_product(model, X, v), J_v)
print("J v agrees with the loop.")

# %%
# Both need memory for what the layers return, of all samples. With many samples, go
# through them in parts: ``J v`` is put together from those of the parts, and ``J^T u``
# is their sum. Here ``J^T (J v)``, the product with the generalized Gauss-Newton matrix
# of the square loss, as a function for an iterative solver. ``samples`` is how many at
# a time: what layers return for them has to fit.


def gram_operator(model, X, samples):
    """Return the function from ``v`` to ``J^T (J v)``, both ``{name: [*p.shape]}``.

    Raises ``ValueError`` if samples of different parts influence each other.
    """
    samples_apart(model, X, samples)

    def product(v):
        total = {}
        for x in X.split(samples):
            part = transposed_product(model, x, jacobian_product(model, x, v))
            total = {name: total.get(name, 0) + block for name, block in part.items()}
        return total

    return product


J_J_v = {k: torch.einsum("nc,nc...->...", J_v, block) for k, block in J.items()}
assert_close(gram_operator(model, X, samples=4)(v), J_J_v)
print("J^T (J v) agrees with the loop.")

# %%
# Peak memory and chunk_size
# --------------------------
# We measure the peaks of all ways as multiples of ``J``. ``chunk_size`` bounds what
# ``vmap`` or ``jacrev`` work on at once, but in the end they copy all chunks into one
# result: it lowers the peak of the CNN, whose hidden values take the memory, and raises
# that of the MLP, where ``J`` does. Files on disk do not count: write into them, and
# the peak is that of the streamed sum.

# fold: The calls, and the picture


def ten_at_once(model, X):
    """Return what ``vmap_jacrev`` does, from chunks of ten samples."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0), chunk_size=10)(params, X)


def peaks_of_all_ways(model, X):
    """Return ``{way: peak in multiples of J}``."""
    params, (N, C) = trainable(model), model(X).shape
    ones = {name: torch.ones_like(p) for name, p in params.items()}

    def into_memory():
        out = {name: p.new_empty(N, C, *p.shape) for name, p in ones.items()}
        write_jacobian(model, X, out, (8, C))

    ways = {
        "vmap(jacrev)": lambda: vmap_jacrev(model, X),
        "vmap, chunk_size=10": lambda: ten_at_once(model, X),
        "chunks into memory": into_memory,
        "streamed sum": lambda: gram_diagonal(model, X, (8, C)),
        "J v": lambda: jacobian_product(model, X, ones),
        "J^T u": lambda: transposed_product(model, X, torch.ones(N, C).to(X)),
    }
    size = N * C * sum(p.nbytes for p in params.values())
    return {way: peak_bytes(call) / size for way, call in ways.items()}


peaks = {name: peaks_of_all_ways(*case) for name, case in large.items()}
fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
for (name, found), marker, color in zip(peaks.items(), "os", ["#0072B2", "#D55E00"]):
    ax.plot(list(found.values()), list(found), marker, color=color, label=name, ms=11)
ax.axvline(1, color="black", linewidth=1, zorder=0)
ax.invert_yaxis()
ax.set(xscale="log", xlabel="peak memory in multiples of J")
ax.xaxis.set_major_formatter("{x:g}")
ax.legend()
streamed = peaks["MLP"]["streamed sum"]
ax.set_title(f"A streamed sum over J of an MLP\npeaks at {streamed:.2f} of J")
plt.show()
for name, plan in plans.items():
    wanted = peaks[name]["vmap(jacrev)"] * plan["bytes"]
    assert math.isclose(plan["peak"], wanted, rel_tol=0.1), "the plan was wrong"
for way in peaks["MLP"]:
    print(f"{way}: MLP {peaks['MLP'][way]:.2g}, CNN {peaks['CNN'][way]:.2g} of J")

# %%
# On images of 32 x 32 pixels, chunks take no more time. On small ones the fixed cost of
# each chunk shows, and in an MLP that a large ``J`` is copied. On one thread, the
# smallest time of five:


def smallest_ms(function, *args):
    """Return the smallest time of the processor for a call, in milliseconds."""
    return (
        min(timeit.repeat(partial(function, *args), timer=process_time, number=1)) * 1e3
    )


threads = torch.get_num_threads()
torch.set_num_threads(1)
cnn, small = large["CNN"]
images = {"CNN, 12 x 12": small, "CNN, 32 x 32": torch.rand(40, 3, 32, 32).float()}
cases = {"MLP": large["MLP"]} | {name: (cnn, X) for name, X in images.items()}
for name, case in cases.items():
    whole, chunked = smallest_ms(vmap_jacrev, *case), smallest_ms(ten_at_once, *case)
    print(f"{name}: at once {whole:.1f} ms, chunk_size=10 {chunked:.1f} ms")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Measure the peak on two samples before you compute: it may be many times ``J``.
# - Chunks, streamed or on disk, need the memory of a few samples, and are checked.
# - ``J v`` and ``J^T u`` need no ``J`` at all.
#
# Next: ``scale/neural_tangent_kernel.py`` multiplies ``J`` with its transpose, from
# small factors. The alternative: ``scale/distributed_jacobians.py`` splits ``J`` over
# processes.

# sphinx_gallery_parallel = False
