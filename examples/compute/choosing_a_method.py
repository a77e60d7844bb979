"""
Choosing a method for the Jacobian
==================================

After this page you know which method computes the Jacobian of your network's outputs
with respect to its parameters in the least time, and in the least memory, for your
batch size, number of outputs, number of parameters and kind of model. All methods run
on the same models, on your machine, and each has to be right before it is timed.
"""

import copy
import gc
import os
import platform
import re
import time
from importlib.metadata import version
from itertools import accumulate
from math import log
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import Timer

# %%
# Sizes
# -----
# The outputs ``fs = model(X)`` have shape ``[N, C]``; the parameters hold ``P``
# numbers. A sweep changes ``N``, ``C`` or the width, which sets ``P``, and keeps the
# others at ``BASE``. All are small, so that the page takes seconds: raise them.
# One thread is least disturbed by other programs. Take more on an idle machine.

BASE = {"MLP": {"N": 32, "C": 10, "width": 64}, "CNN": {"N": 8, "C": 10, "width": 12}}
SWEEPS = {
    "MLP": {"N": (2, 8, 32, 128), "C": (3, 10, 30), "width": (24, 64, 160)},
    "CNN": {"N": (2, 8, 32, 128), "C": (3, 10, 30), "width": (6, 12, 30)},
}
CHUNKED = {"MLP": (64, 8, 96), "CNN": (64, 8, 4)}  # N, C, width
THREADS = 1
LIMIT = 0.02  # seconds: a method leaves a sweep after a call that takes longer
TIE = 1.2  # the ratio of two medians that we call a tie

device = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr
default_threads = torch.get_num_threads()
torch.set_num_threads(THREADS)
_ = torch.manual_seed(0)

cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
cpus = re.findall(r"model name\s*: (.*)", cpuinfo) + [platform.machine()]
print(f"CPU: {cpus[0]}, threads: {THREADS}, device: {device}")
print(f"torch {torch.__version__}, BackPACK {version('backpack-for-pytorch')}")


def case(kind, N, C, width):
    """Return a model, inputs for 8 x 8 images, and the number of entries of J."""
    if kind == "MLP":
        layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
        layers += [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, C)]
    else:
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()]
        layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(2 * width, C)]
    model = nn.Sequential(*layers).to(device)
    P = sum(p.numel() for p in model.parameters())
    return model, torch.rand(N, 1, 8, 8, device=device), N * C * P


# %%
# Methods
# -------
# Each takes ``(model, X)`` and returns ``{name: Jacobian [N, C, *p.shape]}``. A call
# includes the forward pass, and BackPACK's copy of the model: you pay for both.


def forward(model, X, params=None):
    """Return ``fs`` of shape ``[N, C]`` and the parameters, by default the model's."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fs = functional_call(model, params, (X,)) if params else model(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    return fs, params or own


def empty(fs, params):
    return {name: p.new_empty(*fs.shape, *p.shape) for name, p in params.items()}


def detached(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def autograd_loop(model, X):
    fs, params = forward(model, X)
    jacobian = empty(fs, params)
    for row, f in enumerate(fs.flatten()):
        grads = autograd.grad(f, params.values(), retain_graph=True)
        for block, grad in zip(jacobian.values(), grads):
            block.flatten(0, 1)[row] = grad
    return jacobian


def grads_batched(model, X):
    fs, params = forward(model, X)
    E = torch.eye(fs.numel(), dtype=fs.dtype, device=device).unflatten(1, fs.shape)
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def functional_jacobian(model, X):
    params = detached(model)
    blocks = autograd.functional.jacobian(
        lambda *values: forward(model, X, dict(zip(params, values)))[0],
        tuple(params.values()),
    )
    return dict(zip(params, blocks))


def jacrev_batch(model, X):
    return jacrev(lambda params: forward(model, X, params)[0])(detached(model))


def vmap_jacrev(model, X, samples=None, outputs=None):
    """``samples`` and ``outputs`` limit how many of them are computed together."""
    jacobian = jacrev(lambda p, x: forward(model, x[None], p)[0][0], chunk_size=outputs)
    return vmap(jacobian, (None, 0), chunk_size=samples)(detached(model), X)


def batch_grad(model, X):
    X = X.detach().requires_grad_()
    fs, params = forward(extend(copy.deepcopy(model)), X)
    jacobian, C = empty(fs, params), fs.shape[1]
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), [X, *params.values()], retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch
            del p.grad_batch
    return jacobian


def sqrt_ggn(model, X):
    X = X.detach().requires_grad_()
    fs, params = forward(extend(copy.deepcopy(model)), X)
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, [X, *params.values()])
    V = {name: p.sqrt_ggn_exact.contiguous() for name, p in params.items()}
    return {name: v.div_(2**0.5).transpose(0, 1) for name, v in V.items()}


# %%
# Theory
# ------
# To add a method, add an entry, with what theory says of its time, and of its memory
# beyond the Jacobian: the terms of a sum, each a product of ``N``, ``C``, ``P`` and
# ``H``, the hidden values per sample. ``H`` grows as the square root of ``P``.
#
# - ``NNCP``: ``N * C`` cotangents go through the whole batch. ``NCP``: ``C`` cotangents
#   go through each sample. ``NNCH``, ``NCH``: all are held together at a layer.
#   ``NNCC``: they start from an identity matrix.
# - ``NCP`` in memory: ``functional.jacobian`` stacks rows, a convolution may copy.
# - ``NP``: one pass of ``BatchGrad``. ``P``: one gradient, or a copy of the model.
#   ``NH``: the graph.

methods = {
    "autograd loop": (autograd_loop, "NNCP", "P NH"),
    "is_grads_batched": (grads_batched, "NNCP", "NNCC NNCH"),
    "functional.jacobian": (functional_jacobian, "NNCP", "NCP"),
    "jacrev of the batch": (jacrev_batch, "NNCP", "NNCC NNCH"),
    "vmap(jacrev)": (vmap_jacrev, "NCP", "NCH NCP"),
    "BatchGrad": (batch_grad, "NCP", "P NH NP"),
    "SqrtGGNExact": (sqrt_ggn, "NCP", "P NCH NCP"),
}

# %%
# Each method must match the loop in double precision before it is timed in single
# precision. BackPACK's rule for ``AvgPool2d`` computes in the default type, and raises
# for another one, so we set the default instead of converting the model.

torch.set_default_dtype(torch.float64)
for kind in SWEEPS:
    model, X, _ = case(kind, N=5, C=3, width=4)
    reference = autograd_loop(model, X)
    for function, *_ in methods.values():
        assert_close(function(model, X), reference)
    print(f"{kind}: {len(methods)} methods agree.")
torch.set_default_dtype(torch.float32)

# %%
# Time and peak memory
# --------------------
# ``Timer`` warms up, repeats a call, and waits for a GPU. The peak is the largest sum
# of the bytes that PyTorch allocates and frees in a call: on a CPU, its profiler
# records them. What a library allocates without PyTorch is not seen.


def quartiles(function, *args):
    """Return the three quartiles of the seconds that ``function(*args)`` takes."""
    names = {"f": function, "args": args}
    timer = Timer("f(*args)", globals=names, num_threads=THREADS)
    times = timer.adaptive_autorange(
        min_run_time=LIMIT / 4, max_run_time=2 * LIMIT
    ).times
    return torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def peak_bytes(function, *args):
    """Return the peak of the bytes that PyTorch allocates in ``function(*args)``."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function(*args)
        return torch.cuda.max_memory_allocated() - start
    with profile(profile_memory=True) as recorded:
        function(*args)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def measure(kind, N, C, width, last):
    """Measure the methods that did not take too long at the ``last`` point."""
    model, X, entries = case(kind, N, C, width)
    J = torch.empty(entries, device=device)
    spread = {
        "write, new memory": quartiles(lambda: torch.empty_like(J).fill_(1)),
        "write, same memory": quartiles(lambda: J.fill_(1)),
    }
    memory = {"the Jacobian": J.nbytes}
    for name, (function, *_) in methods.items():
        if last.get(name, 0) <= LIMIT:
            spread[name] = quartiles(function, model, X)
            memory[name] = peak_bytes(function, model, X) - J.nbytes
    time = {name: median for name, (_, median, _) in spread.items()}
    return {
        **{"N": N, "C": C, "P": entries // N // C, "J": J.nbytes, "time": time},
        **{"spread": spread, "memory": memory},
        "last": last | time,
    }


gc.freeze()  # what exists now is no garbage, and a search through it takes long
points, sweeps = {}, {}
for kind, axes in SWEEPS.items():
    for axis, (size, values) in zip("NCP", axes.items()):
        start, base = time.perf_counter(), (kind, *BASE[kind].values())
        last = points[base]["last"] if base in points else {}
        for value in values:
            key = kind, *(BASE[kind] | {size: value}).values()
            points[key] = points.get(key) or measure(*key, last)
            last = points[key]["last"]
            sweeps.setdefault((kind, axis), []).append(points[key])
        seconds = time.perf_counter() - start
        print(f"{kind}, {size} = {values}: {seconds:.1f} s", flush=True)

# %%
# Time against N, C and P
# -----------------------
# The slope of a line on logarithmic axes is the exponent. We print the slope between
# the last two points, with theory in brackets. A smaller one means that fixed costs
# still count. A larger one can come from new memory: see where its line bends.

COLORS = "black #E69F00 #F0E442 #009E73 #56B4E9 #0072B2 #D55E00 #CC79A7".split()
styles = {name: style for name, *style in zip(methods, COLORS, "os^vDPX*")}
plt.rcParams.update({"font.size": 11, "lines.markersize": 7})


def growth(kind, quantity, title, scale):
    """Draw how a quantity grows in each sweep, and print the slopes."""
    fig, axes = plt.subplots(3, figsize=(5, 10), layout="constrained")
    fig.suptitle(f"{kind}: {title}")
    slopes = dict.fromkeys(methods, "")
    for ax, axis in zip(axes, "NCP"):
        ends = []
        for name in sweeps[kind, axis][0][quantity]:
            line = [point for point in sweeps[kind, axis] if name in point[quantity]]
            xs = [point[axis] for point in line]
            ys = [point[quantity][name] * scale for point in line]
            color, marker = styles.get(name, ("0.5", None))
            ax.loglog(xs, ys, color=color, marker=marker, ls="-" if marker else "--")
            ends.append((ys[-1], xs[-1], name, color))
            if name in methods and len(xs) > 1:
                terms = methods[name][1 if quantity == "time" else 2].split()
                powers = {
                    t.count(axis) + (axis == "P") * t.count("H") / 2 for t in terms
                }
                theory = " to ".join(
                    f"{p:g}" for p in sorted({min(powers), max(powers)})
                )
                slope = log(ys[-1] / ys[-2]) / log(xs[-1] / xs[-2])
                slopes[name] += f", {axis} {slope:.1f} ({theory})"
        for i, (y, x, name, color) in enumerate(sorted(ends)):
            place = {"xytext": (1.08, i / 8), "textcoords": "axes fraction"}
            arrow = {"arrowstyle": "-", "color": color}
            ax.annotate(name, (x, y), **place, arrowprops=arrow, va="center")
        ax.set(xlabel=axis, ylabel=title)
        ticks = [point[axis] for point in sweeps[kind, axis]]
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    plt.show()
    for name, text in slopes.items():
        print(f"{kind}, {name}{text}")


growth("MLP", "time", "time in ms", 1e3)

# %%
# The same for the CNN.

growth("CNN", "time", "time in ms", 1e3)

# %%
# Time to write the Jacobian
# --------------------------
# No method that returns ``J`` is faster than writing it. New memory takes longer than
# memory in use, once the system has to provide its pages in each call. These are the
# multiples of both for the largest ``J``.

for kind in SWEEPS:
    point = max((points[key] for key in points if key[0] == kind), key=lambda p: p["J"])
    print(f"{kind}, J of {point['J'] / 1e6:.0f} MB, times writing to new, same memory:")
    new, same, *times = point["time"].items()
    for name, seconds in times:
        print(f"  {name}: x {seconds / new[1]:.1f}, x {seconds / same[1]:.1f}")

# %%
# Memory beyond the Jacobian
# --------------------------
# The peak less ``J``. The gray line is ``J``: above it, a method needs more than twice
# the memory of its result.

growth("MLP", "memory", "peak beyond J in MB", 1e-6)

# %%
# In the CNN, hidden values are many and parameters are few.

growth("CNN", "memory", "peak beyond J in MB", 1e-6)

# %%
# Memory with chunk_size
# ----------------------
# In ``vmap``, ``chunk_size`` is a number of samples, in ``jacrev`` one of outputs. It
# limits the cotangents in flight, not ``J``. The chunks of ``J`` are then copied into
# one tensor, so both exist at once. Where ``J`` is most of the peak, chunks raise it.
# Where cotangents are, chunks lower it.

fig, axes = plt.subplots(2, figsize=(5, 7), sharex=True, layout="constrained")
fig.suptitle("Peak memory with chunks, in units of J")
for ax, (kind, (N, C, width)) in zip(axes, CHUNKED.items()):
    model, X, entries = case(kind, N, C, width)
    whole = peak_bytes(vmap_jacrev, model, X) / entries / 4
    ax.axhline(whole, color="black", label="no chunks")
    parts = {
        "vmap": [(n, C) for n in (1, 4, 16)],
        "jacrev": [(N, c) for c in (1, 2, 4)],
    }
    for (name, sizes), color, marker in zip(parts.items(), COLORS[3::3], "vD"):
        ys = [peak_bytes(vmap_jacrev, model, X, *size) / entries / 4 for size in sizes]
        xs = [n * c for n, c in sizes]
        ax.semilogx(xs, ys, color=color, marker=marker, label=f"chunk_size in {name}")
        assert all((y > whole) == (kind == "MLP") for y in ys)
        low, high = min(ys) / whole, max(ys) / whole
        print(f"{kind}, chunks in {name}: x {low:.2f} to x {high:.2f}")
    ax.set(ylim=0, ylabel=f"{kind}: peak / J")
    ax.set_xticks([8, 32, 128], [8, 32, 128])
    ax.minorticks_off()
axes[0].legend(loc="lower right")
axes[1].set(xlabel="samples times outputs in a chunk")
plt.show()

# %%
# Fastest method for N, C, P and the kind of model
# ------------------------------------------------
# Each row is a point of a sweep, with its time divided by the fastest. Bars show the
# quartiles. In the gray band, medians are a tie. We also call it a tie if the quartiles
# overlap.

results, winners = {}, {}
fig, axes = plt.subplots(2, figsize=(5, 10), layout="constrained")
for ax, kind in zip(axes, SWEEPS):
    rows = {f"{x} = {p[x]}": p for x in "NCP" for p in sweeps[kind, x]}
    results[kind], winners[kind] = {}, {}
    for y, (row, point) in enumerate(rows.items()):
        times = {name: t for name, t in point["time"].items() if name in methods}
        best = min(times, key=times.get)
        limit = max(TIE * times[best], point["spread"][best][2])
        ties = [name for name in times if point["spread"][name][0] <= limit]
        for name in times:
            low, median, high = (t / times[best] for t in point["spread"][name])
            color, marker = styles[name]
            ax.plot([low, high], [y, y], color=color)
            ax.plot(median, y, marker, color=color, label=name if y == 0 else None)
        results[kind][row], winners[kind][row] = times, ties
        least = min(times, key=point["memory"].get)
        print(f"{kind}, {row}: {' = '.join(ties)}; least memory: {least}")
    ax.axvspan(1, TIE, color="0.85")
    ax.set(xscale="log", yticks=range(len(rows)), yticklabels=rows, title=kind)
    ax.invert_yaxis()
fig.suptitle("Time, as a multiple of the fastest")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()
torch.set_num_threads(default_threads)

# %%
# Where to go next
# ----------------
# Next: ``compute/torch_func_jacobians.py`` teaches the methods of PyTorch alone. The
# alternative: ``batched_jacobians.py`` teaches ``BatchGrad`` and ``SqrtGGNExact``.
