"""
Choosing a method for the Jacobian
==================================

After this page you know which method to take for your network and your batch: for
networks of real sizes and for small ones, you see which one takes the least time and
which one the least memory. All methods run on the same models, on your machine, in
single precision, and each has to be right before it is timed.
"""

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

# %%
# The recipe to beat
# ------------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``, the Jacobian of a parameter ``p``
# has shape ``[N, C, *p.shape]``. The recipe takes each sample alone.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


J = vmap_jacrev(nn.Linear(20, 5), torch.rand(32, 20))
print({name: list(block.shape) for name, block in J.items()})

# %%
# Your case: take this, because
# -----------------------------
# Five methods run on six cases, in single precision and on one thread. They have to be
# right, then they take turns, and the smallest time counts: other programs only add
# time. The first named is the fastest, or ties with it and has the lower peak. ``J`` is
# the size of the Jacobian, which is part of each peak.

# fold: The other methods, the cases, and how right, peak and time are found
import copy
import gc
import math
import os
import platform
import warnings
from itertools import accumulate, pairwise, product
from time import process_time

import matplotlib.pyplot as plt
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd
from torch.autograd.profiler import profile
from torch.testing import assert_close
from torch.utils.benchmark.utils.timer import timer


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


def calls(model, X):
    """Return ``{method: (function, model, X)}`` for all methods."""
    extended = extend(copy.deepcopy(model))  # BackPACK's hooks stay with a model
    return {
        "autograd loop": (autograd_loop, model, X),
        "is_grads_batched": (grads_batched, model, X),
        "vmap(jacrev)": (vmap_jacrev, model, X),
        "BatchGrad": (batch_grad, extended, X),
        "SqrtGGNExact": (sqrt_ggn, extended, X),
    }


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

FEW = 40  # the loop is timed if N * C is at most this, the batched pass up to ten times
SECONDS = 0.1  # what the repeated calls of a case take; a longer call is not repeated
TIE = 1.2
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr


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


def right_methods(model, X):
    """Return the methods that give the Jacobian, on two samples in double precision."""
    model, X = copy.deepcopy(model).double(), X[:2].double()
    torch.set_default_dtype(torch.float64)  # BackPACK's rule for AvgPool2d takes it
    J = autograd_loop(model, X)
    right = [name for name, call in calls(model, X).items() if agrees(J, *call)]
    torch.set_default_dtype(torch.float32)
    return right


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


threads = torch.get_num_threads()
torch.set_num_threads(1)  # least disturbed by other programs
gc.freeze()  # what exists now is no garbage, and a search through it takes long
print(f"{platform.machine()}, one thread, {device}, torch {torch.__version__}")
times, memory = {}, {}
for case, (model, X) in cases.items():
    limits = {"autograd loop": FEW, "is_grads_batched": 10 * FEW}
    rows = model(X).numel()
    right = right_methods(model, X)
    right = [name for name in right if rows <= limits.get(name, math.inf)]
    methods = {name: call for name, call in calls(model, X).items() if name in right}
    peaks = {name: peak_bytes(*call) for name, call in methods.items()}
    seconds = smallest_seconds(methods, SECONDS)
    J_bytes = 4 * rows * sum(p.numel() for p in model.parameters())
    times[case] = {name: t / min(seconds.values()) for name, t in seconds.items()}
    memory[case] = {name: peak / J_bytes for name, peak in peaks.items()}
    ties = [name for name, t in times[case].items() if t <= TIE]
    ties.sort(key=memory[case].get)
    least = min(peaks, key=peaks.get)
    print(f"{case}, J {J_bytes / 1e6:.3g} MB")
    print(f"  take {' or '.join(ties)}: {1e3 * min(seconds.values()):.3g} ms")
    for name in sorted(set(right) - set(ties), key=times[case].get)[:1]:
        print(f"  next, {name}: x {times[case][name]:.1f}")
    print(f"  least memory, {least}: {memory[case][least]:.2f} J")

# %%
# ``autograd_loop`` is the definition. ``grads_batched`` sends its passes together.
# BackPACK's two methods, explained in ``batched_jacobians.py``, have no rule for some
# layers: where they raise or warn, they are left out. So are methods over the whole
# batch where ``N * C`` is large.
#
# ``batched_jacobian`` is not among them: it takes any model, tries a fast method,
# and checks what that gives. ``scale/universal_jacobian.py`` shows its time as a
# multiple of that of ``vmap(jacrev)``. For wide linear layers at every step of a loop,
# it writes into memory that you keep.
#
# Time of each method
# -------------------
# The methods over the whole batch push ``N * C`` cotangents, weights for the outputs,
# through all ``N`` samples.
# The others push ``C`` through each sample: ``N`` times less work, which pays when
# ``N`` is large, at a fixed cost, which counts when ``N * C`` or the network is small.
# And each result has to be written, which takes most of the time where the Jacobian is
# large.

# fold: How the picture is drawn
COLORS = "black #E69F00 #009E73 #56B4E9 #CC79A7".split()
STYLES = dict(zip(calls(model, X), zip(COLORS, "os^vD")))


def draw(values, title, xlabel):
    """Draw a row for each case of ``values``, with a mark for each method."""
    fig, ax = plt.subplots(figsize=(5, 4.8), layout="constrained")
    for shift, (name, (color, marker)) in enumerate(STYLES.items()):
        marks = [(row[name], y) for y, row in enumerate(values.values()) if name in row]
        xs, ys = zip(*marks)
        ys = [y + 0.19 * (shift - 2) for y in ys]  # none hides another
        style = {"color": color, "marker": marker, "markersize": 8, "zorder": 3}
        ax.plot(xs, ys, linestyle="", markeredgecolor="white", label=name, **style)
    ax.set(xscale="log", xlabel=xlabel)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(range(len(values)), [case.replace(", ", "\n", 1) for case in values])
    ax.invert_yaxis()
    ax.grid(color="0.85")
    fig.suptitle(title)
    fig.legend(loc="outside lower center", ncols=2)
    plt.show()


slowest = max(row["vmap(jacrev)"] for row in times.values())
title = f"vmap(jacrev): at most {slowest:.1f} times the fastest"
draw(times, title, "time as a multiple of the fastest")

# %%
# Peak memory
# -----------
# What is not the Jacobian is mostly cotangents: in a CNN many pixels share a parameter,
# so they can be larger than it. Then compute a few samples at a time, as
# ``scale/jacobians_without_memory.py`` does.

most = max(peak for row in memory.values() for peak in row.values())
title = f"Peak memory: up to {most:.3g} times the Jacobian"
draw(memory, title, "peak as a multiple of the Jacobian")

# %%
# Growth with N
# -------------
# A small MLP with ``C = 5`` outputs. A method leaves after a call that takes long.

# fold: How the growth is measured and drawn
LONG = 0.03
lines = {name: {} for name in STYLES}
model = mlp(16, 32, 32, 5).to(device)
for N in 1, 4, 16, 64:
    methods = calls(model, torch.rand(N, 16, device=device))
    for name, line in lines.items():
        if any(seconds > LONG for seconds in line.values()):
            del methods[name]
    for name, seconds in smallest_seconds(methods, LONG).items():
        lines[name][N] = seconds
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for name, line in lines.items():
    color, marker = STYLES[name]
    ms = [1e3 * seconds for seconds in line.values()]
    ax.loglog(list(line), ms, color=color, marker=marker, label=name)
    print(f"{name}: x {ms[-1] / ms[0]:.3g} for N {min(line)} to {max(line)}")
ax.set(
    xlabel="N", ylabel="time in ms", xticks=[1, 4, 16, 64], xticklabels=[1, 4, 16, 64]
)
ax.minorticks_off()
fig.suptitle("Time against N, small MLP")
fig.legend(loc="outside lower center", ncols=2)
plt.show()
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - The numbers above are from the machine that built this page. For yours, put your
#   model and batch into ``cases`` and run the script. Or time ten samples: methods for
#   one sample at a time take time in proportion to ``N``.
# - ``vmap(jacrev)`` needs no other package and six lines.
# - With few samples and outputs the fixed cost decides, and ``grads_batched`` has less
#   of it: take it for ``N * C`` of about ten and fewer, and more if the model is tiny.
#
# Next: ``scale/universal_jacobian.py`` teaches ``batched_jacobian``, for models that
# ``vmap`` does not take. The alternative: ``compute/torch_func_jacobians.py`` teaches
# the methods of PyTorch alone.

# sphinx_gallery_parallel = False
