"""
Layer support of each method
============================

After this page you can say which methods give the right Jacobian for the layers of your
model, which raise, and which return a wrong one without an error. One call judges a
model of your own.
"""

# fold: Imports
import contextlib
import copy
import io
import re
import textwrap
import warnings
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

threads = torch.get_num_threads()
torch.set_num_threads(1)  # the models are tiny: a second thread only costs time
_ = torch.manual_seed(0)

# %%
# What to take
# ------------
# - ``vmap(jacrev)`` first, in ``eval()``: it needs no rules, and is wrong only where
#   samples mix and for very few operations.
# - ``functional.jacobian`` and ``is_grads_batched`` where it raises: slower, and right
#   on almost every case.
# - BackPACK where its rules fit, after ``verdicts``, below, has said so for your model.
#
# A wrong derivative without an error
# -----------------------------------
# Whether a method is right depends on the layers. BackPACK's ``BatchGrad`` has a rule
# for ``nn.Conv1d``, but the rule does not read ``padding_mode``. Nothing is raised.

conv = extend(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"))
X = torch.rand(5, 1, 7, requires_grad=True)
with backpack(BatchGrad()):
    conv(X).sum().backward()
truth = torch.stack([autograd.grad(conv(x).sum(), conv.weight)[0] for x in X])
assert_close(truth.sum(0), conv.weight.grad)
off = (conv.weight.grad_batch - truth).norm() / truth.norm()
assert off > 0.1
print(f"BatchGrad, circular padding: no error, and off by {off:.0%}.")

# %%
# Your own model
# --------------
# ``verdicts`` takes a model and its ``X``, a tensor ``[N, ...]``. It computes the
# Jacobian ``[N, C, *p.shape]`` of each parameter ``p`` by each method, and compares it
# with a loop of one backward pass for each sample and output.
#
# Each method gets a fresh copy of the model, a clone of ``X`` and the same random seed,
# in double precision, so that rounding cannot make a right method look wrong. Each
# block is compared relative to its own size. Warnings are ignored: only the numbers
# count. Take a few samples, since the loop is slow, and take ``N``, ``C`` and the
# widths all different.

# fold: The methods


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def jacrev_batch(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``jacrev`` of the batch."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return jacrev(lambda params: functional_call(model, params, X))(params)


def grads_batched(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one batched backward pass."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)  # [N * C, N, C]
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def functional_jacobian(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``autograd.functional``."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(*values):
        return functional_call(model, dict(zip(params, values)), X)

    blocks = autograd.functional.jacobian(f, tuple(params.values()))
    return dict(zip(params, blocks))


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


def with_converter(method, model, X):
    """Return what ``method`` returns for the converted model, under the old names."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    extended = extend(model, use_converter=True)
    new = {p: name for name, p in extended.named_parameters()}
    jacobian = method(extended, X)
    return {name: jacobian[new.get(p, name)] for name, p in params}


methods = {
    "vmap(jacrev)": vmap_jacrev,
    "SqrtGGNExact": lambda model, X: sqrt_ggn(extend(model), X),
    "SqrtGGNExact, converted": lambda model, X: with_converter(sqrt_ggn, model, X),
    "BatchGrad": lambda model, X: batch_grad(extend(model), X),
    "BatchGrad, converted": lambda model, X: with_converter(batch_grad, model, X),
    "jacrev of the batch": jacrev_batch,
    "is_grads_batched": grads_batched,
    "functional.jacobian": functional_jacobian,
}

# %%
# BackPACK appears four times: ``extend(model, use_converter=True)`` rewrites a model
# first, which unpacks your own classes and turns some functions, such as additions,
# into modules. A rule of BackPACK can compute in the default dtype, so ``verdicts``
# sets that, too, and puts it back.

# fold: verdicts


def trainable(model):
    """Return the parameters that require a gradient, by name."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("pass the model inside, model.module")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient")
    return params


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


class WithoutGraph(TorchFunctionMode):
    """Let ``copy.deepcopy`` take tensors of a graph, such as kept activations."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))


def agree(jacobian, expected):
    """Return whether two Jacobians differ by roundings, relative to each block."""
    norm = torch.linalg.vector_norm
    eps = torch.finfo(torch.get_default_dtype()).eps
    largest = max(map(norm, expected.values()))  # a block may be its roundings alone
    return jacobian.keys() == expected.keys() and all(
        J.shape == expected[name].shape
        and norm(J - expected[name])
        <= eps**0.5 * norm(expected[name]) + 10 * eps * largest
        for name, J in jacobian.items()
    )


@torch.inference_mode(False)
@torch.enable_grad()
def verdicts(model, X, dtype=torch.float64):
    """Return ``{method: "right", "wrong" or the error}`` for ``model(X)``.

    ``X`` is a tensor ``[N, ...]`` and ``model(X)`` is ``[N, C]``. The methods compute
    in ``dtype``, on the device of the model. The model, ``X``, the default dtype and
    the random state stay as they are. Raises ``ValueError`` if ``model(X)`` is not as
    above or not finite, if no parameter requires a gradient, if one of these is complex
    or has a hook, and if a module has a backward hook or sparse gradients.
    """
    if not isinstance(X, torch.Tensor):
        raise ValueError(f"X must be a tensor [N, ...], but is {type(X).__name__}")
    for name, p in trainable(model).items():
        if p.is_complex() or p._backward_hooks:
            raise ValueError(f"{name} is complex, or has a hook that changes gradients")
    if any(m._backward_hooks or m._backward_pre_hooks for m in model.modules()):
        raise ValueError("a module has a backward hook, as after extend")
    if any(getattr(m, "sparse", False) is True for m in model.modules()):
        raise ValueError("an embedding has sparse gradients: set its sparse to False")
    with WithoutGraph():
        model = copy.deepcopy(model).to(dtype)
    if X.is_floating_point():
        X = X.detach().clone().to(dtype).requires_grad_()

    def run(function):
        _ = torch.manual_seed(0)
        return function(copy.deepcopy(model), X.clone())

    result, default = {}, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            # A checkpoint can hide parameters: it warns here, or raises just below.
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            fs = run(lambda model, X: outputs(model, trainable(model), X))
            if X.requires_grad:
                autograd.grad(fs.sum(), X, allow_unused=True)
            if not fs.isfinite().all():
                raise ValueError("model(X) is not finite")
            expected = run(autograd_loop)
            for name, method in methods.items():
                try:
                    # the converter also writes a traceback there
                    with contextlib.redirect_stderr(io.StringIO()):
                        right = agree(run(method), expected)
                    result[name] = "right" if right else "wrong"
                except Exception as error:
                    text = re.sub(" at 0x[0-9a-f]+", "", str(error).partition("\n")[0])
                    result[name] = f"{type(error).__name__}: {text}"
    finally:
        torch.set_default_dtype(default)
    return result


# %%
# Put in your model and your ``X``. For each method the verdict is ``right``, ``wrong``,
# or the error and the first line of its text. It holds for this model: its sizes, its
# device, the dtype and the releases that are printed here.

model, X = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 2)), torch.rand(5, 6)
print(f"float64 on {X.device}, torch {torch.__version__.partition('+')[0]}")
for method, verdict in verdicts(model, X).items():
    print(f"{method}: {verdict}")

# %%
# The 105 cases
# -------------
# A case is a function that returns a fresh ``(model, X)``. Most are a first layer, the
# layer in question, and a linear layer, so that each method has to pass the layer in
# question. The forward pass that finds the last width also fills the running
# statistics of the norms. ``N`` and ``C`` differ from each width, and the widths from
# each other where the case allows it.

# fold: What the cases are made of


class Own(nn.Module):
    """A class of your own: named modules and parameters, and a forward function."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def stack(shape, *layers, N=5, C=2, words=0, mode="training"):
    """Return ``layers`` with a linear one at their end, and inputs ``[N, *shape]``."""
    X = torch.randint(words, (N, *shape)) if words else torch.rand(N, *shape)
    hidden = (model := nn.Sequential(*layers))(X)
    if hidden.ndim > 2:
        model.append(nn.Flatten())
    model.append(nn.Linear(hidden[0].numel(), C))
    return model.train(mode == "training"), X


def start(shape, first, *sizes):
    """Return ``stack`` with a first layer, by its class and sizes."""
    return lambda *layers, **options: stack(shape, first(*sizes), *layers, **options)


vectors = start([6], nn.Linear, 6, 8)
signals = start([3, 10], nn.Conv1d, 3, 8, 1)
images = start([3, 6, 7], nn.Conv2d, 3, 8, 1)
volumes = start([3, 4, 6, 7], nn.Conv3d, 3, 8, 1)
sequence = start([7, 6], nn.Linear, 6, 8)
words = partial(stack, [7], words=11)


def layer(make, kind, *args, mode="training", **options):
    """Return the case of one layer, by its class and arguments."""
    return lambda: make(kind(*args, **options), mode=mode)


def own(forward, kind=nn.Identity, *args, make=vectors, **options):
    """Return the case of an ``Own`` with one member ``a``, by class and arguments."""
    return lambda: make(Own(forward, a=kind(*args, **options)))


def recurrent(kind, **options):
    """Return the case of a recurrent layer, and of its outputs for all steps."""
    make = partial(kind, 8, 9, batch_first=True, **options)
    return lambda: sequence(make(), Own(lambda _, outputs: outputs[0]))


def weights(*shape):
    return nn.Parameter(torch.rand(*shape))


class Square(autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def symmetric():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return vectors(layer)


def zeros():
    layer = nn.Linear(8, 9)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return vectors(layer, nn.Dropout(0.3))


def frozen():
    model, X = vectors()
    model[0].weight.requires_grad_(False)
    return model, X


def tie(make, first, *between, last):
    last.weight = first.weight
    return make(first, *between, last)


def from_ones(m, x):
    state = torch.ones(1, len(x), 9, dtype=x.dtype)
    return m.a(x, (state, state))[0]


# %%
# The list: a name, and how to make the case.

# fold: The cases, in groups
linear = nn.Linear
conv2d, transposed = [images, nn.Conv2d, 8], [images, nn.ConvTranspose2d, 8, 12, 3]
embedding = [words, nn.Embedding, 11, 8]
tracked = [images, nn.InstanceNorm2d, 8, 1e-5, 0.1, True, True]
encoder = [sequence, nn.TransformerEncoderLayer, 8, 4, 9, 0.0]
activations = nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh
activations += nn.Sigmoid, nn.Hardtanh, nn.PReLU
groups = {}
groups["Activations"] = {new.__name__: layer(vectors, new) for new in activations} | {
    "ReLU(inplace=True)": layer(vectors, nn.ReLU, inplace=True),
    "Softmax": layer(vectors, nn.Softmax, 1),
    "LogSoftmax": layer(vectors, nn.LogSoftmax, 1),
}
groups["Functions"] = {
    "nested Sequential": lambda: vectors(nn.Sequential(nn.Tanh(), linear(8, 9))),
    "own class, a chain": lambda: vectors(
        Own(lambda m, x: m.b(m.a(x)), a=nn.Tanh(), b=linear(8, 9))
    ),
    "ModuleList": own(
        lambda m, x: m.a[1](m.a[0](x)), lambda: nn.ModuleList([nn.Tanh(), linear(8, 9)])
    ),
    "F.relu": own(lambda m, x: F.relu(x)),
    "F.linear": own(lambda m, x: F.linear(x, m.a.weight), linear, 8, 9, bias=False),
    "x @ parameter": own(lambda m, x: x @ m.a, weights, 8, 9),
    "x * parameter": own(lambda m, x: x * m.a, weights, 8),
    "torch.cdist": own(lambda m, x: torch.cdist(x, m.a), weights, 9, 8),
    "autograd.Function": own(lambda m, x: Square.apply(x)),
    "checkpoint": own(
        lambda m, x: checkpoint(m.a, x, use_reentrant=False), linear, 8, 9
    ),
    "Unflatten": lambda: vectors(nn.Unflatten(1, (2, 4)), linear(4, 9)),
    "square transpose": lambda: stack(
        [7, 6], linear(6, 7), Own(lambda m, x: x.mT), linear(7, 9)
    ),
}
groups["Skips, sharing"] = {
    "skip": own(lambda m, x: x + m.a(x), linear, 8, 8),
    "skip, in place": own(lambda m, x: m.a(x).add_(x), linear, 8, 8),
    "concatenation": own(lambda m, x: torch.cat([x, m.a(x)], 1), linear, 8, 9),
    "layer called twice": own(lambda m, x: m.a(m.a(x)), linear, 8, 8),
    "two Linear, one weight": lambda: tie(
        vectors, linear(8, 8), nn.Tanh(), last=linear(8, 8)
    ),
    "Embedding tied to Linear": lambda: tie(
        words, nn.Embedding(11, 8), last=linear(8, 11)
    ),
    "layer, and its weight": own(
        lambda m, x: F.linear(m.a(x), m.a.weight), linear, 8, 8
    ),
    "frozen parameter": frozen,
    "unused parameter": own(lambda m, x: x.sin(), linear, 8, 9),
}
groups["Convolutions"] = {
    "Conv1d": layer(signals, nn.Conv1d, 8, 9, 3),
    "Conv2d": layer(*conv2d, 9, 3),
    "Conv3d": layer(volumes, nn.Conv3d, 8, 9, 3),
    "kernel_size=1": layer(*conv2d, 9, 1),
    "bias=False": layer(*conv2d, 9, 3, bias=False),
    "stride=2": layer(*conv2d, 9, 3, stride=2),
    "dilation=2": layer(*conv2d, 9, 3, dilation=2),
    "groups=2": layer(*conv2d, 10, 3, groups=2),
    "depthwise": layer(*conv2d, 8, 3, groups=8),
    "padding=1": layer(*conv2d, 9, 3, padding=1),
    "padding='valid'": layer(*conv2d, 9, 3, padding="valid"),
    "padding='same'": layer(*conv2d, 9, 3, padding="same"),
    "circular padding": layer(*conv2d, 9, 3, padding=1, padding_mode="circular"),
    "reflect padding": layer(*conv2d, 9, 3, padding=1, padding_mode="reflect"),
    "replicate padding": layer(*conv2d, 9, 3, padding=1, padding_mode="replicate"),
    "ConvTranspose1d": layer(signals, nn.ConvTranspose1d, 8, 9, 3),
    "ConvTranspose2d": layer(*transposed),
    "ConvTranspose3d": layer(volumes, nn.ConvTranspose3d, 8, 9, 3),
    "transposed, stride=2, padding=1": layer(*transposed, stride=2, padding=1),
    "transposed, output_padding=1": layer(*transposed, stride=2, output_padding=1),
    "transposed, groups=2": layer(*transposed, groups=2),
    "transposed, dilation=2": layer(*transposed, dilation=2),
}
groups["Pooling"] = {
    "MaxPool2d": layer(images, nn.MaxPool2d, 2),
    "AvgPool2d": layer(images, nn.AvgPool2d, 2),
    "AvgPool2d, divisor": layer(images, nn.AvgPool2d, 2, divisor_override=3),
    "AdaptiveAvgPool2d": layer(images, nn.AdaptiveAvgPool2d, (3, 4)),
    "AdaptiveMaxPool2d": layer(images, nn.AdaptiveMaxPool2d, (3, 4)),
    "LPPool2d": layer(images, nn.LPPool2d, 2, 2),
    "Upsample": layer(images, nn.Upsample, scale_factor=2),
}
groups["Norms"] = {
    "BatchNorm1d, eval": layer(vectors, nn.BatchNorm1d, 8, mode="eval"),
    "BatchNorm1d, training": layer(vectors, nn.BatchNorm1d, 8),
    "BatchNorm2d, eval": layer(images, nn.BatchNorm2d, 8, mode="eval"),
    "BatchNorm2d, training": layer(images, nn.BatchNorm2d, 8),
    "BatchNorm3d, eval": layer(volumes, nn.BatchNorm3d, 8, mode="eval"),
    "BatchNorm3d, training": layer(volumes, nn.BatchNorm3d, 8),
    "BatchNorm2d, no statistics": layer(
        images, nn.BatchNorm2d, 8, track_running_stats=False, mode="eval"
    ),
    "InstanceNorm2d": layer(images, nn.InstanceNorm2d, 8, affine=True),
    "InstanceNorm2d, statistics, eval": layer(*tracked, mode="eval"),
    "InstanceNorm2d, statistics, training": layer(*tracked),
    "LayerNorm": layer(vectors, nn.LayerNorm, 8),
    "RMSNorm": layer(vectors, nn.RMSNorm, 8),
    "GroupNorm": layer(images, nn.GroupNorm, 4, 8),
    "LocalResponseNorm": layer(images, nn.LocalResponseNorm, 3),
}
groups["Sequences"] = {
    "Embedding": layer(*embedding),
    "Embedding, padding_idx": layer(*embedding, padding_idx=1),
    "Embedding, scale_grad_by_freq": layer(*embedding, scale_grad_by_freq=True),
    "Embedding, max_norm": layer(*embedding, max_norm=1.0),
    "EmbeddingBag": layer(words, nn.EmbeddingBag, 11, 8),
    "position embedding": own(
        lambda m, x: x + m.a(torch.arange(7)), nn.Embedding, 7, 8, make=sequence
    ),
    "Linear on a sequence": layer(sequence, linear, 8, 9),
    "mean over a sequence": own(lambda m, x: x.mean(1), make=sequence),
    "RNN": recurrent(nn.RNN),
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "RNN, batch in axis 1": own(
        lambda m, x: m.a(x.transpose(0, 1))[0].transpose(0, 1),
        nn.RNN,
        *(8, 9),
        make=sequence,
    ),
    "LSTM, bidirectional": recurrent(nn.LSTM, bidirectional=True),
    "LSTM, 2 layers": recurrent(nn.LSTM, num_layers=2),
    "LSTM, initial state": own(
        from_ones, nn.LSTM, 8, 9, batch_first=True, make=sequence
    ),
    "MultiheadAttention": own(
        lambda m, x: m.a(x, x, x)[0],
        nn.MultiheadAttention,
        *(8, 4),
        batch_first=True,
        make=sequence,
    ),
    "TransformerEncoderLayer, eval": layer(*encoder, batch_first=True, mode="eval"),
    "TransformerEncoderLayer, training": layer(*encoder, batch_first=True),
}
groups["Weights, mixing"] = {
    "Bilinear": own(lambda m, x: m.a(x, x.tanh()), nn.Bilinear, 8, 8, 9),
    "weight_norm": lambda: vectors(parametrizations.weight_norm(linear(8, 9))),
    "spectral_norm, eval": lambda: vectors(
        parametrizations.spectral_norm(linear(8, 9)), mode="eval"
    ),
    "orthogonal": lambda: vectors(parametrizations.orthogonal(linear(8, 9))),
    "symmetric weight": symmetric,
    "Dropout, eval": layer(vectors, nn.Dropout, 0.3, mode="eval"),
    "Dropout, training": layer(vectors, nn.Dropout, 0.3),
    "Dropout of zeros": zeros,
    "softmax over samples": layer(vectors, nn.Softmax, 0),
    "minus the mean of samples": own(lambda m, x: x - x.mean(0)),
}


def seeded(make):
    """Return a function that makes the case from a fixed seed, in double precision."""

    def case():
        with torch.random.fork_rng():
            _ = torch.manual_seed(0)
            model, X = make()
        return model.double(), X.double() if X.is_floating_point() else X

    return case


cases = {
    name: seeded(make) for group in groups.values() for name, make in group.items()
}

# %%
# Here all methods run on all cases, in double precision on the CPU.

# fold: Running and counting
results = {
    (name, method): verdict
    for name, case in cases.items()
    for method, verdict in verdicts(*case()).items()
}


def count(names, method):
    """Return how many verdicts are right, wrong, and errors."""
    found = [results[name, method] for name in names]
    right, wrong = found.count("right"), found.count("wrong")
    return right, wrong, len(found) - right - wrong


for method in methods:
    right, wrong, errors = count(cases, method)
    print(f"{method}: {right} right, {wrong} wrong, {errors} errors")

# %%
# Common layers
# -------------
# The verdicts for layers that most people ask about, in double precision: that of
# ``vmap(jacrev)``, and of BackPACK's ``BatchGrad`` and ``SqrtGGNExact``. An error may
# be a warning, after which a block is missing. BackPACK takes a ResNet, with skips and
# ``inplace=True``, after a conversion, unless a skip reads what was overwritten:
# ``trust/residual_networks.py``. An LSTM or RNN
# has one layer, one direction and no initial state here: ``trust/sequence_models.py``
# has its limits.

# fold: The names, and how they are printed
COMMON = [
    "Conv2d",
    "groups=2",
    "depthwise",
    "ConvTranspose2d",
    "MaxPool2d",
    "LayerNorm",
]
COMMON += ["AdaptiveAvgPool2d", "BatchNorm2d, eval", "GroupNorm", "Embedding", "GELU"]
COMMON += ["RNN", "LSTM", "GRU", "MultiheadAttention", "TransformerEncoderLayer, eval"]
COMMON += ["Dropout, eval", "F.relu", "skip", "layer called twice"]
shown = "vmap(jacrev)", "BatchGrad", "SqrtGGNExact"
for name in COMMON:
    found = [results[name, method] for method in shown]
    short = [word if word in ("right", "wrong") else "error" for word in found]
    title = f"Conv2d, {name}" if name in ("groups=2", "depthwise") else name
    print(f"{title}: vmap {short[0]}; BackPACK {short[1]}, {short[2]}")

# %%
# All verdicts in a picture
# -------------------------
# A row is a group of cases, a column is a method, and a bar is divided as the verdicts
# are. Where it is orange, the method is wrong without an error; the number says for how
# many of the cases, and a bar has room for it.

# fold: How the picture is drawn
COLORS = {"right": "#56B4E9", "wrong, no error": "#D55E00", "error": "0.85"}


def divided_bar(ax, left, row, counts):
    """Draw a bar that is divided as the counts are, with room for a number of wrong."""
    shares = [count / sum(counts) for count in counts]
    if counts[1]:
        shares[1] = max(shares[1], 0.35)
    for count, share, (label, color) in zip(counts, shares, COLORS.items()):
        part = 0.92 * share / sum(shares)
        _ = ax.barh(row, part, 0.84, left, color=color, label=label)
        if count and label.startswith("wrong"):
            ax.text(
                left + part / 2, row, count, weight="bold", ha="center", va="center"
            )
        left += part


fig, ax = plt.subplots(figsize=(5, 4.6), layout="constrained")
for row, names in enumerate(groups.values()):
    for column, method in enumerate(methods):
        divided_bar(ax, column, row, count(names, method))
rows = [f"{name} ({len(group)})" for name, group in groups.items()]
columns, places = list(methods), [column + 0.2 for column in range(len(methods))]
ax.set_yticks(range(len(rows)), rows)
ax.set_xticks(places, columns, rotation=50, ha="left")
ax.tick_params(length=0, labelbottom=False, labeltop=True)
ax.set(xlim=(-0.08, len(columns)), ylim=(len(rows) - 0.5, -0.5))
ax.spines[:].set_visible(False)
right, wrong, _ = count(cases, "vmap(jacrev)")
title = f"vmap(jacrev): {right} of {len(cases)} right, {wrong} wrong."
title += f"\nBatchGrad: {count(cases, 'BatchGrad')[1]} wrong"
fig.suptitle(title)
handles, labels = ax.get_legend_handles_labels()
fig.legend(handles[:3], labels[:3], loc="outside lower center", ncols=3)
plt.show()

# %%
# Other libraries on the same cases
# ---------------------------------
# What other libraries did on these cases is stored, not measured in this run: with
# torch 2.13.0, in double precision, with a relative tolerance of 1e-6. TorchJD's
# ``Engine`` was asked with ``batch_dim=None`` and ``batch_dim=0``, curvlinops for
# products ``J v``, opacus by its hooks. nngeometry has no result for three cases.

# fold: The stored counts
stored = {
    "TorchJD 0.18, no batch": (99, 3, 3),
    "TorchJD 0.18, batch": (79, 7, 19),
    "curvlinops 3.0.1": (94, 2, 9),
    "opacus 1.6": (69, 8, 28),
    "nngeometry 0.4": (46, 15, 41),
}
for library, (right, wrong, errors) in stored.items():
    print(f"Stored, {library}: {right} right, {wrong} wrong, {errors} errors")

# %%
# Wrong Jacobians without an error
# --------------------------------
# These are the cases to know: nothing raises, and the numbers are wrong.
#
# - If samples mix, ``fs[n, c]`` depends on a parameter through the other samples, too.
#   ``vmap`` gives each sample a batch of its own, and ``BatchGrad`` assigns to a sample
#   what comes back through it. Both lose a part. ``scale_grad_by_freq`` mixes them in
#   the backward pass: it divides by a count over the whole batch.
# - BackPACK keeps one result per parameter. If two layers or a function share the
#   parameter, a part of the sum is lost.
# - BackPACK's rules do not read every option: how a convolution pads, the divisor of a
#   pooling layer, the initial state of an LSTM. The rule for dropout takes each zero in
#   the output for a dropped value.
# - ``SqrtGGNExact`` finds its quantities by the address of a layer's output. A view of
#   the same address and shape, such as a square transpose after the converter, hides
#   that axes swap.
# - BackPACK's converter takes operations in place for others that are not. If a skip
#   reads what one overwrites, as in a block that starts with ``ReLU(inplace=True)``,
#   the converted model is another function. No case has this: the last lines test it.
# - ``jacrev`` is wrong for ``torch.cdist``, where ``is_grads_batched`` is right.

for method in methods:
    names = [name for name in cases if results[name, method] == "wrong"]
    print(f"{method}: {'; '.join(names) or 'none'}")

overwritten = own(lambda m, x: m.a(x) + x, nn.ReLU, inplace=True)
for method, verdict in verdicts(*seeded(overwritten)()).items():
    if verdict == "wrong":
        print(f"A skip reads what ReLU(inplace=True) overwrites: {method}, wrong")

# %%
# A method for each case
# ----------------------
# The order of ``methods`` is the order in which to try them: the last three send a
# cotangent ``[N, C]`` for each ``fs[n, c]``, which ``compute/choosing_a_method.py``
# measures. We print the first one that is right where ``vmap(jacrev)`` is not.

for method in list(methods)[1:]:
    names = []
    for name in cases:
        right = [m for m in methods if results[name, m] == "right"]
        names += [name] * (right[0] == method)
    print(f"{method}: {'; '.join(names) or 'none'}")

# %%
# Errors and the cases that raise them
# ------------------------------------
# The first line of each error, with the sizes of its first case, then who raises it.
# BackPACK needs rules: ``BatchGrad`` for each module with parameters of its own,
# ``SqrtGGNExact`` for each module on the way. The others need none, but ``vmap`` and
# ``jacrev`` refuse some operations, and ``is_grads_batched`` a parameter that no output
# depends on.

# fold: How the errors are grouped
errors = {}  # {text without sizes: (text, {case: methods})}
for (name, method), verdict in results.items():
    if verdict not in ("right", "wrong"):
        text = verdict.partition(" Module")[0]
        _, raisers = errors.setdefault(re.sub(r"\d+", "", text), (text, {}))
        raisers.setdefault(name, []).append(method)
for text, raisers in errors.values():
    print(textwrap.shorten(text, 120, placeholder=" ..."))
    for who in dict.fromkeys(map(tuple, raisers.values())):
        names = [name for name in raisers if tuple(raisers[name]) == who]
        print(f"  {' / '.join(who)}: {'; '.join(names)}")

# %%
# Sizes, values, precision and calls
# ----------------------------------
# A verdict depends on more than the kind of layer:
#
# - Sizes. ``vmap`` gets the shape of the derivative of ``PReLU`` wrong, which raises.
#   With ``N = C`` the wrong shape fits, and nothing raises. ``BatchGrad`` takes the
#   positions ``T`` of a position embedding for the batch: with ``T = N`` this fits.
# - Values. BackPACK's rule for dropout is right until a hidden value is zero.
# - The number of calls. The converter stops at a function that is called twice.
# - Precision and device. They choose the code that an ``nn.LSTM`` runs.


def prelu(N, C):
    return stack([6], nn.Linear(6, 8), nn.PReLU(), N=N, C=C)


def positions(N, T):
    add = Own(lambda m, x: x + m.a(torch.arange(T)), a=nn.Embedding(T, 8))
    return stack([T, 6], nn.Linear(6, 8), add, N=N)


def relu_twice():
    return vectors(Own(lambda m, x: torch.relu(torch.relu(x) - 0.1)))


for method, text, case in [
    ("vmap(jacrev)", "PReLU, N = 5, C = 2", prelu(5, 2)),
    ("vmap(jacrev)", "PReLU, N = 3, C = 3", prelu(3, 3)),
    ("BatchGrad", "position embedding, N = 5, T = 7", positions(5, 7)),
    ("BatchGrad", "position embedding, N = 5, T = 5", positions(5, 5)),
    ("BatchGrad, converted", "torch.relu, twice", relu_twice()),
]:
    print(f"{method}, {text}: {verdicts(*case)[method]}")
verdict = verdicts(*cases["LSTM"](), dtype=torch.float32)["vmap(jacrev)"]
print(f"vmap(jacrev), LSTM in float32: {verdict}")
# %%
# Models without a verdict
# ------------------------
# ``model(X)`` has to be one tensor ``[N, C]``: of a tuple or a dict, pick a tensor in a
# small class around your model. A hook on a parameter changes what autograd returns. A
# checkpoint with ``use_reentrant=True`` hides parameters from ``autograd.grad``. In
# each case ``verdicts`` raises.

pair = Own(lambda m, x: {"logits": m.a(x)}, a=nn.Linear(6, 2))
clipped = nn.Linear(6, 2)
_ = clipped.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
reentrant = Own(lambda m, x: checkpoint(m.a, x, use_reentrant=True), a=nn.Linear(6, 2))
for model in pair, clipped, reentrant:
    try:
        _ = verdicts(model, X)
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {str(error).partition('. ')[0]}")
    else:
        raise AssertionError("a model without a verdict got one")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Ask ``verdicts`` about your model, with ``N``, ``C`` and the widths all different.
# - Where no error is raised, the Jacobian can be wrong, above all where samples mix.
# - At sizes for which the loop is too slow, ``trust/check_a_jacobian.py``.
#
# Next: ``trust/silent_failures.py`` explains the wrong Jacobians. The alternative:
# ``scale/universal_jacobian.py`` computes the Jacobian of a model for which no fast
# method is right.
