"""Print every ratio of speed and memory that the site claims, and hold it to a bound.

The functions that are compared take turns. A ratio is the median of those of the turns,
so a slow machine does not change it much, though a busy one does: run it on an idle
one. On one thread it counts the time of this process; an argument gives the number of
threads. The exit status is the number of bounds that do not hold.
"""

import contextlib
import io
import os
import platform
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr

import torch
from definitions import Definitions
from field import FIELD, mlp, vmap_jacrev

ROOT = Path(__file__).parents[1]
THREADS = int(sys.argv[1]) if sys.argv[1:] else 1
clock = time.process_time if THREADS == 1 else time.perf_counter
SECONDS = 1  # for the turns of one model
LARGE = {
    "MLP 784-256-256-10": FIELD["MLP 784-256-256-10"],
    "MLP 64-128-128-10": lambda: (mlp(64, 128, 128, 10), torch.rand(128, 64)),
    "MLP 64-64-64-100": lambda: (mlp(64, 64, 64, 100), torch.rand(32, 64)),
}
FEW = "``N * C`` of at most ten", "`is_grads_batched <", "is_grads_batched"
MOST = "Most models, CNNs among them", "`vmap(jacrev) <", "vmap(jacrev)"
WIDE = (
    "MLP with layers of a hundred units or more, at every step",
    "``out=``",
    "batched_jacobian, out=",
)
GUIDE = {  # case of the benchmark page: its row of the guide, what that names, and how
    "small MLP, N = 2, C = 1": FEW,  # this file calls it
    "small MLP, N = 32, C = 5": MOST,
    "wide MLP, N = 1, C = 10": FEW,
    "wide MLP, N = 16, C = 10": WIDE,
    "CNN, N = 12, C = 10": MOST,
    "transformer, N = 12, C = 9": MOST,
}
failed = []


def names(tutorial):
    """Return the names of a tutorial, in single precision."""
    found = Definitions(ROOT / "examples" / f"{tutorial}.py")
    torch.set_default_dtype(torch.float32)
    return found


def turns(calls, seconds=SECONDS):
    """Return ``{name: milliseconds of its turns}``, of at least five turns."""
    times = {name: [] for name in calls}
    for function, *args in calls.values():
        function(*args)  # the first call loads code and memory
    turn, end = 0, clock() + seconds
    while turn < 5 or clock() < end:
        turn += 1
        for name, (function, *args) in calls.items():
            start = clock()
            function(*args)
            times[name].append(1e3 * (clock() - start))
    return times


def ratio(times, name, other):
    """Return the median of the ratios in each turn, and a text with their quartiles.

    ``other`` is a name, or several: then their fastest counts.
    """
    others = [times[k] for k in ([other] if isinstance(other, str) else other)]
    ratios = [t / min(rest) for t, *rest in zip(times[name], *others)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, f"x {median:.2f} ({low:.2f}-{high:.2f})"


def bound(claim, value, least=None, most=None):
    good = value >= least if most is None else value <= most
    limit = f"at least {least:g}" if most is None else f"at most {most:g}"
    print(f"{'ok  ' if good else 'FAIL'} {claim}: {value:.3g} ({limit})", flush=True)
    if not good:
        failed.append(claim)


def works(function, *args):
    """Return whether a method has rules for all layers of a model."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Extension saving to")  # BackPACK
            function(*args)
    except (NotImplementedError, UserWarning, AssertionError, RuntimeError):
        return False
    return True


begin = time.perf_counter()
warnings.simplefilter("ignore")  # vmap warns that it loops over some operations
torch.set_num_threads(THREADS)
print(f"Python {platform.python_version()}, {platform.machine()}", end="")
for package in ("torch", "backpack-for-pytorch"):
    print(f", {package} {version(package)}", end="")
print(f", {os.cpu_count()} cores, threads: {THREADS}, load {os.getloadavg()[0]:.1f}")

jacobian = names("scale/universal_jacobian")["batched_jacobian"]
check = names("trust/check_a_jacobian")["check_jacobian"]
memory = names("scale/jacobians_without_memory")
peak_bytes, in_chunks = memory["peak_bytes"], memory["ten_at_once"]
compute = names("compute/choosing_a_method")
loop = compute["autograd_loop"]


def unchecked(model, X, J):
    return jacobian(model, X, method=J.method)


def reuse(model, X, J):
    return jacobian(model, X, method=J.method, out=J)


def reuse_checked(model, X, J):
    return jacobian(model, X, out=J)


def write(J):
    for block in J.values():
        block.fill_(1)


def median(times, name):
    return statistics.median(times[name])


print("\nTime as a multiple of vmap(jacrev), and what half of the turns lie between")
slow = []
# Later, the heap has holes of some of these sizes, which cost less than new memory.
for title, make in (LARGE | FIELD).items():
    torch.manual_seed(0)
    model, X = make()
    J = jacobian(model, X)
    size = sum(block.nbytes for block in J.values())
    unit = "vmap(jacrev)" if works(vmap_jacrev, model, X) else "autograd loop"
    calls = {unit: (vmap_jacrev if "vmap" in unit else loop, model, X)}
    if title in LARGE:
        calls["SqrtGGNExact"] = compute["calls"](model, X)["SqrtGGNExact"]
    calls["checked"] = jacobian, model, X
    calls["method="] = unchecked, model, X, J
    calls["check_jacobian"] = check, model, X, J
    if title in LARGE:
        calls["out="] = reuse_checked, model, X, J
        calls["write"] = write, J
    calls["method=, out="] = reuse, model, X, J
    peaks = [peak_bytes(*calls[k]) / size for k in (unit, "checked", "method=, out=")]
    times = turns(calls)
    of_unit = {name: ratio(times, name, unit) for name in times}
    C = next(iter(J.values())).shape[1]
    print(f"{title}, N {len(X)}, C {C}, J {size / 1e6:.3g} MB, by {J.method}:")
    print(f"     {unit} {median(times, unit):.3g} ms; ", end="")
    print(", ".join(f"{name} {of_unit[name][1]}" for name in list(calls)[1:]))
    print(f"     peaks in J: {unit} {peaks[0]:.2f}, checked {peaks[1]:.2f}", end="")
    print(f", method=, out= {peaks[2]:.2f} more", flush=True)
    if unit == "autograd loop":
        continue
    checked, by_method = of_unit["checked"][0], of_unit["method="][0]
    if median(times, unit) < 15:
        bound(f"{title}, checked / vmap(jacrev)", checked, most=2)
    else:
        slow.append(checked)
        bound(f"{title}, method= / vmap(jacrev)", by_method, most=1.15)
        bound(f"{title}, checked / vmap(jacrev)", checked, most=1.5)
    if title in LARGE:
        others = "vmap(jacrev)", "SqrtGGNExact"
        for name in "out=", "method=, out=":
            value = 1 / ratio(times, name, others)[0]
            bound(f"{title}, fastest other method / {name}", value, least=2.5)
        print(f"     out= / writing J: {ratio(times, 'out=', 'write')[1]}")
        value, _ = ratio(times, "method=, out=", "write")
        bound(f"{title}, method=, out= / writing J", value, most=1.3)
bound("checked / vmap(jacrev), the median", statistics.median(slow), most=1.3)
del J, calls

print("\nCNNs: vmap(jacrev) with chunk_size=10")

for title in "CNN", "CNN, pooled", "CNN, 7 layers":
    model, X = FIELD[title]()
    calls = {"at once": (vmap_jacrev, model, X), "in chunks": (in_chunks, model, X)}
    value, text = ratio(turns(calls), "in chunks", "at once")
    bound(f"{title}, in chunks / at once, time {text}", value, most=1.1)
    peaks = {name: peak_bytes(*call) for name, call in calls.items()}
    value = peaks["in chunks"] / peaks["at once"]
    bound(f"{title}, in chunks / at once, peak", value, most=0.7)

print("\nNeural tangent kernel")
kernels = names("scale/neural_tangent_kernel")
cnn = kernels["small_cnn"](17, 10), torch.rand(128, 1, 8, 8)
for title, (model, X), least, most in (
    ("CNN 17-34, 8 x 8", cnn, 1.5, 1),
    ("MLP 784-256-256-10", LARGE["MLP 784-256-256-10"](), 100, 0.02),
):
    calls = {name: (kernels[name], model, X) for name in ("contracted", "ntk")}
    peaks = {name: peak_bytes(*call) for name, call in calls.items()}
    # A large J leaves no processor's cache as it was: the second call counts.
    times = turns({"contracted": calls["contracted"], "once": calls["ntk"]} | calls)
    print(f"{title}, N {len(X)}: ntk {median(times, 'ntk'):.3g} ms", end="")
    print(f", from J {median(times, 'contracted'):.4g} ms")
    value, _ = ratio(times, "contracted", "ntk")
    bound(f"{title}, kernel from J / ntk, time", value, least)
    value = peaks["ntk"] / peaks["contracted"]
    bound(f"{title}, ntk / kernel from J, peak", value, most=most)
model, X = FIELD["CNN, pooled"]()
peaks = {
    f: peak_bytes(kernels[f], model, X.repeat(4, 1, 1, 1))
    for f in ("contracted", "ntk")
}
value = peaks["ntk"] / peaks["contracted"]
bound("CNN, pooled, N 128: ntk / kernel from J, peak", value, most=0.5)
X = X.repeat(8, 1, 1, 1)
cost, begun = kernels["ntk_cost"](model, X[:32], len(X)), time.perf_counter()
kernels["ntk"](model, X)
value = cost["seconds"] / (time.perf_counter() - begun)
bound("CNN, pooled, N 256: ntk_cost / seconds", value, least=0.7)
bound("CNN, pooled, N 256: ntk_cost / seconds", value, most=1.5)
value = cost["bytes"] / peak_bytes(kernels["ntk"], model, X)
bound("CNN, pooled, N 256: ntk_cost / peak", value, least=1)

print("\nThe guide: the function that it names, and the fastest of all")
landing = " ".join((ROOT / "docs" / "index.rst").read_text().split())
guide = dict(row.split(" - ", 1) for row in landing.split(" * - ")[1:])
for title, (model, X) in compute["cases"].items():
    row, text, named = GUIDE[title]
    assert text in guide.get(row, ""), f"the guide does not say {text} for {row}"
    calls = compute["calls"](model, X)
    short = model(X).numel() <= compute["FEW"]
    J = jacobian(model, X)
    calls = {k: call for k, call in calls.items() if short or k != "autograd loop"}
    calls = {k: call for k, call in calls.items() if works(*call)}
    calls["batched_jacobian, out="] = (reuse, model, X, J)
    times = turns(calls, 0.6)
    ranked = sorted(times, key=lambda name: median(times, name))
    print(f"{title}:", ", ".join(f"{k} {median(times, k):.3g} ms" for k in ranked))
    value, _ = ratio(times, named, list(times))
    bound(f"{title}, {named} / fastest", value, most=1.2)

print("\nTime of vmap(jacrev) as a multiple of that of the loop over the outputs")
for widths in (16, 32, 32), (784, 256, 256):
    for N, C in (1, 1), (2, 2), (2, 5), (4, 5), (8, 5):
        model, X = mlp(*widths, C), torch.rand(N, widths[0])
        calls = {"vmap(jacrev)": (vmap_jacrev, model, X), "loop": (loop, model, X)}
        value, text = ratio(turns(calls, 0.3), "vmap(jacrev)", "loop")
        print(f"MLP {widths}, N * C = {N * C}: {text}")
        if N * C == 1:
            bound("vmap(jacrev) / loop, N * C = 1", value, least=1.5)
        if N * C == 20:
            bound("vmap(jacrev) / loop, N * C = 20", value, most=1)

print("\nSeveral processes")
with contextlib.redirect_stdout(io.StringIO()):
    ranks = names("scale/distributed_jacobians")
    shared, alone = max(ranks["peaks"]), ranks["alone"]
bound("peak on 2 ranks / on 1", shared / alone, most=0.6)
print(f"{time.perf_counter() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")
print(f"{len(failed)} of the bounds do not hold", *failed, sep="\n  ")
sys.exit(len(failed))
