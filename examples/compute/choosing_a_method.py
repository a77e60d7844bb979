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
from collections import Counter
from importlib.metadata import version
from itertools import accumulate, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.autograd.graph import get_gradient_edge
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.benchmark import Timer

# %%
# Sizes
# -----
# The outputs ``fs = model(X)`` have shape ``[N, C]``. The parameters hold ``P``
# numbers. A sweep changes ``N``, ``C`` or the width, which sets ``P``, and keeps the
# others at ``BASE``. All are small, so that the page takes seconds: raise them on your
# machine. One thread is least disturbed by other programs: take more on an idle one.

BASE = {"MLP": {"N": 24, "C": 10, "width": 64}, "CNN": {"N": 8, "C": 10, "width": 12}}
SWEEPS = {
    "MLP": {"N": (2, 8, 24, 72), "C": (3, 10, 20), "width": (24, 64, 256)},
    "CNN": {"N": (2, 8, 24, 72), "C": (3, 10, 20), "width": (6, 12, 30)},
}
CHUNKED = {"MLP": (64, 8, 96), "CNN": (64, 8, 5)}  # N, C, width
CHUNKS = {"vmap": [(1, None), (16, None)], "jacrev": [(None, 1), (None, 4)]}
THREADS = 1
LIMIT = 0.03  # a method leaves a sweep after a call that takes more seconds
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
# ``layer_structure`` is the core of ``batched_jacobian`` in
# ``scale/universal_jacobian.py``, which checks its result and takes any model.


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
    for n, c in product(*map(range, fs.shape)):
        grads = autograd.grad(fs[n, c], params.values(), retain_graph=True)
        for block, grad in zip(jacobian.values(), grads):
            block[n, c] = grad
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
            block = jacobian[name][:, c]
            block.copy_(p.grad_batch.view_as(block))
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


def layer_structure(model, X, out=None):
    """Write each block as a product of matrices, into ``out`` if that is given."""
    calls, handles, N = [], [], len(X)

    def record(layer, inputs, output):
        if output.requires_grad and len(inputs[0]) == N:
            calls.append((layer, inputs[0].detach(), get_gradient_edge(output)))

    for m in model.modules():
        conv = type(m) is nn.Conv2d and m.groups == 1 and m.padding_mode == "zeros"
        if type(m) is nn.Linear or (conv and not isinstance(m.padding, str)):
            handles.append(m.register_forward_hook(record))
    try:
        fs, params = forward(model, X)
    finally:
        for handle in handles:
            handle.remove()
    count = Counter(p for layer, *_ in calls for p in layer.parameters())
    if others := [name for name, p in params.items() if count[p] != 1]:
        raise ValueError(f"not used by one Linear or plain Conv2d, once: {others}")
    jacobian, C = out or empty(fs, params), fs.shape[1]
    E = torch.eye(C, dtype=fs.dtype, device=device)[:, None].expand(C, N, C)
    edges = [edge for *_, edge in calls]
    deltas = vmap(lambda cotangents: autograd.grad(fs, edges, cotangents))(E)
    names = {p: name for name, p in params.items()}
    for (layer, a, _), delta in zip(calls, deltas):
        if type(layer) is nn.Linear:  # on [N, I] or [N, T, I]
            left = delta.reshape(C, N, -1, delta.shape[-1]).mT
            right = a.reshape(N, -1, a.shape[-1])
        else:  # linear, on windows
            sizes = layer.kernel_size, layer.dilation, layer.padding, layer.stride
            left, right = delta.flatten(3), F.unfold(a, *sizes).mT
        if layer.weight in names:
            rows = left.transpose(0, 1).flatten(1, 2)  # [N, C * O, T]
            block = jacobian[names[layer.weight]].view(*rows.shape[:2], -1)
            torch.bmm(rows, right, out=block)
        if layer.bias in names:
            jacobian[names[layer.bias]].copy_(left.sum(3).transpose(0, 1))
    return jacobian


# %%
# Theory
# ------
# To add a method, add an entry: its function, and the exponents of ``N``, ``C`` and
# ``P`` that theory gives for its time and its memory beyond the Jacobian. A range says
# that several terms compete.
#
# - Time: the first four send ``N * C`` cotangents through the whole batch, the others
#   send ``C`` cotangents through each sample.
# - Memory: cotangents that are held together grow as the width, with exponent 0.5 of
#   ``P``. A gradient or a copy of the model grows as ``P``. A copy of the Jacobian
#   grows as ``N * C * P``: rows that are stacked, or blocks of a convolution.

methods = {
    "autograd loop": (autograd_loop, "2 1 1", "0-1 0 0.5-1"),
    "is_grads_batched": (grads_batched, "2 1 1", "2 1-2 0.5-1"),
    "functional.jacobian": (functional_jacobian, "2 1 1", "1 1 1"),
    "jacrev of the batch": (jacrev_batch, "2 1 1", "2 1-2 0.5-1"),
    "vmap(jacrev)": (vmap_jacrev, "1 1 1", "1 1 0.5-1"),
    "BatchGrad": (batch_grad, "1 1 1", "1 0 1"),
    "SqrtGGNExact": (sqrt_ggn, "1 1 1", "0-1 0-1 0.5-1"),
    "layer structure": (layer_structure, "1 1 1", "1 0-1 0.5-1"),
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
    times = timer.adaptive_autorange(min_run_time=0.005, max_run_time=0.015).times
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


def measure(kind, N, C, width, names):
    """Return the sizes, and the times and the memory of the methods in ``names``."""
    model, X, entries = case(kind, N, C, width)
    J = torch.empty(entries, device=device)
    spread = {
        "write, new memory": quartiles(lambda: torch.empty_like(J).fill_(1)),
        "write, same memory": quartiles(lambda: J.fill_(1)),
    }
    memory = {"the Jacobian": J.nbytes}
    for name in names:
        spread[name] = quartiles(methods[name][0], model, X)
        memory[name] = peak_bytes(methods[name][0], model, X) - J.nbytes
    time = {name: median for name, (_, median, _) in spread.items()}
    sizes = {"N": N, "C": C, "P": entries // N // C}
    return sizes | {"time": time, "spread": spread, "memory": memory}


gc.freeze()  # what exists now is no garbage, and a search through it takes long
points, sweeps = {}, {}
for kind, axes in SWEEPS.items():
    for axis, (size, values) in zip("NCP", axes.items()):
        start, base = time.perf_counter(), points.get((kind, *BASE[kind].values()))
        names = [n for n in methods if not base or base["time"].get(n, LIMIT) < LIMIT]
        for value in values:
            key = kind, *(BASE[kind] | {size: value}).values()
            points[key] = points.get(key) or measure(*key, names)
            names = [name for name in names if points[key]["time"][name] < LIMIT]
            sweeps.setdefault((kind, axis), []).append(points[key])
        seconds = time.perf_counter() - start
        print(f"{kind}, {size} = {values}: {seconds:.1f} s", flush=True)

# %%
# Time against N, C and P
# -----------------------
# The slope of a line on logarithmic axes is the exponent. We print the slope of a line
# fitted to the last three points, with theory in brackets. A smaller one means that
# fixed costs still count. A larger one can come from new memory: see where its line
# bends. The last layer has parameters for each output, so ``P`` grows with ``C``.

COLORS = "black #E69F00 #F0E442 #009E73 #56B4E9 #0072B2 #D55E00 #CC79A7".split()
styles = dict(zip(methods, zip(COLORS, "os^vDPX<")))
plt.rcParams.update({"font.size": 11, "lines.markersize": 7})


def growth(kind, quantity, title, scale):
    """Draw how a quantity grows in each sweep, and print the slopes."""
    fig, axes = plt.subplots(3, figsize=(5, 10), layout="constrained")
    fig.suptitle(f"{kind}: {title}")
    slopes = {}
    for i, (ax, axis) in enumerate(zip(axes, "NCP")):
        sweep, ends = sweeps[kind, axis], []
        for name in sweep[0][quantity]:
            line = [point for point in sweep if name in point[quantity]]
            xs = [point[axis] for point in line]
            ys = [point[quantity][name] * scale for point in line]
            color, marker = styles.get(name, ("0.5", "_"))
            ax.loglog(xs, ys, color=color, marker=marker, markeredgecolor="0.3")
            ends.append((ys[-1], xs[-1], name, color))
            if name in methods and len(xs) > 1:
                slope, _ = np.polyfit(np.log(xs[-3:]), np.log(ys[-3:]), 1)
                theory = methods[name][1 if quantity == "time" else 2].split()[i]
                slopes.setdefault(name, []).append(
                    f"{axis} {round(slope, 1) or 0.0} ({theory})"
                )
        for height, (y, x, name, color) in enumerate(sorted(ends)):
            place = {"textcoords": "axes fraction", "va": "center"}
            arrow = {"arrowstyle": "-", "color": color, "relpos": (0, 0.5)}
            ax.annotate(name, (x, y), (1.08, height / 9), arrowprops=arrow, **place)
        ax.set(xlabel=axis, ylabel=title, xticks=[point[axis] for point in sweep])
        ax.set_xticklabels(point[axis] for point in sweep)
        ax.minorticks_off()
    plt.show()
    for name, texts in slopes.items():
        print(f"{name}: {', '.join(texts)}")


growth("MLP", "time", "time in ms", 1e3)

# %%
# Next, the CNN.

growth("CNN", "time", "time in ms", 1e3)

# %%
# Time to write the Jacobian
# --------------------------
# A result has to be written. We divide the times by that of writing the bytes of the
# Jacobian, for the largest one: to new memory, or again and again to the same. New
# memory takes longer where the system hands out its pages in each call. A method whose
# memory is used again can stay below the first, and hardly below the second. With
# ``out=``, ``layer_structure`` writes into its last result: no block is new.

for kind in SWEEPS:
    sizes = {key: p["memory"]["the Jacobian"] for key, p in points.items()}
    key = max([key for key in sizes if key[0] == kind], key=sizes.get)
    model, X, _ = case(*key)
    out = layer_structure(model, X)
    again = quartiles(layer_structure, model, X, out)[1]
    times = points[key]["time"] | {"layer structure, out=": again}
    (_, new), (_, same), *rest = times.items()
    print(f"{kind}, {sizes[key] / 1e6:.0f} MB, new and same memory:")
    for name, seconds in rest:
        print(f"  {name}: x {seconds / new:.1f}, x {seconds / same:.1f}")

# %%
# Memory beyond the Jacobian
# --------------------------
# We subtract the Jacobian from the peak. A method above the gray line, the Jacobian,
# needs more than twice the memory of its result.

growth("MLP", "memory", "peak beyond J in MB", 1e-6)

# %%
# Convolutions have few parameters and many hidden values.

growth("CNN", "memory", "peak beyond J in MB", 1e-6)

# %%
# Memory with chunk_size
# ----------------------
# In ``vmap``, ``chunk_size`` is a number of samples, in ``jacrev`` a number of outputs.
# It limits the cotangents in flight, not the Jacobian. The chunks are copied into one
# result in the end, so both exist at once. Where the Jacobian is most of the peak,
# chunks raise it. Where cotangents are, chunks lower it.

fig, axes = plt.subplots(2, figsize=(5, 6), layout="constrained")
for ax, (kind, sizes) in zip(axes, CHUNKED.items()):
    model, X, entries = case(kind, *sizes)
    peaks = {"no chunks": peak_bytes(vmap_jacrev, model, X)}
    for name, chunks in CHUNKS.items():
        for chunk in chunks:
            peak = peak_bytes(vmap_jacrev, model, X, *chunk)
            peaks[f"{name}, {chunk[0] or chunk[1]}"] = peak
            assert (peak > peaks["no chunks"]) == (kind == "MLP")
    bars = ax.barh(list(peaks), [peak / entries / 4 for peak in peaks.values()])
    ax.bar_label(
        bars, [f"x {peak / peaks['no chunks']:.2f}" for peak in peaks.values()]
    )
    ax.axvline(1, color="black")
    ax.margins(x=0.2)
    ax.set(title=kind, xlabel="peak / Jacobian")
fig.suptitle("Peak memory with chunk_size, x no chunks")
plt.show()

# %%
# Fastest method for N, C, P and the kind of model
# ------------------------------------------------
# Each row of the picture is a point of a sweep, with its times divided by the smallest.
# Bars join the quartiles. Two methods tie if their medians lie in the gray band, or if
# their quartiles overlap. We print which methods are fastest, the ratio to the next one
# that does not tie, and which method needs the least memory.

results = {}
fig, axes = plt.subplots(2, figsize=(5, 11), layout="constrained")
for ax, kind in zip(axes, SWEEPS):
    rows = {f"{x} = {point[x]}": point for x in "NCP" for point in sweeps[kind, x]}
    results[kind] = {}
    for y, (row, point) in enumerate(rows.items()):
        times = {name: t for name, t in point["time"].items() if name in methods}
        results[kind][row] = times
        best = min(times, key=times.get)
        for name in times:
            low, median, high = (t / times[best] for t in point["spread"][name])
            color, marker = styles[name]
            ax.plot([low, high], [y, y], color=color)
            ax.plot(median, y, marker, color=color, markeredgecolor="0.3", label=name)
        bound = max(TIE * times[best], point["spread"][best][2])
        ties = [name for name in times if point["spread"][name][0] <= bound]
        others = [time for name, time in times.items() if name not in ties]
        ahead = f", next x {min(others) / times[best]:.1f}" if others else ""
        least = min(times, key=point["memory"].get)
        print(f"{kind}, {row}: {' = '.join(ties)}{ahead}; least memory: {least}")
    ax.axvspan(1, TIE, color="0.85")
    ax.set(xscale="log", title=kind, xlabel="time / smallest time of the row")
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
fig.suptitle("Time, as a multiple of the fastest")
handles, names = axes[0].get_legend_handles_labels()
legend = dict(zip(names, handles))
fig.legend(legend.values(), legend, loc="outside lower center", ncols=2)
plt.show()
torch.set_num_threads(default_threads)

# %%
# Where to go next
# ----------------
# Next: ``scale/universal_jacobian.py`` takes layer structure to any model. The
# alternative: ``compute/torch_func_jacobians.py`` teaches the methods of PyTorch alone,
# and ``batched_jacobians.py`` teaches ``BatchGrad`` and ``SqrtGGNExact``.
