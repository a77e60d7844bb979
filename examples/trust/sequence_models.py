"""
LSTM, GRU and transformer
=========================

After this page you can compute the Jacobian of a recurrent network or a transformer,
with an output for each token, and you know which methods raise, which are wrong without
an error, and what to take instead. You also see which outputs depend on which tokens.
"""

import copy
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # more threads only disturb networks this small
_ = torch.manual_seed(0)

# %%
# Outputs for each token
# ----------------------
# ``X`` holds ``N`` sequences of ``T`` tokens, integers of shape ``[N, T]``. The model
# returns ``C`` numbers for each token: ``fs`` has shape ``[N, T, C]``, and the Jacobian
# of a parameter ``[N, T, C, *p.shape]``. BackPACK's methods want ``[N, K]`` outputs:
# flatten to ``K = T * C``, and unflatten the Jacobian. The loop of one backward pass
# for each output is the reference.

N, T, C = 6, 5, 3
vocabulary, D, H = 11, 8, 7
X = torch.randint(1, vocabulary, (N, T))


def forward(model, X):
    """Return ``fs``, of shape ``[N, ...]``, and the parameters with a gradient."""
    fs = model(X)
    if not isinstance(fs, torch.Tensor) or fs.ndim < 2 or len(fs) != len(X):
        got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
        raise ValueError(f"model(X) must have shape [N={len(X)}, ...], but is {got}")
    return fs, {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop_jacobian(model, X):
    """Return ``{name: [*fs.shape, *p.shape]}`` from a backward pass per output."""
    fs, params = forward(copy.deepcopy(model), X)
    options = {"retain_graph": True, "materialize_grads": True}  # zero if unused
    rows = [autograd.grad(f, params.values(), **options) for f in fs.flatten()]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.rnn = kind(D, H, **{"batch_first": True} | options)
        self.head = nn.Linear(H * (1 + self.rnn.bidirectional), C)

    def forward(self, X):
        return self.head(self.rnn(self.embed(X))[0])


lstm = Tagger()
jacobian = loop_jacobian(lstm, X)
for name, J in jacobian.items():
    print(f"{name}: {list(J.shape)}")

# %%
# One sample at a time
# --------------------
# ``autograd.grad`` with ``is_grads_batched=True`` makes all the backward passes of the
# loop at once. It needs no rules: we compare it for an LSTM here, and for a transformer
# below. But it sends ``N * K`` cotangents through ``N`` samples, and only one sample
# matters for each. A loop over the samples, with batches of one, sends ``K`` cotangents
# through one sample, ``N`` times. It is right where samples do not mix and nothing is
# random. So ``sample_loop_jacobian`` compares the outputs, and raises if a sample alone
# has other outputs.


def pull_back(fs, params):
    """Return ``{name: [*fs.shape, *p.shape]}`` from one batched backward pass."""
    E = torch.eye(fs.numel(), dtype=fs.dtype, device=fs.device).unflatten(1, fs.shape)
    options = {"is_grads_batched": True, "allow_unused": True}
    rows = autograd.grad(fs, params.values(), E, **options)
    blocks = {}
    for (name, p), row in zip(params.items(), rows):
        row = p.new_zeros(fs.numel(), *p.shape) if row is None else row
        blocks[name] = row.unflatten(0, fs.shape)
    return blocks


def grads_batched_jacobian(model, X):
    return pull_back(*forward(copy.deepcopy(model), X))


def sample_loop_jacobian(model, X):
    """Return ``{name: [*fs.shape, *p.shape]}`` from a batched pass per sample.

    ``X`` has shape ``[N, ...]`` and ``fs = model(X)`` has shape ``[N, ...]``. Raises
    ``ValueError`` if the outputs of a sample change with the batch that it is in.
    """
    model = copy.deepcopy(model)
    together, _ = forward(model, X)
    alone = [forward(model, x) for x in X.split(1)]
    near = torch.finfo(together.dtype).eps ** 0.5
    if not torch.allclose(torch.cat([fs for fs, _ in alone]), together, near, near):
        raise ValueError("model(X[n:n+1]) is not model(X)[n:n+1]: mixed or random")
    rows = [pull_back(*sample) for sample in alone]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


for method in grads_batched_jacobian, sample_loop_jacobian:
    assert_close(method(lstm, X), jacobian)
    print(f"{method.__name__} agrees with the loop.")
batch, sample = (flops(pull_back, *forward(lstm, x)) for x in (X, X[:1]))
assert batch == N * (N * sample)
print(f"FLOPs backward: {batch:,} for the batch, {N * sample:,} sample by sample.")

# %%
# ``nn.LSTM`` takes time first by default. A model that forgets ``batch_first`` runs,
# and mixes the samples as if they were steps in time. ``sample_loop_jacobian`` notices.


def fails(text, method, *args, on_warning="error"):
    """Print the error or the warning of a call, which has to contain ``text``."""
    try:
        with warnings.catch_warnings(action=on_warning):
            method(*args)
    except Exception as error:
        assert text in str(error), f"{text!r} became {error!r}: correct this page"
        print(f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}")
    else:
        raise AssertionError(f"{text!r} is gone: correct this page")


fails("mixed or random", sample_loop_jacobian, Tagger(batch_first=False), X)

# %%
# LSTM, GRU and RNN under vmap
# ----------------------------
# ``vmap`` has no rule for the recurrent layers, in double precision on a CPU. A forward
# pass says so. ``vmap(jacrev)`` breaks them into smaller operations, and then raises at
# one that works in place. ``nn.LSTMCell`` raises, too. With other types and devices
# other code may run, and other texts appear.


def vmap_jacobian(model, X):
    """Return ``{name: [*fs.shape, *p.shape]}``, with all samples side by side."""
    model = copy.deepcopy(model)
    params = {name: p.detach() for name, p in forward(model, X)[1].items()}
    jacobian = jacrev(lambda params, x: functional_call(model, params, (x[None],))[0])
    return vmap(jacobian, (None, 0))(params, X)


class Cell(nn.LSTMCell):
    def forward(self, x):
        return super().forward(x)[0]


for model in lstm, Tagger(nn.GRU), Tagger(nn.RNN):
    fails("Batching rule not implemented for aten::", vmap(model), X)
    fails("doesn't match the broadcast shape", vmap_jacobian, model, X)
fails("doesn't match the broadcast shape", vmap_jacobian, Cell(D, H), torch.rand(N, D))

# %%
# Written out with operations that are not in place, the same layer works. It inherits
# the parameters, so it loads the state of the other, and the Jacobian has the same
# names.


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


unrolled = Tagger(UnrolledLSTM)
_ = unrolled.load_state_dict(lstm.state_dict())
assert_close(unrolled(X), lstm(X))
assert_close(vmap_jacobian(unrolled, X), jacobian)
print("vmap(jacrev) of the LSTM that is written out agrees with the loop.")

# %%
# LSTM and RNN in BackPACK
# ------------------------
# ``BatchGrad`` has rules for ``nn.LSTM`` and ``nn.RNN``, and takes ``K`` passes. We
# extend the layers, not the class that holds them, or BackPACK warns about a class
# without rules. In an ``nn.Sequential``, ``ReduceTuple`` takes the outputs of the layer
# out of its tuple. Tokens are integers and require no gradient, so PyTorch warns about
# ``Full backward hook is firing``: here this is harmless.


def extend_leaves(model):
    """Return a copy of ``model`` with extended layers, but not the classes of them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not list(module.children()):
            extend(module)
    return model


def batchgrad_jacobian(extended, X):
    """Return ``{name: [*fs.shape, *p.shape]}`` from ``K`` backward passes."""
    fs, params = forward(extended, X.detach())
    flat = fs.flatten(1)
    jacobian = {name: p.new_empty(*flat.shape, *p.shape) for name, p in params.items()}
    for k in range(flat.shape[1]):
        retain = k < flat.shape[1] - 1
        with backpack(BatchGrad(), retain_graph=retain), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            autograd.grad(flat[:, k].sum(), params.values(), retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, k] = p.grad_batch.reshape(len(X), *p.shape)
            del p.grad_batch
    return {name: J.unflatten(1, fs.shape[1:]) for name, J in jacobian.items()}


chain = nn.Sequential(lstm.embed, lstm.rnn, ReduceTuple(), lstm.head)
assert_close(batchgrad_jacobian(extend_leaves(lstm), X), jacobian)
by_chain = batchgrad_jacobian(extend(copy.deepcopy(chain)), X)
assert_close(list(by_chain.values()), list(jacobian.values()))
rnn = Tagger(nn.RNN)
assert_close(batchgrad_jacobian(extend_leaves(rnn), X), loop_jacobian(rnn, X))
print("BatchGrad agrees with the loop: LSTM in the class, in the Sequential, and RNN.")

# %%
# The limits: one layer, one direction, the batch first, no ``padding_idx``, no GRU. Two
# layers become two modules with ``use_converter=True``, and then the parameters have
# other names. ``SqrtGGNExact`` has no rule for recurrent layers, and its loss takes
# outputs ``[N, K]`` only: end the model in ``nn.Flatten()``.


def sqrt_ggn(extended, X):
    fs, params = forward(extended, X)
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        autograd.grad(loss, params.values())


no_rule = "Extension saving to grad_batch does not have an extension for Module"
padded = Tagger()
padded.embed.padding_idx = 0
limits = {
    "only num_layers = 1 is supported": Tagger(num_layers=2),
    "only bidirectional = False is supported": Tagger(bidirectional=True),
    "Batch axis must be first.": Tagger(batch_first=False),
    "Only padding_idx=None supported.": padded,
    no_rule: Tagger(nn.GRU),
}
for text, model in limits.items():
    fails(text, batchgrad_jacobian, extend_leaves(model), X)
fails("Only 2D inputs are currently supported", sqrt_ggn, extend_leaves(chain), X)
flat = nn.Sequential(*chain, nn.Flatten())
missing = "Extension saving to sqrt_ggn_exact does not have an extension for Module"
fails(missing, sqrt_ggn, extend_leaves(flat), X)

two = Tagger(num_layers=2)
expected = loop_jacobian(two, X)
converted = batchgrad_jacobian(extend(copy.deepcopy(two), use_converter=True), X)
new = sorted(set(converted) - set(expected))
print(f"New names: {new[0]} ... {new[-1]}")
assert_close(converted["rnn.lstm_1.weight_hh_l0"], expected["rnn.weight_hh_l1"])
print("BatchGrad after the converter agrees with the loop for two layers.")

# %%
# Initial and final state of an LSTM
# ----------------------------------
# BackPACK's rule starts from a hidden state of zeros, and uses the outputs of the layer
# only. With another initial state, or if the model uses the final state as well as the
# outputs, ``BatchGrad`` is wrong, and nothing is said. With the final state alone it
# raises. Take the last output instead, which has the same values.


class Initial(Tagger):
    def forward(self, X):
        ones = torch.ones(1, len(X), H)
        return self.head(self.rnn(self.embed(X), (ones, ones))[0])


class Both(Tagger):
    def forward(self, X):
        outputs, (h, _) = self.rnn(self.embed(X))
        return self.head(outputs + h[0][:, None])


class Final(Tagger):
    def forward(self, X):
        return self.head(self.rnn(self.embed(X))[1][0][0])


class Last(Tagger):
    def forward(self, X):
        return self.head(self.rnn(self.embed(X))[0][:, -1])


def load(kind):
    model = kind()
    _ = model.load_state_dict(lstm.state_dict())
    return model


for kind in Initial, Both:
    model = load(kind)
    expected = loop_jacobian(model, X)
    found = batchgrad_jacobian(extend_leaves(model), X)
    assert_close(sample_loop_jacobian(model, X), expected)
    bad = [name for name in found if not torch.allclose(found[name], expected[name])]
    assert bad, f"BatchGrad is right for {kind.__name__} now: correct this page"
    print(f"{kind.__name__}: BatchGrad is wrong for {', '.join(bad)}")

absent = "'Parameter' object has no attribute 'grad_batch'"
fails(absent, batchgrad_jacobian, extend_leaves(load(Final)), X)
found = batchgrad_jacobian(extend_leaves(load(Last)), X)
assert_close(found, loop_jacobian(load(Final), X))
print("BatchGrad with the last output agrees with the loop for the final state.")

# %%
# Transformer
# -----------
# The encoder has attention, ``LayerNorm`` and dropout. The model adds a parameter of
# its own for the positions. Token 0 is padding: other tokens must not see it. In
# training mode dropout is random, and each call has another Jacobian: take eval mode.


class Transformer(nn.Module):
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


lengths = torch.tensor([5, 3, 4, 2, 5, 1])
padding = torch.arange(T) >= lengths[:, None]
Z = X.masked_fill(padding, 0)
transformer = Transformer()
fails("mixed or random", sample_loop_jacobian, transformer, Z)
fails("called random operation", vmap_jacobian, transformer, Z)

_ = transformer.eval()
J_transformer = loop_jacobian(transformer, Z)
for method in grads_batched_jacobian, sample_loop_jacobian:
    assert_close(method(transformer, Z), J_transformer)
    print(f"{method.__name__} agrees with the loop for the transformer.")

# %%
# Fast path of the encoder under vmap
# -----------------------------------
# In eval mode, the encoder can take a fast path: it packs the tokens that are no
# padding. ``vmap`` has no rule for that. Turn the fast path off. Then ``vmap(jacrev)``
# is right, but PyTorch warns that it runs the attention in a loop. ``sdpa_kernel`` with
# ``MATH`` takes the attention that is written in plain operations.

packed = "Batching rule not implemented for aten::_nested_tensor_from_mask"
fails(packed, vmap_jacobian, transformer, Z)
torch.backends.mha.set_fastpath_enabled(False)
fails("There is a performance drop", vmap_jacobian, transformer, Z)
with warnings.catch_warnings(action="ignore"):
    assert_close(vmap_jacobian(transformer, Z), J_transformer)
with sdpa_kernel(SDPBackend.MATH):
    assert_close(vmap_jacobian(transformer, Z), J_transformer)
print("vmap(jacrev) agrees with the loop, with the warning and with plain attention.")

# %%
# Padding
# -------
# The outputs at the padding are numbers without a meaning. With the fast path, which is
# taken when no gradient is required, they are other numbers. At the tokens both agree,
# and there no output depends on the embedding of the padding. So index the Jacobian
# with ``~padding`` before you use it.

slow = transformer(Z)
torch.backends.mha.set_fastpath_enabled(True)
with torch.no_grad(), warnings.catch_warnings(action="ignore"):
    fast = transformer(Z)  # the warning says that nested tensors are a prototype
assert_close(fast[~padding], slow[~padding])
assert not torch.allclose(fast, slow), "the fast path agrees now: correct this page"
difference = (fast - slow)[padding].abs().max()
print(
    f"The outputs agree at the tokens, and differ by {difference:.2g} at the padding."
)
by_padding = J_transformer["embed.weight"][~padding][:, :, 0]
assert_close(by_padding, torch.zeros_like(by_padding), rtol=0, atol=0)
print(f"Outputs at tokens: {len(by_padding)} x {C} of {N} x {T} x {C}.")

# %%
# LayerNorm, GroupNorm, attention, a parameter of your own
# --------------------------------------------------------
# BackPACK has no rules for them: ``BatchGrad`` stores nothing, and reading
# ``grad_batch`` raises. ``SqrtGGNExact`` raises. ``sample_loop_jacobian`` takes them as
# they are; ``vmap_jacobian``, too, with plain attention.


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(H))

    def forward(self, X):
        return X * self.scale


class Attention(nn.MultiheadAttention):
    def forward(self, X):
        return super().forward(X, X, X)[0]


x, tokens = torch.rand(N, D), torch.rand(N, T, D)
cases = {
    "LayerNorm": (nn.LayerNorm(H), x),
    "GroupNorm": (nn.GroupNorm(1, H), x),
    "Scale": (Scale(), x),
    "Attention": (Attention(H, 1, batch_first=True), tokens),
}
for name, (layer, inputs) in cases.items():
    net = nn.Sequential(nn.Linear(D, H), layer, nn.Linear(H, C), nn.Flatten())
    extended = extend(copy.deepcopy(net))
    fails(absent, batchgrad_jacobian, extended, inputs, on_warning="ignore")
    fails(missing, sqrt_ggn, extended, inputs)
    expected = loop_jacobian(net, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(vmap_jacobian(net, inputs), expected)
    assert_close(sample_loop_jacobian(net, inputs), expected)
    print(f"{name}: vmap_jacobian and sample_loop_jacobian agree with the loop.")

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
    model = copy.deepcopy(model)
    E = model.get_submodule(embed)(X).detach().requires_grad_()
    model.get_submodule(embed).register_forward_hook(lambda *_: E)
    fs, _ = forward(model, X)
    if fs.ndim != 3 or fs.shape[:2] != X.shape:
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not {[*X.shape, 'C']}")
    summed = fs.sum(0)  # [T, C]: each row of E belongs to one sample
    J = pull_back(summed, {embed: E})[embed]  # [T, C, N, T, D]
    return J.movedim(2, 0).norm(dim=(2, 4)).mean(0)


models = {"LSTM": lstm, "transformer": transformer}
models["causal transformer"] = Transformer(causal=True).eval()
maps = {name: token_influence(model, X) for name, model in models.items()}
ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
for name, values in maps.items():
    zeros = torch.zeros(T, T, dtype=torch.bool) if name == "transformer" else ahead
    assert_close(values == 0, zeros)
    print(f"{name}: {int(zeros.sum())} of {T * T} pairs are exactly zero.")

plt.rcParams["font.size"] = 11
fig, axes = plt.subplots(1, 3, figsize=(6, 3.4), sharey=True, layout="constrained")
fig.suptitle("Which token's output depends on which token's embedding")
colors = plt.get_cmap("cividis").with_extremes(bad="0.85")
for ax, (name, values) in zip(axes, maps.items()):
    nonzero = (values / values.max()).where(values != 0, torch.nan).numpy()
    image = ax.imshow(nonzero, cmap=colors, vmin=0, vmax=1)
    for t, s in (values == 0).nonzero().tolist():
        ax.text(s, t, "0", ha="center", va="center")
    ax.set_title(name, fontsize=11)
    ax.set(xlabel="embedding s", xticks=range(T), yticks=range(T))
axes[0].set_ylabel("output of token t")
label = "norm of the derivative / maximum of each map"
fig.colorbar(image, ax=axes, label=label, location="bottom", aspect=40)
plt.show()

# %%
# Which method to take
# --------------------
# - Any model whose samples do not mix: ``sample_loop_jacobian`` in eval mode. It raises
#   if a sample alone has other outputs.
# - Transformers: ``vmap_jacobian`` without the fast path, with plain attention.
# - LSTM: ``UnrolledLSTM`` for ``vmap``, or ``BatchGrad`` inside its limits. Compare.

# %%
# Where to go next
# ----------------
# Next: ``scale/universal_jacobian.py`` takes these models, with ``nn.Flatten()`` at
# their end, and checks its result. The alternative: ``trust/layer_support.py`` lists
# which layer works where.
