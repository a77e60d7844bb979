"""
LSTM, GRU and transformer
=========================

After this page you can compute the Jacobian of a recurrent network or a transformer,
with an output for each token: sample by sample, which takes any of them, or batched,
where it can be. You also know the errors on the way, and see which outputs depend on
which tokens.
"""

# fold: Imports
import copy
import warnings
from itertools import product

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more threads only disturb networks this small
_ = torch.manual_seed(0)

# %%
# Outputs for each token
# ----------------------
# ``X`` holds ``N`` sequences of ``T`` tokens, integers of shape ``[N, T]``. The model
# returns ``C`` numbers for each token: ``fs`` has shape ``[N, T, C]``, and the Jacobian
# of a parameter ``[N, T, C, *p.shape]``. With tokens already embedded, ``X`` is ``[N,
# T, D]``, and nothing else changes. One logit alone, or a mask as a second input, is in
# ``compute/models_and_outputs.py``.

N, T, C = 6, 5, 3
vocabulary, D, H = 11, 8, 7
X = torch.randint(1, vocabulary, (N, T))

# %%

# fold: A recurrent network


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.rnn = kind(D, H, **{"batch_first": True} | options)
        self.head = nn.Linear(H * (1 + self.rnn.bidirectional), C)

    def forward(self, X):
        return self.head(self.rnn(self.embed(X))[0])


# %%
# One sample at a time
# --------------------
# ``autograd.grad`` with ``is_grads_batched=True`` makes the backward passes for all
# outputs at once. For the whole batch it would send a cotangent for each of the ``N * T
# * C`` outputs through all ``N`` samples, and only one sample matters for each. So we
# take one sample after the other. That needs no rule for any layer.


def grads_batched(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one batched backward pass."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)  # [N * C, N, C]
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def sample_loop_jacobian(model, X):
    """Return ``{name: [*fs.shape, *p.shape]}`` from a batched pass per sample.

    ``X`` is a tensor ``[N, ...]``, and so is ``fs = model(X)``. Raises ``ValueError``
    if the outputs of a sample, or a gradient, change with the batch that it is in, or
    if a gradient is sparse.
    """
    together, alone = model(X.clone()), [model(x) for x in X.clone().split(1)]
    near = torch.finfo(together.dtype).eps ** 0.5
    if not torch.allclose(torch.cat(alone), together, near, near, equal_nan=True):
        raise ValueError("model(X[n:n+1]) is not model(X)[n:n+1]: mixed or random")
    if any(getattr(module, "scale_grad_by_freq", False) for module in model.modules()):
        raise ValueError("scale_grad_by_freq divides a gradient by counts in the batch")
    if any(getattr(module, "sparse", False) is True for module in model.modules()):
        raise ValueError("an embedding has sparse gradients: set its sparse to False")
    rows = [grads_batched(model, x) for x in X.clone().split(1)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


lstm = Recurrent()
J_lstm = sample_loop_jacobian(lstm, X)
for name, J in J_lstm.items():
    print(f"{name}: {list(J.shape)}")

# %%
# The reference is a loop of one backward pass for each output.

# fold: The reference, and how errors are printed


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def print_error(text, function, *args):
    """Print the error of a call, or a warning as one. Raises if there is none."""
    try:
        with warnings.catch_warnings(action="error"):
            # Tokens require no gradient: harmless.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            function(*args)
    except Exception as error:
        line = str(error).splitlines()[0].split(". ")[0]
        print(f"{text}: {type(error).__name__}: {line}")
        return
    raise AssertionError(f"{text}: no error any more")


# %%
# The same function takes all of these. ``nn.LSTM`` takes time first by default: a model
# that forgets ``batch_first`` runs, and mixes the samples as if they were steps in
# time. The function notices.

options = {"num_layers": 2, "bidirectional": True}
for kind in nn.LSTM, nn.GRU, nn.RNN:
    model = Recurrent(kind, **options)
    assert_close(sample_loop_jacobian(model, X), autograd_loop(model, X))
    print(f"{kind.__name__}, two layers and directions: agrees with the loop.")
print_error("time first", sample_loop_jacobian, Recurrent(batch_first=False), X)

# %%
# Transformer
# -----------
# The encoder has attention, ``LayerNorm`` and dropout, and we add a parameter for the
# positions. Token 0 is padding: other tokens must not see it. In training mode dropout
# is random, and each call has another Jacobian: take ``eval()``.


class Encoder(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.position = nn.Parameter(torch.randn(T, D))
        layer = nn.TransformerEncoderLayer(D, 2, 10, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(D, C)
        self.mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None

    def forward(self, X):
        masks = {"mask": self.mask, "src_key_padding_mask": X == 0}
        return self.head(self.encoder(self.embed(X) + self.position, **masks))


padding = torch.arange(T) >= torch.tensor([5, 3, 4, 2, 5, 1])[:, None]  # by lengths
Z = X.masked_fill(padding, 0)
transformer = Encoder()
print_error("training mode", sample_loop_jacobian, transformer, Z)
_ = transformer.eval()
J_transformer = autograd_loop(transformer, Z)
assert_close(sample_loop_jacobian(transformer, Z), J_transformer)
print("transformer, eval mode: agrees with the loop.")

# %%
# Padding
# -------
# The outputs at the padding are numbers without a meaning. Without gradients the
# encoder takes a fast path, and there they are other numbers. At the tokens both agree,
# and there no output depends on the embedding of the padding. So index the Jacobian
# with ``~padding`` before you use it.

slow = transformer(Z)
with torch.no_grad(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in proto")
    fast = transformer(Z)
assert_close(fast[~padding], slow[~padding])
by_padding = J_transformer["embed.weight"][~padding][:, :, 0]
assert_close(by_padding, torch.zeros_like(by_padding), rtol=0, atol=0)
print(f"The outputs agree at {len(by_padding)} of {N * T} tokens, and at the padding")
print(f"they differ by up to {(fast - slow)[padding].abs().max():.2g}.")

# %%
# LSTM, GRU and RNN under vmap
# ----------------------------
# ``vmap_jacrev`` computes all samples side by side. Whether ``vmap`` can take a
# recurrent layer depends on the code that PyTorch runs for it: on the dtype, the device
# and the release. We print what we find here.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def vmap_works(model, X):
    try:
        with warnings.catch_warnings(action="ignore"):
            J = vmap_jacrev(model, X)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    assert_close(J, sample_loop_jacobian(model, X))
    return "agrees with one sample at a time"


print(f"torch {torch.__version__.partition('+')[0]} on {X.device}")
for kind, dtype in product((nn.LSTM, nn.GRU, nn.RNN), (torch.float32, torch.float64)):
    print(f"{kind.__name__}, {dtype}: {vmap_works(Recurrent(kind).to(dtype), X)}")
print_error("LSTM, forward", vmap(lstm), X)
print_error("GRU, forward", vmap(Recurrent(nn.GRU)), X)

# %%
# Written out with operations that are not in place, an LSTM or a GRU works in each
# dtype, with all samples side by side. It inherits the parameters, so it loads the
# state of the other, and the Jacobian has the same names.

# fold: UnrolledLSTM and UnrolledGRU


class UnrolledLSTM(nn.LSTM):
    """An ``nn.LSTM`` that ``vmap`` can take: one layer and direction, batch first."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.num_layers > 1 or self.bidirectional or self.proj_size:
            raise ValueError("UnrolledLSTM has one layer, one direction, no projection")
        if not self.batch_first or not self.bias:
            raise ValueError("UnrolledLSTM needs batch_first=True and bias=True")

    def forward(self, X, state=None):
        zeros = X.new_zeros(1, len(X), self.hidden_size)
        h, c = (part[0] for part in state or (zeros, zeros))
        outputs = []
        for x in X.unbind(1):
            gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
            gates = gates + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])


class UnrolledGRU(nn.GRU):
    """An ``nn.GRU`` that ``vmap`` can take: one layer and direction, batch first."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.num_layers > 1 or self.bidirectional:
            raise ValueError("UnrolledGRU has one layer and one direction")
        if not self.batch_first or not self.bias:
            raise ValueError("UnrolledGRU needs batch_first=True and bias=True")

    def forward(self, X, state=None):
        h = X.new_zeros(len(X), self.hidden_size) if state is None else state[0]
        outputs = []
        for x in X.unbind(1):
            of_x = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
            of_h = F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.chunk(3, 1), of_h.chunk(3, 1)
            r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + r * n_h).tanh() + z * h
            outputs.append(h)
        return torch.stack(outputs, 1), h[None]


# %%
# The same parameters, another forward pass:

for layer, kind in (nn.LSTM, UnrolledLSTM), (nn.GRU, UnrolledGRU):
    plain, unrolled = Recurrent(layer), Recurrent(kind)
    _ = unrolled.load_state_dict(plain.state_dict())
    assert_close(unrolled(X), plain(X))
    assert_close(vmap_jacrev(unrolled, X), sample_loop_jacobian(plain, X))
    print(f"vmap(jacrev) of the {layer.__name__} that is written out agrees.")

# %%
# Fast path of the encoder under vmap
# -----------------------------------
# With padding in eval mode, the encoder takes the fast path under ``vmap``, which has
# no rule for it. Turn it off. Then ``vmap_jacrev`` is right, and PyTorch warns that it
# runs the attention in a loop. ``sdpa_kernel`` with ``MATH`` takes the attention that
# is written in plain operations. ``vmap`` refuses dropout in training mode.

print_error("fast path", vmap_jacrev, transformer, Z)
torch.backends.mha.set_fastpath_enabled(False)
print_error("no fast path", vmap_jacrev, transformer, Z)
with sdpa_kernel(SDPBackend.MATH):
    assert_close(vmap_jacrev(transformer, Z), J_transformer)
    print_error("training, vmap", vmap_jacrev, copy.deepcopy(transformer).train(), Z)
torch.backends.mha.set_fastpath_enabled(True)
print("vmap(jacrev) with plain attention agrees with the loop.")

# %%
# Dependence of outputs on tokens
# -------------------------------
# Row ``t``, column ``s`` shows the derivative of the outputs of token ``t`` with
# respect to the embedding of token ``s``: its norm, averaged over the samples. Each map
# is divided by its own maximum. What is exactly zero is gray and holds a ``0``. An LSTM
# reads from left to right, a transformer reads everything, and one with a causal mask
# does not look ahead.


def token_influence(model, X, embed="embed"):
    """Return ``[T, T]``: the norm of the derivative of output ``t`` by embedding ``s``.

    ``X`` has shape ``[N, T]``, the submodule named ``embed`` returns ``[N, T, D]``, and
    ``model(X)`` has shape ``[N, T, C]``. Samples must not mix.
    """
    E = model.get_submodule(embed)(X).detach().requires_grad_()
    handle = model.get_submodule(embed).register_forward_hook(lambda *_: E)
    try:
        fs = model(X)
    finally:
        handle.remove()
    if fs.ndim != 3 or fs.shape[:2] != X.shape:
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not {[*X.shape, 'C']}")
    summed = fs.sum(0)  # [T, C]: each row of E belongs to one sample
    V = torch.eye(summed.numel()).to(fs).unflatten(1, summed.shape)
    (J,) = autograd.grad(summed, E, V, is_grads_batched=True)  # [T * C, N, T, D]
    return J.unflatten(0, summed.shape).movedim(2, 0).norm(dim=(2, 4)).mean(0)


models = {"LSTM": lstm, "transformer": transformer}
models["causal transformer"] = Encoder(causal=True).eval()
maps = {name: token_influence(model, X) for name, model in models.items()}
ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
for name, values in maps.items():
    zeros = torch.zeros(T, T, dtype=torch.bool) if name == "transformer" else ahead
    assert_close(values == 0, zeros)
    print(f"{name}: {int(zeros.sum())} of {T * T} pairs are exactly zero.")

# %%
# The three maps side by side.

# fold: The picture
fig, axes = plt.subplots(1, 3, figsize=(5, 3.4), sharey=True, layout="constrained")
count = int((maps["LSTM"] == 0).sum())
fig.suptitle(
    f"Outputs by tokens:\n{count} of {T * T} pairs of an LSTM are exactly zero"
)
colors = plt.get_cmap("cividis").with_extremes(bad="0.85")
for ax, (name, values) in zip(axes, maps.items()):
    nonzero = (values / values.max()).where(values != 0, torch.nan).numpy()
    image = ax.imshow(nonzero, cmap=colors, vmin=0, vmax=1)
    for t, s in (values == 0).nonzero().tolist():
        ax.text(s, t, "0", ha="center", va="center")
    ax.set_title(name.replace(" ", "\n"), fontsize=10, loc="left")
    ax.set(xlabel="token s", xticks=range(T), yticks=range(T))
axes[0].set_ylabel("output of token t")
label = "norm of the derivative / maximum of each map"
fig.colorbar(image, ax=axes, label=label, location="bottom", aspect=40)
plt.show()

# %%
# LSTM and RNN in BackPACK
# ------------------------
# ``batch_grad`` takes a backward pass for each of ``K`` outputs ``[N, K]``: end the
# model in ``nn.Flatten()``. We extend the layers, not the class that holds them, or
# BackPACK warns about a class without rules. Tokens require no gradient, so PyTorch
# warns ``Full backward hook is firing``: here this is harmless.

# fold: The functions of batched_jacobians.py, and extend_leaves


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


def extend_leaves(model):
    """Return a copy of ``model`` with extended layers, but not the classes of them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not list(module.children()):
            extend(module)
    return model


# %%
# An LSTM and an RNN:

warnings.filterwarnings("ignore", "Full backward hook is firing")
for kind in nn.LSTM, nn.RNN:
    flat = nn.Sequential(Recurrent(kind), nn.Flatten())
    assert_close(batch_grad(extend_leaves(flat), X), autograd_loop(flat, X))
    print(f"BatchGrad, {kind.__name__}: agrees with the loop.")

# %%
# The limits: one layer, one direction, the batch first, no ``padding_idx``, no GRU, no
# final state, no output for each token. ``SqrtGGNExact`` has no rule for recurrent
# layers.


class Final(Recurrent):
    def forward(self, X):
        return self.head(self.rnn(self.embed(X))[1][0][0])


padded = Recurrent()
padded.embed.padding_idx = 0
limits = {
    "two layers": Recurrent(num_layers=2),
    "two directions": Recurrent(bidirectional=True),
    "time first": Recurrent(batch_first=False),
    "padding_idx": padded,
    "GRU": Recurrent(nn.GRU),
    "final state": Final(),
}
for text, model in limits.items():
    flat = extend_leaves(nn.Sequential(model, nn.Flatten()))
    print_error(f"BatchGrad, {text}", batch_grad, flat, X)
print_error("BatchGrad, [N, T, C]", batch_grad, extend_leaves(lstm), X)
flat = extend_leaves(nn.Sequential(lstm, nn.Flatten()))
print_error("SqrtGGNExact", sqrt_ggn, flat, X)

# %%
# Initial and final state of an LSTM
# ----------------------------------
# BackPACK's rule starts from a hidden state of zeros, and uses the outputs of the layer
# only. With another initial state, or if the model uses the final state as well as the
# outputs, ``BatchGrad`` is wrong, and nothing is said. Of a final state take the last
# output instead, which has the same values: ``rnn(x)[0][:, -1]``.


class Initial(Recurrent):
    def forward(self, X):
        ones = self.head.weight.new_ones(1, len(X), H)
        return self.head(self.rnn(self.embed(X), (ones, ones))[0])


class Both(Recurrent):
    def forward(self, X):
        outputs, (h, _) = self.rnn(self.embed(X))
        return self.head(outputs + h[0][:, None])


for kind in Initial, Both:
    flat = nn.Sequential(kind(), nn.Flatten())
    truth, found = autograd_loop(flat, X), batch_grad(extend_leaves(flat), X)
    assert_close(sample_loop_jacobian(flat, X), truth)
    bad = [name for name in found if not torch.allclose(found[name], truth[name])]
    assert bad
    print(f"{kind.__name__}: BatchGrad is wrong for {', '.join(bad)}")

# %%
# LayerNorm, attention, a parameter of your own
# ---------------------------------------------
# BackPACK has no rules for them: ``BatchGrad`` stores nothing, and ``SqrtGGNExact``
# raises. ``sample_loop_jacobian`` takes them as they are, as the transformer above.

flat = extend_leaves(nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, C)))
for method in batch_grad, sqrt_ggn:
    print_error(f"LayerNorm, {method.__name__}", method, flat, torch.rand(N, D))
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Any of these models, in ``eval()``: one sample at a time. It raises if samples mix.
# - Batched: ``vmap(jacrev)`` for a transformer with plain attention, and for an LSTM
#   where the dtype and device allow it, or written out.
# - ``BatchGrad`` for one layer and direction of an LSTM or RNN: check the states.
#
# Next: ``scale/universal_jacobian.py`` takes these models, with ``nn.Flatten()`` at
# their end, and checks its result. The alternative: ``trust/layer_support.py`` judges
# each method on a model of yours.
