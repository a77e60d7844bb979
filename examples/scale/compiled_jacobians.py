"""
Compiled Jacobians
==================

After this page you can compile the Jacobian of your model with ``torch.compile``. You
know what it gains at which sizes, after how many calls it has paid, and what breaks.
"""

# fold: Imports
import copy
import logging
import os
import shutil
import tempfile
import warnings
from itertools import pairwise, product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

# %%
# The recipe, compiled
# --------------------
# ``torch.compile(vmap(jacrev(f), (None, 0)))`` goes around the whole recipe, here the
# function ``jacobian(params, X)``. The Jacobian ``J`` has shape ``[N, C, *p.shape]``
# for each parameter ``p``, as before, and the same numbers, also for new parameters.
# The first call compiles, into files in ``TORCHINDUCTOR_CACHE_DIR``, also for later
# processes. ``mark_dynamic``, on the first ``X``, lets any number of samples above one
# use the result. With convolutions it raises (``Constraints violated``, PyTorch 2.13):
# leave it away, and pass ``dynamic=False``.

# fold: The recipe, the reference, and where the compiler is and writes
logging.getLogger("torch._dynamo.convert_frame").setLevel("ERROR")  # a limit is below

threads = torch.get_num_threads()
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that stay behind
# Both are done once per machine, in the first call of all, and would take longer.
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
# On a CPU, the default backend "inductor" takes a C++ compiler.
has_compiler = any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++", "cl"]))
backend = "inductor" if has_compiler else "aot_eager"
# While it compiles, PyTorch calls functions of its own that are deprecated.
for name in "torch.jit.script", "torch._prims_common.check":
    warnings.filterwarnings("ignore", f".*{name}.* is deprecated")


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def recipe(model):
    """Return the Jacobian of all samples as a function, and the parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0)), params


# %%

model, X = mlp(10, 32, 5), torch.rand(8, 10)
jacobian, params = recipe(model)
torch._dynamo.mark_dynamic(X, 0)
seconds = []
for _ in range(2):
    torch.compiler.reset()  # forgets what is in memory
    start = timer()
    compiled = torch.compile(jacobian, backend=backend)
    J = compiled(params, X)
    seconds.append(timer() - start)
    assert_close(J, autograd_loop(model, X))
first, again = seconds
print(f"{backend}: the first call takes {first:.1f} s, and J is that of a loop.")
print(f"Forgotten, but still on disk, as in a later process: {again:.1f} s.")

# %%
# What it gains
# -------------
# A Jacobian of a small model takes many small operations, and each has a fixed cost,
# which the compiler saves. A large ``J`` takes its time for writing ``J``, compiled or
# not: find yours by the size of ``J``. The last number says after how many calls the
# first one has paid, in float64 on one thread.

# fold: How the time is measured, and errors in one line


def median_ms(function, *args):
    timer = Timer("function(*args)", globals={"function": function, "args": args})
    return timer.blocked_autorange(min_run_time=0.1).median * 1e3


def message(function, *args):
    """Return the error that a call raises, without what follows its first sentence."""
    try:
        with warnings.catch_warnings(action="ignore"):
            function(*args)
    except Exception as error:
        first = str(error).partition("\n\n")[0].partition(". ")[0]
        return f"{type(error).__name__}: {first}"
    raise AssertionError("it raises no error any more")


# %%

times = {}
for N in 2, 16, 128, 1024:
    X = torch.rand(N, 10)
    J = compiled(params, X)
    assert_close(J, jacobian(params, X))
    eager, fast = median_ms(jacobian, params, X), median_ms(compiled, params, X)
    times[N] = eager, fast
    paid = f"{1e3 * first / (eager - fast):.0f}" if eager > fast else "no number of"
    megabytes = sum(block.nbytes for block in J.values()) / 1e6
    print(f"N = {N}, J {megabytes:.2g} MB: {eager:.2f} ms, compiled {fast:.2f} ms,")
    print(f"  ratio {eager / fast:.1f}, paid after {paid} calls")

# %%
# The larger ``N``, the less the fixed cost counts.

# fold: How the figure is drawn

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
ax.loglog(
    list(times), [eager for eager, _ in times.values()], "o-", lw=3, label="eager"
)
ax.loglog(
    list(times), [fast for _, fast in times.values()], "s--", lw=3, label="compiled"
)
ax.set(xlabel="N samples", ylabel="time [ms]")
ax.set_xticks(list(times), list(times))
ax.yaxis.set_major_formatter("{x:g}")
ax.minorticks_off()
ratios = [eager / fast for eager, fast in times.values()]
ax.set_title(
    f"Small MLP: eager / compiled\nfrom {min(ratios):.1f} to {max(ratios):.1f} times"
)
ax.legend()
plt.show()

# %%
# New sizes
# ---------
# Without a mark, the second ``N`` compiles again, and then for all ``N``. Convolutions
# compile for each ``N``, and after ``recompile_limit`` of them PyTorch runs what is new
# uncompiled, with a line in its log only: fill up ``X`` to a few sizes, or raise
# ``torch._dynamo.config.recompile_limit``. To notice either, forbid it.
# ``backend="aot_eager"`` only records the operations, without a C++ compiler. It gains
# what ``vmap`` and ``jacrev`` do in Python.

cnn = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
images = torch.rand(7, 1, 8, 8)
torch.compiler.reset()  # the next section says why
of_cnn, cnn_params = recipe(cnn)
traced = torch.compile(of_cnn, backend="aot_eager")
assert_close(traced(cnn_params, images), autograd_loop(cnn, images))
eager, fast = (median_ms(g, cnn_params, images) for g in (of_cnn, traced))
print(f"CNN: eager {eager:.2f} ms, traced {fast:.2f} ms, ratio {eager / fast:.1f}")
with torch.compiler.set_stance("fail_on_recompile"):
    print(message(traced, cnn_params, images[:5]))
print("recompile_limit:", torch._dynamo.config.recompile_limit)
limit = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
fixed = torch.compile(of_cnn, backend="aot_eager", dynamic=False)
with torch._dynamo.config.patch(limit):
    print(message(fixed, cnn_params, images[:5]))

# %%
# Two models
# ----------
# The code that is compiled is that of ``vmap``, and all models share it. A second model
# counts as the first with other sizes, and these become dynamic. For convolutions that
# raises in PyTorch 2.13, as does ``dynamic=True``, and is right in 2.14.1.
# ``dynamic=False`` compiles each on its own, and ``torch.compiler.reset`` forgets all.

torch.compiler.reset()
for width in 2, 5:
    conv = nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten())
    of_conv, values = recipe(conv)
    try:
        J = torch.compile(of_conv, backend="aot_eager")(values, images)
        assert_close(J, autograd_loop(conv, images))
        print(f"Model of width {width}: right")
    except RuntimeError as error:
        reason = str(error).partition("RuntimeError('")[2].partition("\\n")[0]
        print(f"Model of width {width}: {type(error).__name__}: {reason}")
J = torch.compile(of_conv, backend="aot_eager", dynamic=False)(values, images)
assert_close(J, autograd_loop(conv, images))
print("dynamic=False: right")

# %%
# What does not compile
# ---------------------
# What ``vmap`` cannot do, it cannot do compiled: an ``if`` on values raises as before.
# A hook that stores activations works eagerly, and raises in a compiled Jacobian:
# remove it first.


class Branch(nn.Linear):
    def forward(self, X):
        return super().forward(X) if X.sum() > 1 else X[:, :3]


stored = []
branch, watched = Branch(10, 3), copy.deepcopy(model)
handle = watched[0].register_forward_hook(lambda *args: stored.append(args[-1]))
assert_close(recipe(watched)[0](params, X[:8]), jacobian(params, X[:8]))
for net in branch, watched:
    torch.compiler.reset()
    function, values = recipe(net)
    print(message(torch.compile(function, backend="aot_eager"), values, X[:8]))
handle.remove()

# %%
# A model that is compiled already
# --------------------------------
# The recipe takes it, but runs the model's own Python: nothing in it is compiled. So
# compile the Jacobian instead. The names start with ``_orig_mod.``. ``model.compile()``
# leaves the names alone.

graphs = []
wrapped = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
function, values = recipe(wrapped)
J = function(values, X[:8])
assert not graphs
print("names:", *J)
J = {name.removeprefix("_orig_mod."): block for name, block in J.items()}
assert_close(J, jacobian(params, X[:8]))
in_place = copy.deepcopy(model)
in_place.compile(backend="aot_eager")
function, values = recipe(in_place)
assert_close(function(values, X[:8]), jacobian(params, X[:8]))
print("names:", *values)
torch.compiler.reset()
folder.cleanup()  # nothing of the compiler is left
del os.environ["TORCHINDUCTOR_CACHE_DIR"]
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Compile a small Jacobian that you take tens of thousands of times, with the same
#   sizes or a mark. Otherwise the first call costs more than it gains: join batches
#   that have the same parameters, and split the result.
# - Compile the Jacobian, not the model in it.
# - For several models, and for convolutions, pass ``dynamic=False``, without a mark.
#
# Next: ``scale/checkpoints_and_growing_memory.py`` is on memory instead of time. The
# alternative: ``scale/layer_structure.py`` is faster where ``J`` is large.

# sphinx_gallery_parallel = False
