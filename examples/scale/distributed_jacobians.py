"""
Jacobians on several processes
==============================

After this page you can compute the Jacobian of any model, and its kernel ``J J^T`` of
all pairs of samples, with several processes or machines. Each holds only its part of
the result. For linear layers, the kernel takes less memory.
"""

# %%
# PyTorch calls one process of such a run a rank. ``torchrun`` starts a file as any
# number of ranks. A notebook is no file, so on this page a program of the ranks is a
# text, and ``launch`` writes it to a temporary folder, starts it there, and returns
# what each rank saves.

# fold: Imports, and how the ranks are started
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
_ = torch.manual_seed(0)


def launch(program, ranks, *inputs, timeout=120):
    """Run a program on several ranks, and return what each of them saves.

    The program reads ``inputs`` from ``inputs.pt`` and saves to ``{rank}.pt``. Raises
    ``RuntimeError`` with all that was written if a rank fails, and
    ``subprocess.TimeoutExpired`` after ``timeout`` seconds. Then all ranks have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(program)
        torch.save(inputs, Path(folder, "inputs.pt"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr=localhost"]  # where the machine's name has no address
        command += [f"--nproc-per-node={ranks}", f"--log-dir={folder}", "program.py"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options["env"] = os.environ | {"PYTHON_COLORS": "0"}  # plain tracebacks
        with subprocess.Popen(command, cwd=folder, **options) as torchrun:
            try:
                written, _ = torchrun.communicate(timeout=timeout)
            finally:
                torchrun.terminate()  # and it ends its ranks
        if torchrun.returncode:
            raise RuntimeError(written)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(ranks)]


# %%
# Rows on two ranks
# -----------------
# The outputs ``fs = model(X)`` have shape ``[N, C]``. A rank takes its share ``N_r`` of
# the samples, and computes their rows of the Jacobian, ``[N_r, C, *p.shape]`` for each
# parameter ``p``. It needs no other rank for that.

ROWS = '''
import torch
from torch import distributed as dist
from torch.func import functional_call, jacrev, vmap


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()
model, X = torch.load("inputs.pt", weights_only=False)  # yours: the same on all ranks
X_own = X.tensor_split(ranks)[rank]
J = vmap_jacrev(model, X_own)
'''

# %%
# Kernel of any model
# -------------------
# The neural tangent kernel is ``K = J J^T`` over all parameters, ``[N, C, N, C]``. A
# rank computes the rows of its samples, ``[N_r, C, N, C]``. It goes through all samples
# in chunks, whose Jacobian it drops, so no rank waits for another one.

ROWS_OF_KERNEL = """
def flat(J):
    return torch.cat([block.flatten(2) for block in J.values()], 2)  # [N, C, P]


own, chunks = flat(J), (flat(vmap_jacrev(model, x)) for x in X.split(16))
K = torch.cat([torch.einsum("ncp,mdp->ncmd", own, rows) for rows in chunks], 2)
torch.save((J, K), f"{rank}.pt")
dist.destroy_process_group()
"""

N, C, X = 101, 6, torch.rand(101, 64)
model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, C))
parts, kernels = zip(*launch(ROWS + ROWS_OF_KERNEL, 2, model, X))
for J, K in zip(parts, kernels):
    print(f"A rank has J['0.weight'] {list(J['0.weight'].shape)}, K {list(K.shape)}")

# %%
# With ``ntk.py`` of ``scale/neural_tangent_kernel.py`` beside the program, ``K =
# ntk(model, X_own, X)`` does the same in one line, from factors where layers have them.
#
# The reference is one backward pass for each output of each sample, in this process.
# What the ranks have, one below the other, is the same.

# fold: The Jacobian from a loop


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


whole = autograd_loop(model, X)
rows = torch.cat([block.flatten(2) for block in whole.values()], 2)  # [N, C, P]
reference = torch.einsum("ncp,mdp->ncmd", rows, rows)
assert_close({name: torch.cat([J[name] for J in parts]) for name in whole}, whole)
assert_close(torch.cat(kernels), reference)
print(f"Rows and kernel are those of the loop, N = {N} samples in all.")

# %%
# The ranks have a copy of the plain model each. In ``DistributedDataParallel`` the
# model is ``ddp.module``; what it adds, the mean of gradients over ranks, has no use
# here. Nobody gathers the rows: what you compute with them is a sum over the ranks, as
# below, or a result that is split like them, as the kernel is.
#
# Linear layers alone: factors that travel
# ----------------------------------------
# Above, a rank holds its rows of ``J``, and computes those of all others again. If all
# layers with parameters are ``Linear`` and called once, it needs neither. A layer with
# inputs ``a [N, I]`` and outputs ``[N, O]`` has the rows
# ``J[n, c, o, i] = delta[n, c, o] * a[n, i]``, where ``delta [N, C, O]`` is the
# derivative of ``fs`` by the layer's output. A bias has the rows ``delta``, as if it
# were the weight of an input that is always 1. The factors ``a``, with this last
# column, and ``delta`` are short, so they travel.

FACTORS = '''
from datetime import timedelta

import torch
from torch import autograd, nn
from torch import distributed as dist


def linear_factors(model, X):
    """Return ``[(a [N, I + 1], delta [N, C, O]), ...]``, a pair for each layer."""
    calls = []

    def record(layer, args, output):
        a = torch.cat([args[0], torch.ones_like(args[0][:, :1])], 1).detach()
        calls.append((a, autograd.graph.get_gradient_edge(output)))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    trained = [layer for layer in layers if layer.weight.requires_grad]
    hooks = [layer.register_forward_hook(record) for layer in trained]
    fs = model(X)
    for hook in hooks:
        hook.remove()
    edges = [edge for _, edge in calls]
    E = torch.eye(fs.shape[1]).to(fs)[:, None].expand(-1, *fs.shape)  # [C, N, C]
    deltas = autograd.grad(fs, edges, E, retain_graph=True, is_grads_batched=True)
    return [(a, delta.transpose(0, 1)) for (a, _), delta in zip(calls, deltas)]
'''

# %%
# In the kernel, a layer's share is ``(delta_nc . delta_md) * (a_n . a_m)``. The ranks
# take turns: one sends its factors, and all compute the columns of its samples. So a
# rank holds the factors of two ranks, whatever their number.

KERNEL = '''
def from_owner(owner, rank, sizes, tensor):
    """Return the tensor of the rank ``owner``, of which all have one such."""
    held = tensor.contiguous()
    if owner != rank:
        held = tensor.new_empty(sizes[owner], *tensor.shape[1:])
    if len(sizes) > 1:
        dist.broadcast(held, owner)
    return held


def kernel_rows(factors, rank, sizes):
    """Return the kernel of the samples of ``rank`` with all, ``[N_r, C, N, C]``.

    ``factors`` are those of this rank, ``sizes`` the number of samples of each rank.
    """
    a, delta = factors[0]
    C = delta.shape[1]
    K = delta.new_zeros(len(a), C, sum(sizes), C)
    for owner, columns in enumerate(K.split(sizes, 2)):
        for a, delta in factors:
            other_a = from_owner(owner, rank, sizes, a)
            other_delta = from_owner(owner, rank, sizes, delta)
            products = torch.einsum("nco,mdo->ncmd", delta, other_delta)
            columns.addcmul_(products, (a @ other_a.T)[:, None, :, None])
    return K
'''

# %%
# Sums over ranks
# ---------------
# No process has all of ``K`` or ``J``, but a product that ends in ``P`` numbers or in
# one is a sum over the ranks: ``all_reduce`` puts the sum on each of them. That gives a
# check. For random ``u [N, C]``, the product ``u^T K u`` is the square of the norm of
# ``J^T u``, which is a plain gradient. It fails where the factors are not the whole
# Jacobian: parameters of other layers, a layer that is called twice, samples that mix.
# Then take the kernel of any model, above.

CHECK = '''
def check_kernel(K, model, X, rank, sizes):
    """Raise ``ValueError`` unless ``u^T K u`` is ``|J^T u|^2`` for a random ``u``."""
    torch.manual_seed(0)  # the same u on all ranks
    u = torch.randn(sum(sizes), K.shape[1]).to(K)
    u_own = u.split(sizes)[rank]
    params = [p for p in model.parameters() if p.requires_grad]
    grads = autograd.grad(model(X), params, u_own, materialize_grads=True)
    gradient = torch.cat([grad.flatten() for grad in grads])
    product = torch.einsum("nc,ncmd,md->", u_own, K, u)
    dist.all_reduce(gradient)
    dist.all_reduce(product)
    square = gradient @ gradient
    if not (product - square).abs() <= torch.finfo(K.dtype).eps ** 0.5 * square:
        found = f"u^T K u is {product:.4g}, but |J^T u|^2 is {square:.4g}"
        raise ValueError(f"{found}: are all layers Linear, and called once?")


dist.init_process_group(timeout=timedelta(minutes=1))
rank, ranks = dist.get_rank(), dist.get_world_size()
model, X = torch.load("inputs.pt", weights_only=False)
X_own = X.tensor_split(ranks)[rank]
sizes = [len(part) for part in X.tensor_split(ranks)]
K = kernel_rows(linear_factors(model, X_own), rank, sizes)
check_kernel(K, model, X_own, rank, sizes)
'''

# %%
# Memory of a rank
# ----------------
# The kernel is what needs memory, and with more ranks each has fewer rows of it. We
# measure the peak of a rank while it computes factors and kernel, and the peak of one
# rank that does the same for all samples.

# fold: How the peak is measured
MEASURE = '''
import gc
from itertools import accumulate

from torch.autograd.profiler import profile


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


def work(X, sizes):
    return kernel_rows(linear_factors(model, X), rank, sizes)


peak = peak_bytes(work, X_own, sizes)
alone = peak_bytes(work, X, [len(X)]) if rank == 0 else None
torch.save((K, peak, alone), f"{rank}.pt")
dist.destroy_process_group()
'''

# %%
# The program of the ranks is the four texts, one below the other. Its result is the
# kernel ``J J^T`` of the loop.

results = launch(FACTORS + KERNEL + CHECK + MEASURE, 2, model, X)
kernels, peaks, (alone, _) = zip(*results)
assert_close(torch.cat(kernels), reference)
print(f"Rows of the kernel: {[list(K.shape) for K in kernels]}, as from the loop.")
megabytes = [number / 1e6 for number in (rows.nbytes, alone, max(peaks))]
print("J {:.0f} MB, peak on 1 rank {:.0f} MB, on 2 ranks {:.0f} MB".format(*megabytes))
assert max(peaks) < alone

# %%

# fold: How the figure is drawn
plt.rcParams["font.size"] = 12
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
names = "all of J", "kernel,\n1 rank", "kernel,\n2 ranks"
bars = ax.barh(names, megabytes, color=["0.6", "#D55E00", "#0072B2"])
ax.bar_label(bars, fmt="%.0f MB", padding=3)
ax.invert_yaxis()
ax.set(xlabel="MB in one process", xlim=(0, 1.25 * max(megabytes)))
_, one, two = megabytes
ax.set_title(f"Kernel: {one:.0f} MB on one rank,\n{two:.0f} MB each on two")
plt.show()

# %%
# Your own program
# ----------------
# Save the texts of a program as one file, with the lines that make your model and your
# samples in the place of ``torch.load``. They have to be the same on all ranks, and
# nothing checks that: load them, or call ``torch.manual_seed``. On one machine, start
# the file with::
#
#     torchrun --standalone --nproc-per-node=2 program.py
#
# On several machines, start it on each::
#
#     torchrun --nnodes=2 --nproc-per-node=8 \
#         --rdzv-backend=c10d \
#         --rdzv-endpoint=HOST:29400 program.py
#
# All machines have to reach ``HOST``, one of them, and the files. With GPUs, a rank
# takes the one whose number is in the variable ``LOCAL_RANK``:
# ``torch.cuda.set_device``, and ``.cuda()`` on its model and its samples.
#
# If a rank fails, ``torchrun`` ends the others. If a rank hangs, the others wait for it
# in the next ``broadcast`` or ``all_reduce``, until the ``timeout`` of
# ``init_process_group`` ends the run with an error. Set it above the longest step of
# your ranks.
#
# What to take home
# -----------------
# - The rows of a rank need no other rank: split the samples, and gather nothing.
# - The kernel needs all pairs of samples. A rank computes the rows of others again, or
#   lets factors travel.
# - A product of ``P`` numbers is a sum over ranks, and checks what no rank could hold.
#
# Next: ``use/training_predicted.py`` uses the kernel. The alternative:
# ``scale/jacobians_without_memory.py`` uses the rows of one process without storing
# them.
