"""
Checkpoints and growing memory
==============================

After this page you can take the Jacobian of a model with activation checkpoints, and
find out why a loop over Jacobians needs more memory with every iteration.
"""

# fold: Imports
import copy
import gc
import os
import warnings
from itertools import accumulate, pairwise, product
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import autograd, nn
from torch.autograd.profiler import profile
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

threads = torch.get_num_threads()
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)

# %%
# Checkpoints
# -----------
# A checkpoint stores the input of a part of the model, and computes the part again in
# each backward pass. With ``use_reentrant=False``, everything works that goes through
# ``autograd.grad``, BackPACK included. ``torch.func`` raises.

# fold: The methods


class Recomputed(nn.Sequential):
    reentrant = False

    def forward(self, X):
        return checkpoint(super().forward, X, use_reentrant=self.reentrant)


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


def message(function, *args):
    """Return the error that a call raises, without what follows its first sentence."""
    try:
        with warnings.catch_warnings(action="ignore"):
            function(*args)
    except Exception as error:
        first = str(error).partition("\n\n")[0].partition(". ")[0]
        return f"{type(error).__name__}: {first}"
    raise AssertionError("it raises no error any more")


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


# %%

model = nn.Sequential(Recomputed(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4))
X = torch.rand(5, 6)
plain = nn.Sequential(nn.Sequential(*model[0]), model[1])  # the same parameters
expected = autograd_loop(plain, X)
runs = []
model[0][0].register_forward_hook(lambda *args: runs.append(args))
for method in autograd_loop, grads_batched:
    runs.clear()
    assert_close(method(model, X), expected)
    print(f"{method.__name__}: right, runs the part {len(runs)} times")
runs.clear()
assert_close(batch_grad(extend(copy.deepcopy(model)), X), expected)
print(f"batch_grad: right, runs the part {len(runs)} times")
print("vmap_jacrev:", message(vmap_jacrev, model, X))

# %%
# For ``torch.func``, leave the checkpoint out: it changes no value. Many libraries have
# a switch for it. If yours has none, replace the name where ``forward`` finds it.


def called(function, *args, use_reentrant=None):
    return function(*args)


with patch.dict(Recomputed.forward.__globals__, checkpoint=called):
    assert_close(vmap_jacrev(model, X), expected)
print("vmap_jacrev without the checkpoint: right")

# %%
# The price
# ---------
# The loop runs the part again for each of ``N * C`` rows, with all ``N`` samples. Taken
# sample by sample, the Jacobian needs the activations of one sample at a time, and no
# checkpoint. We measure the peak of the memory, and the time.

# fold: How the peak is measured

os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr
warnings.filterwarnings("ignore", ".*torch.jit.script.*")  # from within the profiler


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


def median_ms(function, *args):
    timer = Timer("function(*args)", globals={"function": function, "args": args})
    return timer.blocked_autorange(min_run_time=0.1).median * 1e3


def sample_by_sample(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one sample at a time."""
    parts = [grads_batched(model, x[None]) for x in X]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# %%

layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(9)]
head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
plain = nn.Sequential(*layers, *head)
thirds = [Recomputed(*layers[i : i + 3]) for i in (0, 3, 6)]
recomputed, X = nn.Sequential(*thirds, *head), torch.rand(8, 4, 16, 16)
expected = list(autograd_loop(plain, X).values())
calls = (autograd_loop, plain), (autograd_loop, recomputed), (sample_by_sample, plain)
for method, net in calls:
    assert_close(list(method(net, X).values()), expected)
    peak, time = peak_bytes(method, net, X) / 1e6, median_ms(method, net, X)
    name = f"{method.__name__}, checkpoints: {net is recomputed}"
    print(f"{name:36} peak {peak:5.1f} MB, {time:5.0f} ms")

# %%
# Checkpoints that give zeros
# ---------------------------
# With ``use_reentrant=True``, the part runs without a graph, and only ``backward()``
# knows how to make up for it. ``autograd.grad`` finds no path to the parameters: with
# zeros for what is unused, as in the loop, the Jacobian is zero. PyTorch warns if ``X``
# needs no gradient. If it does, nothing is said.

model = nn.Sequential(Recomputed(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4))
model[0].reentrant = True
X = torch.rand(5, 6)
with warnings.catch_warnings(record=True, action="always") as caught:
    assert not autograd_loop(model, X)["0.0.weight"].any()
print("UserWarning:", *(str(warning.message) for warning in caught))
X.requires_grad_()
with warnings.catch_warnings(action="error"):
    assert not autograd_loop(model, X)["0.0.weight"].any()
print("X requires a gradient: zeros again, and no warning")

# %%
# The other ways raise. Of two errors, the first comes if ``X`` is not among the inputs.

print(message(grads_batched, model, X))
print(message(autograd.grad, model(X).sum(), [X, *model.parameters()]))
print(message(vmap_jacrev, model, X))

# %%
# To notice the zeros, compare with ``backward()``, whose gradient has to be the sum of
# all rows. ``scale/universal_jacobian.py`` raises for such a model. To mend it, set
# ``use_reentrant=False``.

J = autograd_loop(model, X)
model(X).sum().backward()
gradient = model[0][0].weight.grad
assert gradient.any() and not J["0.0.weight"].any()
model[0].reentrant = False
assert_close(autograd_loop(model, X)["0.0.weight"].sum((0, 1)), gradient)
print("use_reentrant=False: the rows add up to what backward() gives")

# %%
# Memory that grows
# -----------------
# A tensor keeps the graph that made it, and the graph keeps activations. So one number
# from each iteration can keep a whole Jacobian. ``kept_bytes`` runs a step some times,
# and returns the bytes that are still there after each: run it on a step of yours.

# fold: How kept memory is measured

causes = {}
gc.collect()
gc.freeze()  # collections look at new objects only


def kept_bytes(step, iterations=6):
    """Return the bytes that calls of ``step`` leave behind, after each of them.

    ``profile`` is that of ``torch.autograd.profiler``.
    """
    changes = []
    for _ in range(iterations):
        before = torch.cuda.memory_allocated()  # 0 on a CPU
        with profile(profile_memory=True) as recorded:
            step()
            gc.collect()
        events = recorded.kineto_results.events()
        change = sum(e.nbytes() for e in events if e.name() == "[memory]")
        changes.append(torch.cuda.memory_allocated() - before or change)
    return list(accumulate(changes))


def mend(cause, grows, mended):
    """Record what an iteration keeps, in kB, of a step that grows; print it, mended."""
    both = kept_bytes(grows), kept_bytes(mended)
    grown, flat = ((kept[-1] - kept[1]) / 4e3 for kept in both)
    causes[cause] = grown
    print(f"{cause}: {grown:.0f} kB per iteration, mended {flat:.0f}")
    assert grown > 10 and flat < 1


# %%


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


model, X = mlp(50, 70, 3), torch.rand(20, 50, requires_grad=True)
inputs, kept = [X, *model.parameters()], []


def row_with_graph():
    row = autograd.grad(model(X)[4, 1], inputs, create_graph=True)
    kept.append(row[1].norm())


def norm_of_row():
    row = autograd.grad(model(X)[4, 1], inputs, create_graph=True)
    kept.append(row[1].norm().item())  # or .detach(), for a tensor


mend("a row with create_graph", row_with_graph, norm_of_row)

# %%
# In ``torch.func``, parameters that are not detached do the same: the Jacobian then
# has a graph of its own. So does one of which some parameters are left out:
# ``functional_call`` takes these from the module, with their graph.


def of_sample(params, x):
    return functional_call(model, params, x[None])[0]


def jacobian_with_graph():
    J = vmap(jacrev(of_sample), (None, 0))(dict(model.named_parameters()), X)
    kept.append(J["0.weight"].norm())


def jacobian_alone():
    kept.append(vmap_jacrev(model, X.detach())["0.weight"].norm())


mend("parameters not detached", jacobian_with_graph, jacobian_alone)

# %%
# No graph, but a view: a slice of a Jacobian keeps all of its block. ``clone`` copies
# the slice.


def slice_of_block():
    kept.append(vmap_jacrev(model, X.detach())["0.weight"][3, 1, 4])


def clone_of_slice():
    kept.append(vmap_jacrev(model, X.detach())["0.weight"][3, 1, 4].clone())


mend("a slice", slice_of_block, clone_of_slice)

# %%
# The last backward pass frees the graph, if it does not retain it. With the outputs in
# a list, a retained graph stays. Without them it goes, retained or not.


def rows_of_sums(last):
    fs = model(X)
    for c in range(3):
        autograd.grad(fs[:, c].sum(), inputs, retain_graph=last or c < 2)
    kept.append(fs)


mend("graph retained", lambda: rows_of_sums(True), lambda: rows_of_sums(False))
assert not any(kept_bytes(lambda: [rows_of_sums(True), kept.pop()]))

# %%
# ``p.grad_batch`` is overwritten in each pass, and grows only in your lists. ``extend``
# does not add hooks to a model that it has extended before.

extended = extend(copy.deepcopy(model))
weight, inputs_too = extended[0].weight, [X, *extended.parameters()]
hooks = [len(module._forward_hooks) for module in extended]


def blocks_in_a_list():
    with backpack(BatchGrad()):
        autograd.grad(extend(extended)(X)[:, 1].sum(), inputs_too)
    kept.append(weight.grad_batch)


def norms_in_a_list():
    blocks_in_a_list()
    kept[-1] = weight.grad_batch.norm().item()
    del weight.grad_batch


mend("grad_batch in a list", blocks_in_a_list, norms_in_a_list)
assert hooks == [len(module._forward_hooks) for module in extended]
print("hooks of each module, after all these calls of extend:", hooks)

# %%
# ``backward(create_graph=True)`` makes a cycle of a parameter and its gradient, which
# the garbage collector does not see. A model that is made anew in each iteration
# never goes. ``autograd.grad`` makes no cycle.


def cycle():
    with warnings.catch_warnings(action="ignore"):  # of what we show
        mlp(50, 70, 3)(X).sum().backward(create_graph=True)


def no_cycle():
    net = mlp(50, 70, 3)
    autograd.grad(net(X).sum(), list(net.parameters()), create_graph=True)


mend("backward(create_graph)", cycle, no_cycle)

# %%
# BackPACK's ``p.grad_batch`` with ``create_graph=True`` is such a cycle, too, whoever
# starts the pass. Delete it when you are done.


def blocks_with_graph():
    net = extend(mlp(50, 70, 3))
    with backpack(BatchGrad()):
        autograd.grad(net(X).sum(), [X, *net.parameters()], create_graph=True)
    return net


def blocks_deleted():
    for p in blocks_with_graph().parameters():
        del p.grad_batch


mend("grad_batch with a graph", blocks_with_graph, blocks_deleted)

# %%
# All causes in one picture
# -------------------------
# Each bar is one cause: what an iteration keeps.

# fold: How the figure is drawn

fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
bars = ax.barh(list(causes), list(causes.values()))
ax.bar_label(bars, fmt="%.0f kB", padding=3)
ax.invert_yaxis()
ax.set(xscale="log", xlim=(1, 3e4), xlabel="kept memory [kB per iteration]")
ax.xaxis.set_major_formatter("{x:g}")
ax.set_title("Seven loops that keep memory.\nMended, they keep less than 1 kB")
plt.show()
gc.unfreeze()
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - ``use_reentrant=False`` is right wherever it does not raise. For ``torch.func``, and
#   for less memory, leave the checkpoint out and go sample by sample.
# - Keep numbers and detached clones: a graph keeps all in it, a slice all of its block.
#
# Next: ``scale/distributed_jacobians.py`` takes several processes. The alternative:
# ``scale/jacobians_without_memory.py`` plans the memory, and does without ``J``.

# sphinx_gallery_parallel = False
