"""Print every ratio of speed and memory that the site claims, and hold it to a bound.

Each ratio compares two measurements of this run, on one thread, so a slow machine does
not change it much, though a busy one may: run it on an idle one.
"""

import contextlib
import io
import os
import platform
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"

import torch
from torch.utils.benchmark import Timer

SCALE = Path(__file__).parents[1] / "examples" / "scale"
failed = []


def page(name):
    """Run a tutorial, which checks its numbers, and return its names."""
    print(f"running {name}.py ...", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(str(SCALE / f"{name}.py"))


def milliseconds(calls, rounds=4):
    """Return the smallest median of each call: other programs only add time."""
    timers = {
        k: Timer("f(*args)", globals={"f": f, "args": args}, num_threads=1)
        for k, (f, *args) in calls.items()
    }
    medians = {name: [] for name in calls}
    for _ in range(rounds):  # in turn, so that all meet the same conditions
        for name, timer in timers.items():
            measured = timer.blocked_autorange(min_run_time=0.3)
            medians[name].append(1e3 * measured.median)
    return medians


def bound(claim, ratio, least=None, most=None):
    good = ratio >= least if most is None else ratio <= most
    limit = f"at least {least:g}" if most is None else f"at most {most:g}"
    print(f"{'ok  ' if good else 'FAIL'} {claim}: {ratio:.3g} ({limit})", flush=True)
    if not good:
        failed.append(claim)


print(f"Python {platform.python_version()}, {platform.machine()}", end="")
for package in ("torch", "backpack-for-pytorch"):
    print(f", {package} {version(package)}", end="")
print(f", {os.cpu_count()} cores, 1 thread")

universal = page("universal_jacobian")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)
for work, (model, X) in universal["WORK"].items():
    J = universal["batched_jacobian"](model, X)
    size = sum(block.nbytes for block in J.values()) / 1e6
    methods = {k: (method, model, X) for k, method in universal["METHODS"].items()}
    methods |= {"batched_jacobian, out=": (universal["reuse"], model, X, J)}
    methods |= {"write, new memory": (universal["write_new"], J)}
    methods |= {"write, same memory": (universal["write_same"], J)}
    medians = milliseconds(methods)
    times = {name: min(values) for name, values in medians.items()}
    print(f"{work}, J {size:.3g} MB; smallest and largest median in ms:")
    for name, values in medians.items():
        print(f"     {name}: {times[name]:.3g}, {max(values):.3g}", flush=True)
    new, reused = times["batched_jacobian"], times["batched_jacobian, out="]
    other = min(times["vmap(jacrev)"], times["SqrtGGNExact"])
    if size < 1:  # fixed costs decide, the check among them
        print(
            f"     vmap(jacrev) / batched_jacobian: {times['vmap(jacrev)'] / new:.3g}"
        )
        continue
    bound("fastest other method / batched_jacobian", other / new, least=1)
    least = 1.4 if "CNN" in work else 2.5
    bound("fastest other method / out=", other / reused, least=least)
    if "MLP" in work:
        ratio = reused / times["write, same memory"]
        bound("batched_jacobian, out= / writing J", ratio, most=1.3)
for quantity, slope in universal["slopes"].items():
    bound(f"exponent of N in the {quantity}", slope, most=1.1)
del J, universal

memory = page("jacobians_without_memory")
torch.set_num_threads(1)
call = memory["large"], memory["X_large"]
calls = {name: (memory[name], *call) for name in ("dense_ntk", "ntk")}
dense, fast = map(min, milliseconds(calls, rounds=2).values())
print(f"NTK, MLP 784-256-256-10, N = 64: {fast:.3g} ms, dense {dense:.4g} ms")
bound("dense NTK / NTK from factors, time", dense / fast, least=100)
ratio = memory["peaks"]["NTK from factors"] / memory["peaks"]["NTK from J"]
bound("NTK from factors / dense NTK, peak", ratio, most=0.02)

ranks = page("distributed_jacobians")
bound("peak on 2 ranks / on 1", ranks["worst"]["peak"] / ranks["alone"], most=0.6)
sys.exit(f"{len(failed)} of the bounds do not hold" if failed else 0)
