"""
Jacobians on several processes
==============================

After this page you can compute the Jacobian, and the kernel of all pairs of samples,
with more than one process or machine. Each process holds only its part of the samples,
and of the result. You see what travels between them, how much memory a process needs,
and how to work out what a run on many machines would cost.
"""

import inspect
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from itertools import accumulate, product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.utils.benchmark
from torch import distributed as dist
from torch import nn

# %%
# Ranks and sizes
# ---------------
# PyTorch calls a process of such a run a rank. The outputs ``fs = model(X)`` have shape
# ``[N, C]``, and ``N`` is not divisible by the number of ranks. The small problem is
# for checks, the large one for measurements. Every rank builds the same model from the
# same seed: yours would load a checkpoint.

RANKS = 2
SMALL = 7, (6, 5, 4, 3)  # N, and the widths of the layers
LARGE = 151, (64, 128, 96, 10)
TARGET = 20_000, (1, 8, 64, 1024)  # N, and the ranks of the run that we work out
NETWORKS = {"10 Gbit/s": 1.25e9, "400 Gbit/s": 50e9}  # bytes/s of a rank, assumed
LATENCY = 5e-5  # seconds for each message, assumed

torch.set_default_dtype(torch.float64)
os.environ["KINETO_LOG_LEVEL"] = "6"  # keep the profiler from writing to stderr


def problem(N, widths):
    """Return linear layers with ReLU between them, and the inputs of N samples."""
    torch.manual_seed(0)
    layers = []
    for start, end in zip(widths, widths[1:]):
        layers += [nn.Linear(start, end), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.rand(N, widths[0])


def loop(model, X):
    """Return all rows of J, ``[N, C, P]``, with one backward pass for each output."""
    fs, params = model(X), list(model.parameters())
    rows = []
    for n, c in product(range(fs.shape[0]), range(fs.shape[1])):
        grads = torch.autograd.grad(fs[n, c], params, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).unflatten(0, fs.shape)


def say(text):
    """Print on rank 0, and in a process that is not a rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


# %%
# Factors of the Jacobian
# -----------------------
# The Jacobian of a ``Linear`` layer is an outer product for each sample and output:
# ``J[n, c, o, i] = delta[n, c, o] * a[n, i]``. Here ``a`` is the input of the layer,
# with a column of ones for the bias, and ``delta`` is the derivative of ``fs[n, c]`` by
# the output of the layer (in ``scale/universal_jacobian.py``, ``c`` comes first). A
# hook records both. One call computes ``delta`` for all layers: row ``c`` of ``E`` asks
# for output ``c`` of every sample at once.
#
# Where samples mix, or a weight is used twice, this is wrong. So we check: for weights
# ``u`` of shape ``[N, C]``, one backward pass must give the sum of ``u * J``. A row of
# ones joins the samples, so that a rank with a single sample sees mixing, too.


def linear_factors(model, X):
    """Return ``{layer: (a, delta)}`` of shapes ``[N, I + 1]`` and ``[N, C, O]``.

    ``X`` is ``[N, ...]``, where N = 0 is allowed. The last column of ``a`` belongs to
    the bias. A frozen weight or bias has no columns, and a layer without influence on
    the output has no factors. The model stays as it is. Raises ``ValueError`` if a
    parameter is not in a ``Linear`` layer, if a layer is called twice or with another
    input than ``[N, I]``, if the output is not ``[N, C]``, or if samples mix.
    """
    params = {p: name for name, p in model.named_parameters() if p.requires_grad}
    layers = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    own = {m: [p for p in (m.weight, m.bias) if p in params] for m in layers}
    others = params.keys() - {p for group in own.values() for p in group}
    if others or not params:
        names = ", ".join(sorted(params[p] for p in others)) or "no parameter"
        raise ValueError(f"only parameters of Linear layers can be used, got {names}")
    X = torch.cat([X, X.new_ones(1, *X.shape[1:])])
    calls = {}

    def record(layer, inputs, output):
        a = inputs[0].detach()
        if a.ndim != 2 or len(a) != len(X) or layer in calls:
            got = f"{list(a.shape)} for {len(X)} samples"
            raise ValueError(f"{layers[layer]}: one call with [N, I] needed, got {got}")
        ones = a.new_ones(len(a), 1)
        columns = [a if p is layer.weight else ones for p in own[layer]]
        if columns:
            edge = torch.autograd.graph.get_gradient_edge(output)
            calls[layer] = torch.cat(columns, 1), edge

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.enable_grad():
            fs = torch.func.functional_call(model, buffers, (X,))
    finally:
        for hook in hooks:
            hook.remove()
    shape = list(getattr(fs, "shape", [])) or type(fs).__name__
    if len(shape) != 2 or shape[0] != len(X):
        raise ValueError(f"the output must be [{len(X)}, C], but is {shape}")

    E = torch.eye(shape[1]).to(fs)[:, None].expand(-1, *shape)
    u = torch.arange(1, fs.numel() + 1).sin().reshape(shape).to(fs)
    edges, options = [edge for _, edge in calls.values()], {"retain_graph": True}
    options |= {"is_grads_batched": True, "allow_unused": True}
    deltas = torch.autograd.grad(fs, edges, E, **options)
    grads = torch.autograd.grad(fs, list(params), u, materialize_grads=True)
    factors, sums = {}, {}
    for (layer, (a, _)), delta in zip(calls.items(), deltas):
        if delta is not None:
            factors[layers[layer]] = a[:-1], delta.transpose(0, 1)[:-1]
            total = torch.einsum("nc,cno,ni->oi", u, delta, a)
            sums |= zip(own[layer], total.split([p[0].numel() for p in own[layer]], 1))
    for p, grad in zip(params, grads):
        error = (sums[p].reshape(p.shape) if p in sums else 0) - grad
        if not error.norm() <= torch.finfo(fs.dtype).eps ** 0.5 * grad.norm():
            raise ValueError(f"{params[p]}: samples mix, or another layer shares it")
    return factors


def jacobian_rows(model, X):
    """Return ``{name: J [N, C, *p.shape]}`` from the factors of ``linear_factors``."""
    rows = {}
    for layer, (a, delta) in linear_factors(model, X).items():
        J = torch.einsum("nco,ni->ncoi", delta, a)
        own = model.get_submodule(layer).named_parameters(layer, recurse=False)
        params = {name: p for name, p in own if p.requires_grad}
        parts = J.split([p[0].numel() for p in params.values()], 3)
        for (name, p), part in zip(params.items(), parts):
            rows[name] = part.reshape(*J.shape[:2], *p.shape)
    return rows


def flat_rows(model, X):
    """Return the rows of ``jacobian_rows`` as ``[N, C, P]``."""
    return torch.cat([J.flatten(2) for J in jacobian_rows(model, X).values()], 2)


model, X = problem(*SMALL)
torch.testing.assert_close(flat_rows(model, X), loop(model, X))
for name, (a, delta) in linear_factors(model, X).items():
    say(f"Layer {name}: a {list(a.shape)}, delta {list(delta.shape)}.")
say("One process: the products of the factors equal the autograd loop.")

mixing = nn.Sequential(nn.Linear(6, 3), nn.Softmax(dim=0))
try:
    linear_factors(mixing, X)
except ValueError as error:
    say(f"Softmax over the samples: ValueError: {error}")
else:
    raise AssertionError("the check of the factors is blind")

# %%
# Kernel of all pairs of samples
# ------------------------------
# The neural tangent kernel (NTK) is ``J J^T`` over all parameters, of shape
# ``[N, C, N, C]``. From factors it is a sum over layers of ``(delta_nc . delta_md)``
# times ``(a_n . a_m)``, without ``J``. Each rank holds the factors of its samples and
# computes its rows of ``ntk``, so it needs the factors of all others, too.
#
# They go round in a ring. In each step a rank passes on the shard that it holds,
# receives the next one, and computes with the first while both are on their way. So it
# holds three shards, its own included, for any number of ranks. To gather them would
# mean to hold all. To broadcast them in turn would move the same bytes, but from one
# rank at a time.


def shards(N, ranks):
    """Return a slice of the samples for each rank. The last ones can be empty."""
    size = -(-N // ranks)
    return [slice(min(r * size, N), min((r + 1) * size, N)) for r in range(ranks)]


def ring_step(held, size):
    """Send ``held`` to the previous rank, and receive ``size`` rows from the next."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    coming = held.new_empty(size, held.shape[1])
    send = dist.P2POp(dist.isend, held, (rank - 1) % ranks)
    receive = dist.P2POp(dist.irecv, coming, (rank + 1) % ranks)
    return coming, dist.batch_isend_irecv([send, receive])


def pack(factors):
    """Return one row of all factors for each sample, ``[N, floats per sample]``."""
    return torch.cat([t.flatten(1) for pair in factors.values() for t in pair], 1)


def add_block(ntk, factors, held):
    """Add to ``ntk`` the kernel with the samples whose packed factors are ``held``."""
    for a, delta in factors.values():
        widths = a.shape[1], delta.shape[1:].numel()
        b, other, held = held.split([*widths, held.shape[1] - sum(widths)], 1)
        other = other.unflatten(1, delta.shape[1:])
        products = torch.einsum("nco,mdo->ncmd", delta, other)
        ntk.addcmul_(products, (a @ b.T)[:, None, :, None])
        del products  # before those of the next layer are made


def ntk_rows(factors, N):
    """Return the NTK of this rank's samples with all ``N``, ``[N_r, C, N, C]``.

    ``factors`` are those of this rank's shard. In a process that is not a rank, the
    shard is all samples. Raises ``ValueError`` if the shard has another size.
    """
    alone = not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    parts, held = shards(N, ranks), pack(factors)
    sizes = [part.stop - part.start for part in parts]
    if len(held) != sizes[rank]:
        raise ValueError(f"rank {rank} has {len(held)} samples, not {sizes[rank]}")
    C = next(iter(factors.values()))[1].shape[1]
    ntk = held.new_zeros(len(held), C, N, C)
    for owner in (*range(rank, ranks), *range(rank)):
        following = (owner + 1) % ranks
        if following != rank:
            coming, requests = ring_step(held, sizes[following])
        add_block(ntk[:, :, parts[owner]], factors, held)
        if following != rank:
            for request in requests:
                request.wait()
            held = coming
    return ntk


J, ntk = loop(model, X), ntk_rows(linear_factors(model, X), len(X))
torch.testing.assert_close(ntk, torch.einsum("ncp,mdp->ncmd", J, J))
say(f"One process: the NTK {list(ntk.shape)} equals J J^T from the loop.")

# %%
# Rows of the Jacobian, sharded over devices
# ------------------------------------------
# The rows of a rank need no other rank, and nobody gathers them. A product that ends in
# ``P`` numbers is a sum over the ranks: the generalized Gauss-Newton matrix of half the
# square loss, times a vector ``v``, is ``J^T (J v)``, and only ``P`` numbers travel. A
# ``DTensor`` makes the rows one global tensor, for the operations that it supports. Its
# ``Shard(0)`` has the sizes of ``shards``.
#
# The model stays a plain module. ``DistributedDataParallel`` would average gradients
# over the ranks, and a Jacobian has no average.


def check(N, widths):
    """Compare the results of this rank with those of a single process."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    same, (model, X) = torch.testing.assert_close, problem(N, widths)
    rank, ranks, whole = dist.get_rank(), dist.get_world_size(), loop(model, X)
    parts = shards(N, ranks)
    mine = X[parts[rank]]
    ntk = ntk_rows(linear_factors(model, mine), N)
    same(ntk, torch.einsum("ncp,mdp->ncmd", whole[parts[rank]], whole))

    J, v = flat_rows(model, mine), torch.arange(whole.shape[2]).sin()
    same(J, whole[parts[rank]])
    Gv = torch.einsum("ncp,nc->p", J, J @ v)
    dist.all_reduce(Gv)
    same(Gv, torch.einsum("ncp,nc->p", whole, whole @ v))

    mesh = init_device_mesh(X.device.type, (ranks,))
    options = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
    J = DTensor.from_local(J, mesh, [Shard(0)], **options)
    same(J.square().sum((0, 1)).full_tensor(), whole.square().sum((0, 1)))
    dist.barrier()
    say(f"{ranks} ranks, {dist.get_backend()}, samples {[len(X[p]) for p in parts]}:")
    say("NTK, rows, J^T (J v) and DTensor equal those of one process.")


# %%
# Peak memory and seconds of a rank
# ---------------------------------
# The peak is the largest sum of the bytes that PyTorch allocates and frees: its
# profiler records them. ``Timer`` gives the seconds of the steps.


def peak_bytes(function):
    """Return the peak of the bytes that PyTorch allocates in ``function()``."""
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def measure(N, widths):
    """Return the peak of this rank, its sizes, and the seconds of its steps."""
    (model, X), parts = problem(N, widths), shards(N, dist.get_world_size())
    X, buffer = X[parts[dist.get_rank()]], torch.zeros(len(X[parts[0]]), 2000)
    factors = linear_factors(model, X)
    own, held = ntk_rows(factors, N)[:, :, : len(X)], pack(factors)
    steps = {
        "factors": lambda: linear_factors(model, X),
        "block": lambda: add_block(own, factors, held),
        "send": lambda: [r.wait() for r in ring_step(buffer, len(buffer))[1]],
        "all": lambda: ntk_rows(linear_factors(model, X), N),
    }
    Timer = torch.utils.benchmark.Timer
    times = {k: Timer("f()", globals={"f": f}).timeit(5).mean for k, f in steps.items()}
    sizes = {"samples": len(X), "held": held.nbytes, "buffer": buffer.nbytes}
    return times | sizes | {"peak": peak_bytes(steps["all"])}


def study(small, large):
    """Check the small problem, and measure the large one."""
    check(*small)
    return measure(*large)


# %%
# Start with torchrun
# -------------------
# ``torchrun --standalone --nproc-per-node=2 distributed_jacobians.py`` starts this file
# as two ranks on one machine. On several, ``--nnodes``, ``--rdzv-backend=c10d`` and
# ``--rdzv-endpoint`` replace ``--standalone``. Each rank calls ``join``. It takes NCCL
# if the machine has a GPU for each of its ranks, and gloo if not. The timeout ends the
# wait for a rank that hangs. Set it above the longest step.
#
# A notebook is no file that another process could run. So ``launch`` writes the source
# of the functions to a temporary file, and gives that to ``torchrun``. A fork would
# need no file, but can hang if there are threads, and fails if CUDA is in use. A spawn
# imports its functions, which is not possible with those of a notebook.


def join(program, *args):
    """Join the other ranks, and return ``program(*args)``."""
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    torch.set_default_dtype(torch.float64)
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    result = program(*args)
    dist.destroy_process_group()
    return result


IMPORTS = """import os, torch, torch.utils.benchmark
from datetime import timedelta
from itertools import accumulate, product
from torch import distributed as dist, nn"""
LIBRARY = [problem, loop, say, linear_factors, jacobian_rows, flat_rows, shards, pack]
LIBRARY += [ring_step, add_block, ntk_rows, check, peak_bytes, measure, study, join]


def launch(program, ranks, *args, timeout=60):
    """Return what ``program(*args)`` returns on each rank; print what rank 0 prints.

    ``program`` is a function that uses ``IMPORTS`` and ``LIBRARY``. Raises
    ``RuntimeError`` with the errors of the ranks if one fails, and
    ``subprocess.TimeoutExpired`` after ``timeout`` seconds. Then all ranks have ended.
    """
    source = map(inspect.getsource, dict.fromkeys([*LIBRARY, program]))
    call = f"join({program.__name__}, *{args!r})"
    call = f"torch.save({call}, os.environ['RANK'] + '.pt')\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ranks.py").write_text("\n\n".join([IMPORTS, *source, call]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", f"--log-dir={folder}", "ranks.py"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=folder, **options) as torchrun:
            try:
                out, errors = torchrun.communicate(timeout=timeout)
            finally:
                torchrun.terminate()  # it ends its ranks, too
        if torchrun.returncode:
            raise RuntimeError(errors)
        print(out, end="")
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(ranks)]


if dist.is_torchelastic_launched():  # torchrun runs this file: be a rank, no more
    join(study, SMALL, LARGE)
    sys.exit()
results = launch(study, RANKS, SMALL, LARGE)

# %%
# One process computes the kernel of the large problem with the same functions. With
# more ranks, each holds fewer rows of ``ntk`` and smaller shards.

model, X = problem(*LARGE)
N, C, P = len(X), LARGE[1][-1], sum(p.numel() for p in model.parameters())
alone = peak_bytes(lambda: ntk_rows(linear_factors(model, X), N))
worst = {key: max(result[key] for result in results) for key in results[0]}
assert worst["peak"] < alone
print(f"Peak: {alone / 1e6:.1f} MB on 1 rank, {worst['peak'] / 1e6:.1f} MB on {RANKS}.")
print(f"J would have {8 * N * C * P / 1e6:.1f} MB.")

# %%
# Failure of a rank
# -----------------
# If a rank raises, ``torchrun`` ends the others, and ``launch`` raises an error with
# all that they wrote. Brackets name the rank.


def fail():
    if dist.get_rank() == 1:
        raise ValueError("the file of this shard is missing")
    dist.barrier()


start = time.perf_counter()
try:
    launch(fail, RANKS)
except RuntimeError as error:
    lines = [line for line in str(error).splitlines() if ": ValueError:" in line]
else:
    raise AssertionError("the failure of a rank went unseen")
print(lines[0])
print(f"All ranks ended after {time.perf_counter() - start:.1f} s.")

# %%
# Cost on 8, 64 and 1024 ranks
# ----------------------------
# We work out a larger run from what the ranks measured: the seconds and bytes of the
# factors of a sample, and the seconds of a pair of samples in ``ntk``. A rank receives
# the factors of all other samples, in ``ranks - 1`` messages. The run takes as long as
# the slower of computing and sending. First we put in the bandwidth measured between
# two processes, and compare with the measured run.

per_sample = worst["held"] / worst["samples"]
per_pair = worst["block"] / worst["samples"] ** 2


def cost(N, ranks, bandwidth, latency=LATENCY):
    """Return seconds of computing and of sending, and bytes held, for each rank."""
    n = -(-N // ranks)
    computing = n * (worst["factors"] / worst["samples"] + N * per_pair)
    sending = (ranks - 1) * (latency + n * per_sample / bandwidth)
    return computing, sending, 8 * n * C * N * C + 3 * n * per_sample


local = worst["buffer"] / worst["send"]
computing, sending, _ = cost(N, RANKS, local, latency=0)
print(f"Between two processes: {local / 1e9:.2f} GB/s. Run with {RANKS} ranks:")
print(f"worked out {max(computing, sending):.3f} s, measured {worst['all']:.3f} s.")

# %%
# The bandwidths of the networks are assumptions. With more ranks, the bytes that a rank
# receives approach those of all samples, while its computing shrinks. Rows of ``J`` in
# place of factors would multiply the bytes. Memory is that of the rows of ``ntk`` and
# of three shards.

N, choices = TARGET
ratio = 8 * C * P / per_sample
print(f"N = {N}, C = {C}, P = {P}: {per_sample / 1e3:.1f} kB of factors per sample.")
print(f"Rows of J have {ratio:.0f} times as many bytes. Seconds of a rank:")
print(" " * 15 + f"{'sending at':>11}" * len(NETWORKS))
print("ranks computing" + "".join(f"{name:>11}" for name in NETWORKS) + "    memory")
for ranks in choices:
    computing, _, held = cost(N, ranks, 1)
    rates = [cost(N, ranks, rate)[1] for rate in NETWORKS.values()]
    print(f"{ranks:5}{computing:10.3g}" + "".join(f"{t:11.3g}" for t in rates), end="")
    print(f"{held / 1e9:7.1f} GB")

plt.rcParams.update({"font.size": 11})
fig, ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
xs = [2**i for i in range(11)]
ax.loglog(xs, [cost(N, x, 1)[0] for x in xs], "ko-", label="computing")
rates = {name: rate / ratio for name, rate in NETWORKS.items()}
for what, speeds, color in ("J", rates, "#D55E00"), ("factors", NETWORKS, "#0072B2"):
    for (name, rate), style in zip(speeds.items(), ("s--", "^:")):
        times = [cost(N, x, rate)[1] for x in xs[1:]]
        ax.loglog(xs[1:], times, style, color=color, label=f"{what}, {name}")
ax.set(xlabel="number of ranks", ylabel="seconds of a rank")
ax.set_xticks(choices, choices)
ax.set_title("Computing shrinks with the ranks, sending does not")
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# Where to go next
# ----------------
# Next: ``compute/choosing_a_method.py`` measures the methods of one process. The
# alternative: ``scale/jacobians_without_memory.py`` uses the rows of one process
# without storing them.
