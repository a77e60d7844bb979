"""
Jacobian of any model, fast and checked
=======================================

After this page you have one function for the Jacobian of a network's outputs by its
parameters, for a whole batch. It takes any model with outputs of shape ``[N, C]``,
checks its own result, and can write it into memory that you allocate once. You see what
it does on which model, and how its time compares with ``vmap(jacrev)``.
"""

# fold: Imports
import statistics
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise, product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.benchmark import timer
from torch.utils.checkpoint import checkpoint

# %%
# Shortest use
# ------------
# The function is folded here: copy it, or download it. It needs PyTorch alone, and
# reads from top to bottom, in the order in which it runs. You need not read it to use
# it: ``from batched_jacobian import batched_jacobian``. Call the model's ``eval()``
# first, and not under autocast: else it is the Jacobian of one draw of the dropout, or
# of 16 bits. Its cost is measured below.

# fold: batched_jacobian, to copy or to download
METHODS = "linear layers", "vmap(jacrev)", "sample by sample", "definition"
LARGE = 2**17  # N * weight.numel() of a layer for which an outer product pays
LIMIT = 10  # roundings: a right Jacobian is off by fewer


class Jacobian(dict):
    """``{name: [N, C, *p.shape]}``, and the ``method`` that gave it."""

    method = None


@torch.inference_mode(False)
@torch.enable_grad()
def batched_jacobian(model, X, *, out=None, method=None):
    """Return the Jacobian of ``fs = model(X)``: ``{name: [N, C, *p.shape]}``.

    ``X`` is a tensor ``[N, ...]``, and ``model(X)`` is ``[N, C]`` and finite. The names
    are those of the parameters that require a gradient. The result is checked, and its
    ``method`` says which of ``METHODS`` it took. In a loop, pass this ``method`` to
    skip the check, but not if the model decides by values, and a result as ``out`` to
    write into. The model and ``X`` stay as they are; backward hooks do not run, and
    forward hooks more than once. Raises ``ValueError`` if an argument or ``model(X)``
    is not as above, or samples alone have other outputs than ``method`` needs.
    """
    params = trainable(model)
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {METHODS}, but is {method!r}")
    J, left = Jacobian.fromkeys(params), list(params)
    with unchanged(model):
        leaves, X = differentiable(params, X)
        fs, layers = None, []
        if out is not None or method != "vmap(jacrev)":
            fs, layers = forward(model, leaves, X)
        if out is not None:
            check_blocks(out, fs, params)

        def fill():
            blocks = blocks_by(J.method, model, leaves, left, X, fs, layers)
            for name, block in blocks.items():
                J[name] = write(block, out and out[name])
            return blocks

        quick = METHODS[0 if layers else 1 : -1]
        for J.method in quick if method is None else ():
            try:
                blocks = fill()
            except Exception:
                continue
            u = random_weights(fs)
            sums = {name: weighted_sum(u, block) for name, block in blocks.items()}
            errors = errors_in_roundings(model, leaves, X, fs, u, sums)
            left = [name for name, error in errors.items() if not error <= LIMIT]
            if not left:
                return J
        J.method = method or "definition"
        fill()
        return J


def trainable(model):
    """Return the parameters that require a gradient, by name."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("pass the model inside, model.module")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    return params


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


def differentiable(params, X):
    """Return detached parameters and a copy of ``X``, both to differentiate by."""
    if not isinstance(X, torch.Tensor) or X.ndim == 0 or len(X) == 0:
        got = list(X.shape) if isinstance(X, torch.Tensor) else type(X).__name__
        raise ValueError(f"X must be a tensor [N, ...] with N > 0, but is {got}")
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return leaves, X.detach().clone().requires_grad_(X.is_floating_point())


def forward(model, leaves, X):
    """Return ``fs``, and the large linear layers that see one vector of each sample."""
    owners = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    layers = [m for m in layers if len(X) * m.weight.numel() >= LARGE]
    layers = [m for m in layers if {m.weight, m.bias} == set(m.parameters())]
    layers = [m for m in layers if all(owners[p] == 1 for p in m.parameters())]
    layers = [m for m in layers if m.weight.requires_grad and m.bias.requires_grad]
    vectors = Counter()

    def count(layer, args, output):
        vectors[layer] += output.numel() // output.shape[-1]

    copies = {name: p.clone() for name, p in leaves.items()}  # the model may write
    with hooked(layers, count):
        fs = outputs(model, copies, X)
    if not fs.isfinite().all():
        raise ValueError("model(X) is not finite")
    return fs, [layer for layer in layers if vectors[layer] == len(X)]


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


def check_blocks(blocks, fs, params):
    """Raise ``ValueError`` if ``blocks`` are not like the Jacobian of ``fs``."""
    got = list(blocks) if isinstance(blocks, dict) else type(blocks).__name__
    if not isinstance(blocks, dict) or set(blocks) != set(params):
        raise ValueError(f"a Jacobian is a dict of {list(params)}, but this is {got}")
    for name, p in params.items():
        block = blocks[name]
        wanted = f"{list(fs.shape + p.shape)}, {p.dtype}, {p.device}"
        got = f"{list(block.shape)}, {block.dtype}, {block.device}"
        if got != wanted:
            raise ValueError(f"the block of {name} must be {wanted}, but is {got}")


def blocks_by(method, model, leaves, names, X, fs, layers):
    """Return ``{name: block}``, where a block is ``J`` or a pair with this product."""
    if method == "linear layers":
        return from_vmap(model, leaves, names, X, layers)
    if method == "vmap(jacrev)":
        return from_vmap(model, leaves, names, X, [])
    if method == "sample by sample":
        rows = (row_alone(model, leaves, x, row) for x, row in zip(X.split(1), fs))
        return from_rows(rows, leaves, names)
    return from_rows(fs, leaves, names)


def row_alone(model, leaves, x, row):
    """Return ``model(x)[0]``, or raise ``ValueError`` if it is another ``row`` in X."""
    alone = outputs(model, leaves, x)[0]
    precision = torch.finfo(row.dtype).eps ** 0.5
    if not norm(alone - row) <= precision * norm(row):
        raise ValueError("a sample alone has another output: leave method away")
    return alone


def from_vmap(model, leaves, names, X, layers):
    """Return ``{name: block}`` from ``vmap(jacrev)``.

    The block of a bias is ``delta``, the derivative by what its layer returns. Where
    ``layers`` have one, that of the weight is ``(delta [N, C, O], a [N, I])``, with
    the layer's input ``a``: ``J[n, c, o, i] = delta[n, c, o] * a[n, i]``.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    linear = {m: (name_of[m.weight], name_of[m.bias]) for m in layers}
    fixed = {weight: leaves[weight].detach() for weight, _ in linear.values()}
    rest = {name: leaves[name].detach() for name in names if name not in fixed}

    def f(rest, x):
        inputs = {}

        def keep(layer, args, output):
            inputs[layer] = args[0].flatten()

        with hooked(layers, keep):
            return outputs(model, fixed | rest, x[None])[0], inputs

    blocks, inputs = vmap(jacrev(f, has_aux=True), (None, 0))(rest, X.detach())
    pairs = {w: (blocks[b], inputs[layer]) for layer, (w, b) in linear.items()}
    return blocks | pairs


@contextmanager
def hooked(layers, hook):
    handles = [layer.register_forward_hook(hook, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def write(block, out):
    """Return a block as a tensor ``[N, C, *p.shape]``: in ``out``, if that is given."""
    if isinstance(block, torch.Tensor):
        return block.detach().contiguous() if out is None else out.copy_(block)
    delta, a = block
    if out is None:
        out = delta.new_empty(*delta.shape, a.shape[1])
    column, row = delta.flatten(1)[:, :, None], a[:, None].to(delta.dtype)
    torch.mul(column, row, out=out.view(len(a), -1, a.shape[1]))
    return out


def random_weights(fs, seed=0):
    """Return normal numbers like ``fs``, without the global random generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(fs.shape, generator=generator, device="cpu").to(fs)


def weighted_sum(u, block):
    """Return the sum of ``u[n, c] * J[n, c]``, and the norm of ``J``."""
    if isinstance(block, torch.Tensor):
        return torch.tensordot(u.to(block.dtype), block, 2), norm(block)
    delta, a = block
    total = torch.einsum("nc,nco->on", u.to(delta.dtype), delta) @ a.to(delta.dtype)
    return total, norm(delta.flatten(1).norm(dim=1) * a.norm(dim=1))


def norm(tensor):
    """Return the norm as a number, which float16 would not hold."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=wide).item()


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


# %%
# A tensor ``X`` of ``N`` samples goes in. Each parameter of shape ``p.shape`` has a
# block of shape ``[N, C, *p.shape]`` in the result.

_ = torch.manual_seed(0)
N, C = 15, 5
model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, C))
X = torch.rand(N, 10)

J = batched_jacobian(model, X)
for name, block in J.items():
    print(f"{name}: {list(block.shape)}")

# %%
# In double precision we compare it with the definition: one backward pass for each
# sample and output.

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


torch.set_default_dtype(torch.float64)
model, X = model.double(), X.double()
J = batched_jacobian(model, X)
assert_close(dict(J), autograd_loop(model, X))
print(f"batched_jacobian agrees with the autograd loop for {len(J)} parameters.")

# %%
# Loop over batches
# -----------------
# The result's ``method`` says how it was computed. The first call checks its result.
# Pass its ``method`` to later calls with the same model and shapes, and they skip the
# check. If the model decides by values, as with an ``if``, another batch may need
# another method: leave it away. With wide linear layers, pass a result as ``out``, too:
# the next one is written into its memory. With other models, leave ``out`` away: the
# six lines are as fast, where ``vmap`` takes the model.
#
# If a plain CNN was computed ``sample by sample`` or by the ``definition``, then a ReLU
# near zero was on in one method and off in the other: pass ``method="vmap(jacrev)"``.

memory = batched_jacobian(model, X)
for batch in torch.rand(3, N, 10):
    J = batched_jacobian(model, batch, out=memory, method=memory.method)
    assert_close(dict(J), autograd_loop(model, batch))  # on this page only
assert J["0.weight"] is memory["0.weight"]
print(f"Three batches by {J.method}, right, in the same memory.")

# %%
# A new batch overwrites the last one: copy what you keep. The memory has to fit, so a
# smaller last batch needs ``out={name: block[:n] for name, block in memory.items()}``.
# With dropout, call ``model.eval()`` before and ``model.train()`` after: in training
# mode, ``J`` is that of one random draw.
#
# Models of many kinds
# --------------------
# ``vmap`` runs the model on one sample at a time. Where that is wrong, as for batch
# norm in training mode, or does not work, as for some recurrent layers, the check or
# the error sends the function to its next method. You do not have to know.

# fold: Six models that other methods stumble over, and a wide one


class Turned(nn.RNN):
    """A recurrent layer with time in its first axis, which is the default."""

    def forward(self, sequences):
        return super().forward(sequences.transpose(0, 1))[0][-1]


class Tied(nn.Module):
    """Words in, and a score for each word out, with one weight for both."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 5)

    def forward(self, words):
        return self.words(words).mean(1) @ self.words.weight.T


layer = nn.Linear(10, 10)
conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True)
cases = {
    "layer called twice": (nn.Sequential(layer, nn.Tanh(), layer), X),
    "CNN": (nn.Sequential(conv, nn.GELU(), nn.Flatten()), torch.rand(N, 3, 2, 2)),
    "RNN": (Turned(3, 4), torch.rand(N, 6, 3)),
    "attention": (nn.Sequential(encoder, nn.Flatten()), torch.rand(N, 2, 6)),
    "tied weight": (Tied(), torch.randint(9, (N, 4))),
    "batch norm, training": (nn.Sequential(layer, nn.BatchNorm1d(10)), X),
    "wide layers": (nn.Sequential(nn.Linear(10, 900), nn.ReLU(), nn.Linear(900, C)), X),
}

# %%
# Each result equals the autograd loop.

for case, (net, inputs) in cases.items():
    J = batched_jacobian(net, inputs)
    assert_close(dict(J), autograd_loop(net, inputs))
    print(f"{case}: right, by {J.method}")

# %%
# How it works
# ------------
# One ``vmap(jacrev)`` computes all blocks but those of the weights of large linear
# layers. Such a block is the outer product of the layer's input and of the block of its
# bias, as ``scale/layer_structure.py`` explains. Then, for random weights ``u`` of
# shape ``[N, C]``, the sum of ``u * J`` has to be the gradient of ``(u * fs).sum()``,
# up to the rounding that this gradient shows on this model: the check of
# ``trust/check_a_jacobian.py``. A parameter for which it is not gets its block from the
# next method; the last one is the definition, and needs no check. These are the
# methods, in the order in which they are tried:

print(*METHODS, sep="\n")

# %%
# Errors
# ------
# The function refuses what has no Jacobian of shape ``[N, C, *p.shape]``, before it
# writes anything. The last model hides a layer's weights from ``autograd.grad``: a
# reentrant checkpoint runs its layer without a graph. PyTorch says so, and with
# ``use_reentrant=False`` it works.


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return self[1](checkpoint(self[0], x, use_reentrant=True))


words, nan = torch.randint(9, (N, 4)), X.where(X < 0.9, torch.nan)
hidden = Checkpointed(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, C))
bad = {
    "no samples": (model, X[:0], None),
    "other outputs": (nn.Sequential(layer, nn.Unflatten(1, (5, 2))), X, None),
    "memory": (model, X, batched_jacobian(model, X[1:])),
    "not finite": (model, nan, None),
    "reentrant checkpoint": (hidden, words, None),
}
for case, (net, inputs, out) in bad.items():
    try:
        batched_jacobian(net, inputs, out=out)
    except (RuntimeError, UserWarning, ValueError) as error:
        print(f"{case}: {type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{case} raises no error any more")

# %%
# Time at real sizes
# ------------------
# In single precision and with one thread, on seven models of common kinds. The
# yardstick is ``vmap(jacrev)``, which checks nothing.

# fold: The models, vmap(jacrev) and the clock


def mlp(*widths):
    """Return linear layers of these widths, with a ReLU between any two."""
    pairs = [[nn.Linear(*sizes), nn.ReLU()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


class ResidualNetwork(nn.Module):
    """Two convolutions with batch norm, and a path around them."""

    def __init__(self, width):
        super().__init__()
        first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        norms = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.body = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1])

    def forward(self, x):
        return torch.relu(x + self.body(x))


class SmallTransformer(nn.Module):
    """Two blocks between an embedding into ``[N, T, D]`` and a layer for the scores."""

    def __init__(self, embedding, T, C, D=32, causal=False):
        super().__init__()
        self.embedding, self.scores = embedding, nn.Linear(D, C)
        self.position = nn.Parameter(torch.randn(T, D) / 10)
        options = {"dropout": 0, "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(D, 4, 4 * D, **options)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(T)
        self.causal = causal

    def forward(self, x):
        x = self.embedding(x) + self.position
        if self.causal:
            return self.scores(self.blocks(x, self.mask, is_causal=True)[:, -1])
        return self.scores(self.blocks(x).mean(1))


class Patches(nn.Conv2d):
    """Images ``[N, 3, H, W]`` in, ``[N, T, D]`` out."""

    def forward(self, images):
        return super().forward(images).flatten(2).mT


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


CALLS = {
    "vmap(jacrev)": lambda net, X, J: vmap_jacrev(net, X),
    "plain": lambda net, X, J: batched_jacobian(net, X),
    "out=": lambda net, X, J: batched_jacobian(net, X, out=J),
    "out= and method=": lambda net, X, J: batched_jacobian(
        net, X, out=J, method=J.method
    ),
}


def median_times(calls, *args, repeats=3):
    """Return ``{name: seconds}``, medians over calls that take turns."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = timer()  # it waits for an accelerator
            call(*args)
            times[name].append(timer() - start)
    return {name: statistics.median(values) for name, values in times.items()}


torch.set_default_dtype(torch.float32)
convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
blocks = [nn.ReLU(), ResidualNetwork(16), ResidualNetwork(16)]
pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
norm_mlp = mlp(64, 128, 128, 10)
for place in 1, 4:
    norm_mlp.insert(place, nn.LayerNorm(128))
vit = SmallTransformer(Patches(3, 32, 4, 4), 36, 10)
gpt = SmallTransformer(nn.Embedding(20, 32), 24, 20, causal=True)
images, words = torch.rand(8, 3, 24, 24), torch.randint(20, (8, 24))
models = {
    "MLP 784-256-256-10": (mlp(784, 256, 256, 10), torch.rand(12, 784)),
    "MLP 64-128-128-10": (mlp(64, 128, 128, 10), torch.rand(128, 64)),
    "MLP with LayerNorm": (norm_mlp, torch.rand(64, 64)),
    "CNN, 32 x 32": (nn.Sequential(*convs, *pooled), torch.rand(8, 3, 32, 32)),
    "ResNet, eval": (nn.Sequential(*convs, *blocks, *pooled).eval(), images),
    "ViT, 36 patches": (vit, images),
    "GPT, 24 words": (gpt, words),
}

# %%
# The methods take turns, three times, and we take medians. The blocks have to agree
# with those of ``vmap(jacrev)``, up to the rounding of single precision. Each line has
# the time of ``vmap(jacrev)``, and as multiples of it that of a plain call, with
# ``out=``, and with ``out=`` and ``method=``.

# vmap says that it loops over an attention kernel, for lack of a batching rule.
warnings.filterwarnings("ignore", "There is a performance drop")
threads = torch.get_num_threads()
torch.set_num_threads(1)
ratios = {}
for name, (net, inputs) in models.items():
    J = batched_jacobian(net, inputs)
    for key, block in vmap_jacrev(net, inputs).items():
        assert (J[key] - block).norm() <= 1e-4 * block.norm(), (name, key)
    times = median_times(CALLS, net, inputs, J)
    unit = times.pop("vmap(jacrev)")
    ratios[name] = {call: time / unit for call, time in times.items()}
    print(f"{name}, N = {len(inputs)}, by {J.method}:")
    multiples = (f"x {ratio:.2f}" for ratio in ratios[name].values())
    print(f"  {unit * 1e3:.1f} ms; {', '.join(multiples)}")
torch.set_num_threads(threads)

# %%
# Left of the line, ``batched_jacobian`` is faster than ``vmap(jacrev)``. A plain call
# pays for its check: a forward pass, and one to five backward passes. Large linear
# layers can pay it back. With ``out=`` their blocks are written once, into memory that
# is in use; other blocks are copied there. With ``method=`` there is no check.

# fold: How the picture is drawn

STYLES = {"plain": "o #D55E00", "out=": "s #56B4E9", "out= and method=": "D #0072B2"}
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for (call, style), shift in zip(STYLES.items(), (-0.28, 0, 0.28)):
    marker, color = style.split()
    x, y = [ratio[call] for ratio in ratios.values()], range(len(ratios))
    y = [place + shift for place in y]
    ax.plot(x, y, marker, color=color, markersize=7, label=call)
ax.set_yticks(range(len(ratios)), list(ratios))
ax.axvline(1, color="black")
ax.set_xscale("log")
ax.set_xticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
ax.minorticks_off()
ax.invert_yaxis()
ax.grid(axis="y", color="0.9")
ax.set_axisbelow(True)
ax.set_xlabel("time / time of vmap(jacrev)")
fig.legend(loc="outside lower center", ncols=3)
median = statistics.median(ratio["plain"] for ratio in ratios.values())
least = min(ratio["out= and method="] for ratio in ratios.values())
fig.suptitle(
    f"Checked: x {median:.2f} the time of vmap(jacrev) (median);\n"
    f"with out= and method=, down to x {least:.2f}"
)
plt.show()

# %%
# What to take home
# -----------------
# - ``batched_jacobian(model, X)`` is right for the model in its present mode, or it
#   raises. Take it if you do not want to think about your model.
# - In a loop, pass ``method=J.method``: no check. If large linear layers make up the
#   model, pass ``out=J``, too: no new memory.
# - Structure pays for linear layers of a hundred units and more. For other models you
#   get ``vmap(jacrev)``, checked, and what to do where it fails.
#
# Next: ``scale/jacobians_without_memory.py``, for a J that does not fit. The
# alternative: ``compute/torch_func_jacobians.py`` has the six lines that are enough for
# a model that you know.

# sphinx_gallery_parallel = False
