"""
Layer support of each method
============================

After this page you can say which methods give the right Jacobian for the layers of your
model, which of them raise, and which return a wrong Jacobian without an error. One call
gives you the same verdicts for a model of your own.
"""

import contextlib
import copy
import io
import re
import textwrap
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # the models are tiny: a second thread only costs time

# %%
# Reference
# ---------
#
# The Jacobian has a block ``[N, C, *p.shape]`` for each parameter ``p`` that requires a
# gradient. The reference is a loop: one backward pass for each sample ``n`` and output
# ``c``. Every function on this page works on a copy and leaves your model as it is.


def outputs(model, X, params=None):
    """Return ``fs`` of shape ``[N, C]``, by default for the model's own parameters."""
    fs = functional_call(model, params, (X,)) if params else model(X)
    if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != len(X):
        got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
        raise ValueError(f"model(X) must be [N={len(X)}, C], but is {got}")
    return fs


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def reference(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from N * C backward passes."""
    model = copy.deepcopy(model)
    fs, params = outputs(model, X), trainable(model)
    options = {"retain_graph": True, "materialize_grads": True}  # zero if unused
    rows = [autograd.grad(f, params.values(), **options) for f in fs.flatten()]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


# %%
# Methods
# -------
#
# Each takes ``(model, X)`` and returns what the reference returns. BackPACK appears
# four times: ``extend`` can rewrite a model with its converter first, which unpacks
# your own classes and turns some functions, such as additions, into modules.


def grads_batched(model, X):
    model = copy.deepcopy(model)
    fs, params = outputs(model, X), trainable(model)
    E = torch.eye(fs.numel(), dtype=fs.dtype).unflatten(1, fs.shape)
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def functional(model, X):
    """Return a copy, as a function of its parameters and inputs, and the parameters."""
    model = copy.deepcopy(model)
    params = {name: p.detach() for name, p in trainable(model).items()}
    return lambda params, X: outputs(model, X, params), params


def functional_jacobian(model, X):
    f, params = functional(model, X)
    blocks = autograd.functional.jacobian(
        lambda *values: f(dict(zip(params, values)), X), tuple(params.values())
    )
    return dict(zip(params, blocks))


def jacrev_batch(model, X):
    f, params = functional(model, X)
    return jacrev(f)(params, X)


def vmap_jacrev(model, X):
    f, params = functional(model, X)
    return vmap(jacrev(lambda p, x: f(p, x[None])[0]), (None, 0))(params, X)


def extended(model, X, converter):
    """Return the outputs of an extended copy, its parameters, and what to derive by."""
    model, X = copy.deepcopy(model), X.detach().requires_grad_(X.is_floating_point())
    params = trainable(model)  # under their names before the converter
    fs = outputs(extend(model, use_converter=converter), X)
    return fs, params, [*params.values(), *([X] if X.requires_grad else [])]


def batch_grad(model, X, converter=False):
    fs, params, inputs = extended(model, X, converter)
    C = fs.shape[1]
    jacobian = {name: p.new_empty(*fs.shape, *p.shape) for name, p in params.items()}
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), inputs, retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch.reshape(len(X), *p.shape)
            del p.grad_batch
    return jacobian


def sqrt_ggn(model, X, converter=False):
    fs, params, inputs = extended(model, X, converter)
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, inputs)
    V = {name: p.sqrt_ggn_exact for name, p in params.items()}  # [C, N, *p.shape]
    return {name: v.transpose(0, 1) / 2**0.5 for name, v in V.items()}


methods = {
    "vmap(jacrev)": vmap_jacrev,
    "SqrtGGNExact": sqrt_ggn,
    "SqrtGGNExact + converter": partial(sqrt_ggn, converter=True),
    "BatchGrad": batch_grad,
    "BatchGrad + converter": partial(batch_grad, converter=True),
    "jacrev of the batch": jacrev_batch,
    "is_grads_batched": grads_batched,
    "functional.jacobian": functional_jacobian,
}

# %%
# Check of your own model
# -----------------------
#
# ``verdicts`` runs every method from the same random seed, on a copy in double
# precision, so that rounding cannot make a right method look wrong. The verdict is
# ``right``, ``wrong``, or the error and the first line of its text. Warnings are
# ignored: only the numbers count. To judge a model of your own, replace ``model`` and
# ``X`` below the function. Take a few samples, since the reference is slow, and take
# ``N``, ``C`` and the widths all different.


def verdicts(model, X):
    """Return ``{method: "right", "wrong" or the error}`` for ``model(X)`` ``[N, C]``.

    Raises ``ValueError`` if the output is not a tensor ``[N, C]``, or if no parameter
    requires a gradient. The model and the random state stay as they are.
    """
    if not trainable(model):
        raise ValueError("no parameter of the model requires a gradient")
    model = copy.deepcopy(model).double()
    X = X.double() if X.is_floating_point() else X
    result = {}
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        _ = torch.manual_seed(0)
        expected = reference(model, X)
        for name, method in methods.items():
            _ = torch.manual_seed(0)
            try:
                # an error in a converted model also writes a traceback there
                with contextlib.redirect_stderr(io.StringIO()):
                    jacobian = method(model, X)
            except Exception as error:
                line = re.sub(" at 0x[0-9a-f]+", "", str(error).partition("\n")[0])
                result[name] = f"{type(error).__name__}: {line}"
                continue
            try:
                assert_close(jacobian, expected)
                result[name] = "right"
            except AssertionError:
                result[name] = "wrong"
    return result


_ = torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 2))
X = torch.rand(5, 6)
for method, verdict in verdicts(model, X).items():
    print(f"{method}: {verdict}")

# %%
# Model cases
# -----------
#
# A case is a function that returns a fresh ``(model, X)``. Most are a first layer, the
# layer in question, and a linear layer, so that each method has to pass the layer in
# question. The forward pass that finds the last width also fills the running
# statistics of the norms. ``N`` and ``C`` differ from each width, and the widths from
# each other where the case allows it.


class Own(nn.Module):
    """A class of your own: named modules and parameters, and a forward function."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def net(shape, *layers, N=5, C=2, words=0, training=True):
    """Return ``layers`` with a linear one at their end, and inputs ``[N, *shape]``."""
    X = torch.randint(words, (N, *shape)) if words else torch.rand(N, *shape)
    hidden = (model := nn.Sequential(*layers))(X)
    if hidden.ndim > 2:
        model.append(nn.Flatten())
    model.append(nn.Linear(hidden[0].numel(), C))
    return model.train(training), X


def start(shape, first, *sizes):
    """Return ``net`` with a first layer, by its class and sizes."""
    return lambda *layers, **options: net(shape, first(*sizes), *layers, **options)


mlp = start([6], nn.Linear, 6, 8)
signals = start([3, 10], nn.Conv1d, 3, 8, 1)
images = start([3, 6, 7], nn.Conv2d, 3, 8, 1)
volumes = start([3, 4, 6, 7], nn.Conv3d, 3, 8, 1)
sequence = start([7, 6], nn.Linear, 6, 8)
words = partial(net, [7], words=11)


def after(make, layer, *args, **options):
    """Return the case of one layer, by its class and arguments."""
    return lambda: make(layer(*args, **options))


def own(function, make=mlp, **members):
    """Return the case of an ``Own`` whose members are ``(class, *arguments)``."""
    return lambda: make(
        Own(function, **{name: new(*args) for name, (new, *args) in members.items()})
    )


def weights(*shape):
    return nn.Parameter(torch.rand(*shape))


def tied(make, first, between, second):
    second.weight = first.weight
    return make(first, *between, second)


def frozen():
    model, X = mlp()
    model[0].weight.requires_grad_(False)
    return model, X


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
    return mlp(layer)


def zeros():
    layer = nn.Linear(8, 9)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return mlp(layer, nn.Dropout(0.3))


def recurrent(layer, **options):
    def first(_, outputs):
        return outputs[0]  # of all steps

    return lambda: sequence(batched(layer)(8, 9, **options), Own(first))


def from_ones(m, x):
    state = torch.ones(1, len(x), 9)
    return m.lstm(x, (state, state))[0]


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 4, 9, dropout=0, batch_first=True)
    return sequence(layer, **options)


def evaluated(make, layer):
    """Return the case of a layer in eval mode."""
    return lambda: make(layer(), training=False)


def modes(make, layer, *args):
    """Return the cases of a layer in eval and in training mode."""
    return {
        f"{layer.__name__}, eval": evaluated(make, partial(layer, *args)),
        f"{layer.__name__}, training": after(make, layer, *args),
    }


batched = partial(partial, batch_first=True)
statistics = partial(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True)
conv = partial(after, images, nn.Conv2d, 8)
transposed = partial(after, images, nn.ConvTranspose2d, 8, 12, 3)
embedding = partial(after, words, nn.Embedding, 11, 8)
linear = nn.Linear

# %%
# The list: a name, and how to make the case.

groups = {
    "Activations": {
        **{
            layer.__name__: after(mlp, layer)
            for layer in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)
            + (nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.PReLU)
        },
        "ReLU(inplace=True)": after(mlp, nn.ReLU, inplace=True),
        "Softmax": after(mlp, nn.Softmax, 1),
        "LogSoftmax": after(mlp, nn.LogSoftmax, 1),
    },
    "Containers and functions": {
        "nested Sequential": lambda: mlp(nn.Sequential(nn.Tanh(), linear(8, 9))),
        "own class, a chain": own(
            lambda m, x: m.b(m.a(x)), a=(nn.Tanh,), b=(linear, 8, 9)
        ),
        "ModuleList": own(
            lambda m, x: m.a[1](m.a[0](x)),
            a=(lambda: nn.ModuleList([nn.Tanh(), linear(8, 9)]),),
        ),
        "F.relu": own(lambda m, x: F.relu(x)),
        "F.linear": own(lambda m, x: F.linear(x, m.a.weight), a=(linear, 8, 9, False)),
        "x @ parameter": own(lambda m, x: x @ m.a, a=(weights, 8, 9)),
        "x * parameter": own(lambda m, x: x * m.a, a=(weights, 8)),
        "torch.cdist": own(lambda m, x: torch.cdist(x, m.a), a=(weights, 9, 8)),
        "autograd.Function": own(lambda m, x: Square.apply(x)),
        "checkpoint": own(
            lambda m, x: checkpoint(m.a, x, use_reentrant=False), a=(linear, 8, 9)
        ),
        "Unflatten": lambda: mlp(nn.Unflatten(1, (2, 4)), linear(4, 9)),
        "square transpose": lambda: net(
            [7, 6], linear(6, 7), Own(lambda m, x: x.mT), linear(7, 9)
        ),
    },
    "Skips and shared weights": {
        "skip": own(lambda m, x: x + m.a(x), a=(linear, 8, 8)),
        "skip, in place": own(lambda m, x: m.a(x).add_(x), a=(linear, 8, 8)),
        "concatenation": own(lambda m, x: torch.cat([x, m.a(x)], 1), a=(linear, 8, 9)),
        "layer called twice": own(lambda m, x: m.a(m.a(x)), a=(linear, 8, 8)),
        "two Linear, one weight": lambda: tied(
            mlp, linear(8, 8), [nn.Tanh()], linear(8, 8)
        ),
        "Embedding tied to Linear": lambda: tied(
            words, nn.Embedding(11, 8), [], linear(8, 11)
        ),
        "layer, and its weight": own(
            lambda m, x: F.linear(m.a(x), m.a.weight), a=(linear, 8, 8)
        ),
        "frozen parameter": frozen,
        "unused parameter": own(lambda m, x: x.sin(), a=(linear, 8, 9)),
    },
    "Convolutions": {
        "Conv1d": after(signals, nn.Conv1d, 8, 9, 3),
        "Conv2d": conv(9, 3),
        "Conv3d": after(volumes, nn.Conv3d, 8, 9, 3),
        "kernel_size=1": conv(9, 1),
        "bias=False": conv(9, 3, bias=False),
        "stride=2": conv(9, 3, stride=2),
        "dilation=2": conv(9, 3, dilation=2),
        "groups=2": conv(10, 3, groups=2),
        "depthwise": conv(8, 3, groups=8),
        "padding=1": conv(9, 3, padding=1),
        "padding='valid'": conv(9, 3, padding="valid"),
        "padding='same'": conv(9, 3, padding="same"),
        "circular padding": conv(9, 3, padding=1, padding_mode="circular"),
        "reflect padding": conv(9, 3, padding=1, padding_mode="reflect"),
        "replicate padding": conv(9, 3, padding=1, padding_mode="replicate"),
        "ConvTranspose1d": after(signals, nn.ConvTranspose1d, 8, 9, 3),
        "ConvTranspose2d": transposed(),
        "ConvTranspose3d": after(volumes, nn.ConvTranspose3d, 8, 9, 3),
        "transposed, stride=2, padding=1": transposed(stride=2, padding=1),
        "transposed, output_padding=1": transposed(stride=2, output_padding=1),
        "transposed, groups=2": transposed(groups=2),
        "transposed, dilation=2": transposed(dilation=2),
    },
    "Pooling": {
        "MaxPool2d": after(images, nn.MaxPool2d, 2),
        "AvgPool2d": after(images, nn.AvgPool2d, 2),
        "AvgPool2d, divisor": after(images, nn.AvgPool2d, 2, divisor_override=3),
        "AdaptiveAvgPool2d": after(images, nn.AdaptiveAvgPool2d, (3, 4)),
        "AdaptiveMaxPool2d": after(images, nn.AdaptiveMaxPool2d, (3, 4)),
        "LPPool2d": after(images, nn.LPPool2d, 2, 2),
        "Upsample": after(images, nn.Upsample, scale_factor=2),
    },
    "Norms": {
        **modes(mlp, nn.BatchNorm1d, 8),
        **modes(images, nn.BatchNorm2d, 8),
        **modes(volumes, nn.BatchNorm3d, 8),
        "BatchNorm2d, no statistics": evaluated(
            images, lambda: nn.BatchNorm2d(8, track_running_stats=False)
        ),
        "InstanceNorm2d": after(images, nn.InstanceNorm2d, 8, affine=True),
        "InstanceNorm2d, statistics, eval": evaluated(images, statistics),
        "InstanceNorm2d, statistics, training": after(images, statistics),
        "LayerNorm": after(mlp, nn.LayerNorm, 8),
        "RMSNorm": after(mlp, nn.RMSNorm, 8),
        "GroupNorm": after(images, nn.GroupNorm, 4, 8),
        "LocalResponseNorm": after(images, nn.LocalResponseNorm, 3),
    },
    "Embeddings and sequences": {
        "Embedding": embedding(),
        "Embedding, padding_idx": embedding(padding_idx=1),
        "Embedding, scale_grad_by_freq": embedding(scale_grad_by_freq=True),
        "Embedding, max_norm": embedding(max_norm=1.0),
        "EmbeddingBag": after(words, nn.EmbeddingBag, 11, 8),
        "position embedding": own(
            lambda m, x: x + m.a(torch.arange(7)), sequence, a=(nn.Embedding, 7, 8)
        ),
        "Linear on a sequence": after(sequence, linear, 8, 9),
        "mean over a sequence": own(lambda m, x: x.mean(1), sequence),
        "RNN": recurrent(nn.RNN),
        "LSTM": recurrent(nn.LSTM),
        "GRU": recurrent(nn.GRU),
        "RNN, batch in axis 1": own(
            lambda m, x: m.a(x.transpose(0, 1))[0].transpose(0, 1),
            sequence,
            a=(nn.RNN, 8, 9),
        ),
        "LSTM, bidirectional": recurrent(nn.LSTM, bidirectional=True),
        "LSTM, 2 layers": recurrent(nn.LSTM, num_layers=2),
        "LSTM, initial state": own(from_ones, sequence, lstm=(batched(nn.LSTM), 8, 9)),
        "MultiheadAttention": own(
            lambda m, x: m.a(x, x, x)[0],
            sequence,
            a=(batched(nn.MultiheadAttention), 8, 4),
        ),
        "TransformerEncoderLayer, eval": lambda: encoder(training=False),
        "TransformerEncoderLayer, training": encoder,
    },
    "Weights, dropout, mixing": {
        "Bilinear": own(lambda m, x: m.a(x, x.tanh()), a=(nn.Bilinear, 8, 8, 9)),
        "weight_norm": lambda: mlp(parametrizations.weight_norm(linear(8, 9))),
        "spectral_norm, eval": evaluated(
            mlp, lambda: parametrizations.spectral_norm(linear(8, 9))
        ),
        "orthogonal": lambda: mlp(parametrizations.orthogonal(linear(8, 9))),
        "symmetric weight": symmetric,
        **modes(mlp, nn.Dropout, 0.3),
        "Dropout of zeros": zeros,
        "softmax over samples": after(mlp, nn.Softmax, 0),
        "minus the mean of samples": own(lambda m, x: x - x.mean(0)),
    },
}


def seeded(make):
    """Return a function that makes the case from a fixed seed, in double precision."""

    def case():
        with torch.random.fork_rng():
            _ = torch.manual_seed(0)
            model, X = make()
        return model.double(), X.double() if X.is_floating_point() else X

    return case


cases = {name: seeded(make) for rows in groups.values() for name, make in rows.items()}
results = {
    (name, method): verdict
    for name, case in cases.items()
    for method, verdict in verdicts(*case()).items()
}


def kind(verdict):
    return verdict if verdict in ("right", "wrong") else "raises"


print(f"{len(cases)} cases, {len(results)} verdicts")
for method in methods:
    kinds = [kind(results[name, method]) for name in cases]
    counts = (f"{kinds.count(k)} {k}" for k in ("right", "wrong", "raises"))
    print(f"{method}: {', '.join(counts)}")

# %%
# Wrong Jacobians without an error
# --------------------------------
#
# These are the cases to know: nothing raises, and the numbers are wrong. Should a new
# release change one of them, this page stops here and names it.
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
# - ``jacrev`` is wrong for ``torch.cdist``, where ``is_grads_batched`` is right.

tied_weights = {"two Linear, one weight", "Embedding tied to Linear"}
paddings = {"circular padding", "reflect padding", "replicate padding"}
mixed = {"softmax over samples", "minus the mean of samples"}
norms = {f"BatchNorm{d}d, training" for d in (1, 2, 3)}
one_pass = tied_weights | paddings | {"AvgPool2d, divisor", "Dropout of zeros"}
passes = tied_weights | paddings | {"layer, and its weight", "padding='same'"}
known = {
    "vmap(jacrev)": mixed
    | {"BatchNorm2d, no statistics", "Embedding, scale_grad_by_freq", "torch.cdist"},
    "SqrtGGNExact": one_pass,
    "SqrtGGNExact + converter": one_pass | {"square transpose"},
    "BatchGrad": passes | mixed | norms | {"LSTM, initial state"},
    "BatchGrad + converter": passes | mixed | norms,
    "jacrev of the batch": {"torch.cdist"},
}
wrong = {pair for pair, verdict in results.items() if verdict == "wrong"}
changed = wrong ^ {(name, method) for method in known for name in known[method]}
assert not changed, f"wrong before or now, but not both: {sorted(changed)}"
for method in methods:
    names = [name for name in cases if (name, method) in wrong]
    print(f"{method}: {'; '.join(names) or 'none'}")

# %%
# All verdicts in a picture
# -------------------------
#
# A row is a case, a column is a method. Look for the large orange crosses: there a
# method is wrong without an error. A gray line is an error, a blue dot is right.

STYLES = {
    "right": {"marker": "o", "color": "#56B4E9", "s": 40},
    "wrong": {"marker": "X", "color": "#D55E00", "s": 110},
    "raises": {"marker": "_", "color": "0.4", "s": 60, "linewidth": 2},
}
plt.rcParams["font.size"] = 11


def picture(*titles):
    """Draw the verdicts of some groups of cases."""
    heights = [len(groups[title]) for title in titles]
    fig, axes = plt.subplots(
        len(titles),
        figsize=(5.5, 0.22 * sum(heights) + 0.4 * len(titles) + 2.6),
        height_ratios=heights,
        layout="constrained",
    )
    for ax, title in zip(axes, titles):
        rows = list(groups[title])
        kinds = [[kind(results[name, method]) for method in methods] for name in rows]
        for verdict, style in STYLES.items():
            y, x = np.nonzero(np.array(kinds) == verdict)
            ax.scatter(x, y, label=verdict, zorder=2, **style)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(title=title, ylim=(len(rows) - 0.5, -0.5), xlim=(-0.5, 7.5))
        ax.set_xticks(range(len(methods)), methods, rotation=90)
        ax.grid(color="0.9")
        ax.tick_params(length=0, labelbottom=False, labeltop=ax is axes[0])
    fig.suptitle("Right, wrong, or an error, for each method")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    plt.show()


picture("Activations", "Containers and functions", "Skips and shared weights")

# %%
# Convolutions and pooling:

picture("Convolutions", "Pooling")

# %%
# Norms, embeddings, recurrent layers and attention:

picture("Norms", "Embeddings and sequences", "Weights, dropout, mixing")

# %%
# Errors and the cases that raise them
# ------------------------------------
#
# The first line of each error, then who raises it. Sizes are those of the first case,
# and of more than 10 cases we name 3. BackPACK needs rules: ``BatchGrad`` for each
# module with parameters of its own, ``SqrtGGNExact`` for each module on the way. The
# others need none, but ``vmap`` and ``jacrev`` refuse some operations, and
# ``is_grads_batched`` a parameter that no output depends on.

errors = {}
for (name, method), verdict in results.items():
    if kind(verdict) == "raises":
        text = verdict.partition(" Module")[0]
        key = re.sub(r"\d+", "", text)  # sizes differ from case to case
        _, raisers = errors.setdefault(key, (text, {}))
        raisers.setdefault(name, []).append(method)
for text, raisers in errors.values():
    print(textwrap.shorten(text, 120, placeholder=" ..."))
    for who in dict.fromkeys(map(tuple, raisers.values())):
        names = [name for name in raisers if tuple(raisers[name]) == who]
        if len(names) > 10:
            names[3:] = [f"{len(names) - 3} more"]
        print(f"  {' / '.join(who)}: {'; '.join(names)}")

# %%
# A method for each case
# ----------------------
#
# The order of ``methods`` is the order in which to try them: the last three send a
# cotangent ``[N, C]`` for each ``fs[n, c]``, which ``compute/choosing_a_method.py``
# measures. We print the first one that is right where ``vmap(jacrev)`` is not. A
# verdict holds for the model of its case: compare ``Dropout, training`` with ``Dropout
# of zeros``, where ``SqrtGGNExact`` is wrong.

first = {
    name: next(method for method in methods if results[name, method] == "right")
    for name in cases
}
for method in list(methods)[1:]:
    names = [name for name in cases if first[name] == method]
    print(f"{method}: {'; '.join(names) or 'none'}")

# %%
# Equal sizes
# -----------
#
# With sizes that differ, some mistakes raise because shapes do not match. With equal
# sizes they do not raise, and the result is wrong. Here ``T`` is the length of a
# sequence, and the position embedding has no batch axis: ``BatchGrad`` takes axis ``T``
# for the batch. The ``reshape`` in ``batch_grad`` raises if ``T`` is not ``N``.


def positions(N, T):
    add = Own(lambda m, x: x + m.a(torch.arange(T)), a=nn.Embedding(T, 8))
    return net([T, 6], nn.Linear(6, 8), add, N=N)


def prelu(N, C):
    return net([6], nn.Linear(6, 8), nn.PReLU(), N=N, C=C)


equal = {
    ("vmap(jacrev)", "PReLU"): (prelu, "N C", [(5, 2), (3, 3)]),
    ("BatchGrad", "position embedding"): (positions, "N T", [(5, 7), (5, 5)]),
}
for (method, title), (make, letters, sizes) in equal.items():
    for pair in sizes:
        verdict = verdicts(*make(*pair))[method]
        text = ", ".join(f"{k} = {n}" for k, n in zip(letters.split(), pair))
        print(f"{method}, {title}, {text}: {textwrap.shorten(verdict, 90)}")
        expected = "raises" if pair == sizes[0] else "wrong"
        assert kind(verdict) == expected, f"{title}, {text}: {verdict} now"
torch.set_num_threads(threads)

# %%
# Where to go next
# ----------------
#
# Next: ``trust/silent_failures.py`` explains the wrong Jacobians, and checks one with a
# single backward pass. The alternative: ``scale/universal_jacobian.py`` computes the
# Jacobian of a model for which no fast method is right.
