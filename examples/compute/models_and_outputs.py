"""
Models and outputs of other kinds
=================================

After this page you can compute the Jacobian of a model that is not one tensor in and
one vector per sample out: several heads, tokens, images, masks, forces, adapters, tied
or complex parameters, several models at once. For each kind there is a cell to copy,
its cost, and the error that the plain recipe raises.
"""

from itertools import product

import matplotlib.pyplot as plt
import torch
from torch import autograd, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more threads only disturb networks this small
_ = torch.manual_seed(0)

# %%
# One sample in, and what you want rows for out
# ---------------------------------------------
# Write a function ``f(params, x)`` of *one* sample that returns what you want rows for:
# a tensor, or a dict or tuple of tensors. ``vmap(jacrev(f))`` returns the same tree.
# Each tensor in it, ``[N, ...]`` for the batch, becomes ``{name: [N, ..., *p.shape]}``.
# Leave out what has no Jacobian, such as a loss ``None`` or integer predictions. This
# model has two heads.

N, C, B = 6, 4, 13


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.mean, self.boxes = nn.Linear(7, C), nn.Linear(7, B)

    def forward(self, X):
        hidden = self.body(X)
        return {"mean": self.mean(hidden), "boxes": self.boxes(hidden)}


def detached_params(model):
    """Return the parameters that require a gradient, without their graph."""
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def by_head(params, x):  # of one sample
    fs = functional_call(heads, params, x[None])
    return {head: value[0] for head, value in fs.items()}


heads, X = Heads(), torch.rand(N, 5)
J = vmap(jacrev(by_head), (None, 0))(detached_params(heads), X)
for head, blocks in J.items():
    print(f"{head}: body.0.weight {list(blocks['body.0.weight'].shape)}")

# %%
# Kinds of outputs, and the shape of the Jacobian
# -----------------------------------------------
# One box is one axis. First come the axes of the outputs, then those of the parameter.
# ``N`` is the axis of samples. ``B``: outputs of a second head, ``T``: tokens, ``V``:
# words, ``E``: features of a token, ``K``: pixels that are chosen, ``A``: atoms, ``D``:
# directions in space, ``M``: models. The page holds each kind below to its line here.

# fold: The sizes, the kinds, and how the picture is drawn
T, V, E, H, W, K, A, D, M = 5, 11, 8, 9, 7, 2, 10, 3, 12
SIZES = {"N": N, "C": C, "B": B, "T": T, "V": V, "E": E, "H": H, "W": W, "K": K}
SIZES |= {"A": A, "D": D, "M": M}
KINDS = {
    "vector": "N C",
    "second head": "N B",
    "tokens": "N T V",
    "label's logit": "N T",
    "with a mask": "N T V",
    "one logit": "N",
    "image": "N C H W",
    "chosen pixels": "N C K",
    "forces": "N A D",
    "several models": "M N C",
}

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
colors = {"N": "#0072b2", "M": "#009e73", "*p.shape": "0.85"}
for y, (kind, axes) in enumerate(KINDS.items()):
    ax.text(-0.2, y, kind, ha="right", va="center", fontsize=13)
    for x, axis in enumerate([*axes.split(), "*p.shape"]):
        width = 2 if axis == "*p.shape" else 0.9
        color = colors.get(axis, "#e69f00")
        ax.add_patch(plt.Rectangle((x, y - 0.42), width, 0.84, color=color))
        options = {"ha": "center", "va": "center", "fontsize": 16}
        ax.text(x + width / 2, y, axis, color="w" if axis == "N" else "k", **options)
ax.set(xlim=(-3.1, 6.1), ylim=(len(KINDS) - 0.5, -0.5))
ax.set_title("Kinds of outputs: axes of the Jacobian", fontsize=13)
ax.set_axis_off()
plt.show()

# %%
# The check: one backward pass for each number
# --------------------------------------------
# The reference knows nothing of ``torch.func``. It takes the outputs of the whole batch
# and one backward pass for each number in them. Each further kind is checked so.


def loop(fs, params):
    """Return ``{name: [*fs.shape, *p.shape]}`` from one pass for each number."""
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    options["grad_outputs"] = fs.new_ones(())  # autograd wants it if fs is complex
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def check(kind, J, fs, model):
    """Compare with the loop, and print the number of rows and the bytes of ``J``."""
    assert list(fs.shape) == [SIZES[axis] for axis in KINDS[kind].split()]
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert_close(J, loop(fs, params))
    size = sum(block.nbytes for block in J.values()) / 1e3
    print(f"{kind} {list(fs.shape)}: right, {fs.numel()} rows in {size:.1f} kB.")


fs = heads(X)
check("vector", J["mean"], fs["mean"], heads)
check("second head", J["boxes"], fs["boxes"], heads)

# %%
# Where something fails, the page prints the error that it catches.

# fold: How errors are printed


def show_error(kind, function, *args, **options):
    """Print the error that a call raises, or fail if it raises none of this kind."""
    try:
        function(*args, **options)
    except kind as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return
    raise LookupError(f"no {kind.__name__} any more: correct this section")


# %%
# A head has zeros for parameters that it does not use. ``jacrev`` makes them, and
# autograd with ``materialize_grads=True``. Without that, it raises.

assert not J["mean"]["boxes.weight"].any() and not J["boxes"]["mean.weight"].any()
print("Zeros for the parameters of the other head.")
show_error(RuntimeError, autograd.grad, fs["mean"][0, 0], heads.boxes.weight)

# %%
# Several heads in the plain recipe
# ---------------------------------
# The recipe for a tensor takes ``[0]`` of what the model returns. A dict raises. A
# tuple does not: ``[0]`` is its first head, and all others are lost.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


class TupleOfHeads(Heads):
    def forward(self, X):
        return tuple(super().forward(X).values())


show_error(KeyError, vmap_jacrev, heads, X)
lost = vmap_jacrev(TupleOfHeads(), X)["mean.weight"]
assert lost.shape == (N, 1, C, C, 7)
print(f"A tuple gives {list(lost.shape)}: the axis of length 1 is x[None].")

# %%
# One logit per token
# -------------------
# A language model returns ``[N, T, V]``. If one number per token is enough, such as the
# logit of the label, pick it before you differentiate: then the Jacobian has ``[N, T]``
# rows. Row ``t`` is the gradient of the output at position ``t``. The section on masks
# picks one token of each sample. ``trust/sequence_models.py`` has recurrent models.


class PlainAttention(nn.Module):
    def forward(self, h):
        return (h @ h.mT).softmax(-1) @ h


layer, attention, head = nn.Linear(E, 10), PlainAttention(), nn.Linear(10, V)
tagger = nn.Sequential(nn.Embedding(V, E), layer, attention, head)
words, labels = torch.randint(V, (2, N, T))


def label_logits(params, x, label):  # [T] of one sample
    fs = functional_call(tagger, params, x[None])[0]  # [T, V]
    return fs.gather(1, label[:, None])[:, 0]


J = vmap(jacrev(label_logits), (None, 0, 0))(detached_params(tagger), words, labels)
check("tokens", vmap_jacrev(tagger, words), tagger(words), tagger)
check("label's logit", J, tagger(words).gather(2, labels[..., None])[..., 0], tagger)

# %%
# "Per token": at a position, or from a position
# ----------------------------------------------
# The other meaning is the share of position ``s`` in a gradient: what a parameter does
# where it meets token ``s``. Give each position its own copy of the parameter. The
# shares ``[N, T, T, *p.shape]`` of output ``t`` from position ``s`` sum to row ``t``.
# They are outer products of a derivative and the input of the layer. Without attention
# all other positions have no share. With it they do, and the two meanings differ.


def with_copies(copies, x, label):
    h = vmap(functional_call, (None, 0, 0))(layer, copies, tagger[0](x))
    return tagger[2:](h)[range(T), label]


copies = {k: p.expand(T, *p.shape) for k, p in detached_params(layer).items()}
for mixing in nn.Identity(), attention:
    tagger[2] = mixing
    shares = vmap(jacrev(with_copies), (None, 0, 0))(copies, words, labels)["weight"]
    h = layer(tagger[0](words))
    delta = loop(tagger[2:](h).gather(2, labels[..., None])[..., 0], {"h": h})["h"]
    assert_close(shares, torch.einsum("ntnsh,nse->ntshe", delta, tagger[0](words)))
    others = shares[:, ~torch.eye(T, dtype=torch.bool)].norm() / shares.norm()
    assert (others > 0) == (mixing is attention)
    print(f"{type(mixing).__name__}: shares of other positions {others:.1%}")
assert_close(shares.sum(2), J["1.weight"])
assert not torch.allclose(shares.sum(1), J["1.weight"])
print("With attention the shares sum to the row of each output, not of each position.")

# %%
# Images of outputs
# -----------------
# The recipe takes ``[N, C, H, W]`` as it is. At real sizes the result does not fit
# anywhere: count it first. Then choose pixels inside ``f``, or take what you need of
# them, such as the mean of each channel, ``[N, C]`` rows. A weighted sum over all
# samples, too, is one backward pass, a product of
# ``scale/jacobians_without_memory.py``.

small, images = nn.Conv2d(2, 3, 3, padding=1), torch.rand(N, 2, H, W)
segment = nn.Sequential(small, nn.Tanh(), nn.Conv2d(3, C, 1))
rows, columns = torch.tensor([0, 8]), torch.tensor([3, 6])


def pixels(params, x):  # [C, K] of one sample
    return functional_call(segment, params, x[None])[0][:, rows, columns]


def channel_means(params, x):  # [C] of one sample
    return functional_call(segment, params, x[None])[0].mean((1, 2))


J = vmap_jacrev(segment, images)
check("image", J, segment(images), segment)
J_pixels = vmap(jacrev(pixels), (None, 0))(detached_params(segment), images)
check("chosen pixels", J_pixels, segment(images)[:, :, rows, columns], segment)
J_means = vmap(jacrev(channel_means), (None, 0))(detached_params(segment), images)
check("vector", J_means, segment(images).mean((2, 3)), segment)
real = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 512, 3), nn.Conv2d(512, 21, 1))
P = sum(p.numel() for p in real.parameters())
print(f"N = 8, C = 21, 512 x 512, P = {P}: {8 * 21 * 512**2 * P * 4 / 1e12:.0f} TB")

# %%
# Several inputs, keyword arguments, masks
# ----------------------------------------
# Give ``f`` an argument for each input that has samples, and ``vmap`` an axis for each:
# ``(None, 0, 0)``. Inside, ``functional_call`` takes a tuple of inputs and a dict of
# keyword arguments, each with a batch axis of length 1. Here an encoder in ``eval()``
# has a padding mask. Its fast path has no rule under ``vmap`` (``Batching rule not
# implemented for aten::_nested_tensor_from_mask``): ``enable_nested_tensor=False``, or
# for a model that you have ``torch.backends.mha.set_fastpath_enabled(False)``. ``MATH``
# takes the attention in plain operations, for which ``vmap`` has rules. For outputs
# ``[N, C]``, ``jacobians(model, X, padding)`` from ``jacobians.py`` is ``f`` and
# ``vmap`` in one.

from torch.nn.attention import SDPBackend, sdpa_kernel


class MaskedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 10, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, V)

    def forward(self, X, padding=None):
        return self.head(self.layers(X, src_key_padding_mask=padding))


encoder, tokens = MaskedEncoder().eval(), torch.rand(N, T, E)
lengths = torch.tensor([5, 3, 4, 2, 5, 1])
padding = torch.arange(T) >= lengths[:, None]


def encoded(params, x, padding):  # [T, V] of one sample
    masks = {"padding": padding[None]}
    return functional_call(encoder, params, (x[None],), masks)[0]


params = {k: p.detach() for k, p in encoder.named_parameters() if p.requires_grad}
with sdpa_kernel(SDPBackend.MATH):
    J = vmap(jacrev(encoded), (None, 0, 0))(params, tokens, padding)
check("with a mask", J, encoder(tokens, padding), encoder)

# %%
# Rows at the padding mean nothing. For one logit of one token, which differs between
# samples, pick it inside: an index that is a tensor needs an axis, ``t[None]``. Without
# it, ``vmap`` raises. ``jacrev`` takes no keyword arguments.


def one_logit(params, x, padding, t, label):  # a number for each sample
    return encoded(params, x, padding)[t[None], label[None]][0]


def without_axis(params, x, padding, t, label):
    return encoded(params, x, padding)[t, label]


picked = lengths - 1, torch.randint(V, (N,))
axes, samples = (None, 0, 0, 0, 0), (tokens, padding, *picked)
with sdpa_kernel(SDPBackend.MATH):
    J = vmap(jacrev(one_logit), axes)(params, *samples)
    show_error(RuntimeError, vmap(jacrev(without_axis), axes), params, *samples)
check("one logit", J, encoder(tokens, padding)[range(N), *picked], encoder)
by_samples = vmap(jacrev(encoded), (None, 0))
show_error(TypeError, by_samples, params, tokens, padding=padding)

# %%
# Data-dependent control flow
# ---------------------------
# Under ``vmap`` a tensor stands for all samples. It cannot answer one ``if``, be one
# number, or have one length. This model asks for all three.


class Pooled(nn.Linear):
    def forward(self, x, padding):
        kept = (~padding)[..., None].to(x)
        return super().forward((x * kept).sum(-2) / kept.sum(-2))


class Trimmed(Pooled):
    def forward(self, x, padding):
        if padding.all():
            raise ValueError("nothing but padding")
        longest = (~padding).sum(-1).max().item()
        return super().forward(x[:, :longest], padding[:, :longest])


def pooled(params, x, padding):  # [C] of one sample
    return functional_call(trimmed, params, (x[None], padding[None]))[0]


trimmed = Trimmed(E, C)
params = detached_params(trimmed)
show_error(RuntimeError, vmap(pooled, (None, 0, 0)), params, tokens, padding)
show_error(RuntimeError, vmap(lambda padding: padding.sum().item()), padding)
show_error(RuntimeError, vmap(lambda x, padding: x[~padding]), tokens, padding)

# %%
# Three ways out: ``jacrev`` over the whole batch, which does ``N`` times the work (see
# ``compute/torch_func_jacobians.py``). One sample after the other, stacked. Or a
# forward pass in plain operations, with a weight 0 for what is masked: ``Pooled`` has
# the parameters of ``Trimmed``. They agree as each sample of ``Trimmed`` goes its own
# way. With ``if X.sum() > 0`` the samples of a batch decide together: the first way is
# the Jacobian of this batch, the others of batches of one.

whole = jacrev(lambda p: functional_call(trimmed, p, (tokens, padding)))(params)
alone = [jacrev(pooled)(params, *sample) for sample in zip(tokens, padding)]
check("vector", whole, trimmed(tokens, padding), trimmed)
assert_close({k: torch.stack([J[k] for J in alone]) for k in params}, whole)

plain = Pooled(E, C)
rows_of = jacrev(lambda params, *x: functional_call(plain, params, x))
assert_close(vmap(rows_of, (None, 0, 0))(params, tokens, padding), whole)
print("Sample by sample, and in plain operations under vmap: the same.")

# %%
# Energies, forces, differential equations
# ----------------------------------------
# A model that differentiates by its inputs itself calls ``requires_grad_()`` and
# ``autograd.grad``. No transform of ``torch.func`` can look into them. Write the inner
# derivative with ``grad``. Outside of transforms ``autograd.grad`` with
# ``create_graph=True`` works: the reference is made so. The residual of a differential
# equation is written in the same way, in ``use/levenberg_marquardt.py``.


class Forces(nn.Sequential):
    def forward(self, x):
        x = x.requires_grad_()
        energy = super().forward(x).sum()
        return -autograd.grad(energy, x, create_graph=True)[0]


layers = nn.Flatten(), nn.Linear(A * D, 7), nn.Tanh(), nn.Linear(7, 1)
energy, forces, places = nn.Sequential(*layers), Forces(*layers), torch.rand(N, A, D)


def force(params, x):  # [A, D] of one sample
    return -grad(lambda x: functional_call(energy, params, x[None]).sum())(x)


show_error(RuntimeError, vmap_jacrev, forces, places)
J = vmap(jacrev(force), (None, 0))(detached_params(energy), places)
check("forces", J, forces(places), forces)

# %%
# Adapters on a frozen model
# --------------------------
# Only what requires a gradient has a block. Low-rank adapters (LoRA) start with zeros
# in ``up``: then all rows of ``down`` are zero, too. They move with training. Dropout
# raises under ``vmap``: take ``eval()``, or see
# ``trust/precision_and_randomness.py``.


class Adapted(nn.Module):
    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(self.dropout(x)))


adapted = nn.Sequential(Adapted(nn.Linear(30, 20), 2), nn.Tanh(), nn.Linear(20, C))
_ = adapted[2].requires_grad_(False)
_ = nn.init.zeros_(adapted[0].up.weight)
features = torch.rand(N, 30)
show_error(RuntimeError, vmap_jacrev, adapted, features)
J = vmap_jacrev(adapted.eval(), features)
check("vector", J, adapted(features), adapted)
assert not J["0.down.weight"].any() and J["0.up.weight"].any()
P = sum(p.numel() for p in adapted.parameters())
print(f"Blocks: {', '.join(J)}. All parameters: {N * C * P * 8 / 1e3:.1f} kB.")

# %%
# Embeddings, tied weights, a temperature
# ---------------------------------------
# ``functional_call`` puts a tied weight into both places, and its block is the sum of
# both uses. Pass it once, under the name that ``named_parameters`` gives it. A learned
# temperature has shape ``[]``, so its Jacobian is ``[N, C]`` and no more.


class TiedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(C, E), nn.Linear(E, C, bias=False)
        self.out.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, words):
        return self.out(self.embed(words).mean(1).tanh()) / self.temperature


tied_words, few_words = TiedWords(), torch.randint(C, (N, T))
J = vmap_jacrev(tied_words, few_words)
check("vector", J, tied_words(few_words), tied_words)
print({name: list(block.shape) for name, block in J.items()})
both = {name: tied_words.embed.weight + 0 for name in ("embed.weight", "out.weight")}
show_error(ValueError, functional_call, tied_words, both, few_words)

# %%
# A layer with two names
# ----------------------
# A *module* in two places is another case. ``functional_call`` replaces its parameters
# twice and may put back the wrong ones (`pytorch#164759
# <https://github.com/pytorch/pytorch/issues/164759>`_): the Jacobian is right, but then
# the model holds other tensors than your optimizer. With ``tie_weights=False`` each is
# replaced once. That is right as long as no other module holds the same parameter.


def twice_outputs(params, x):
    return functional_call(twice, params, x[None], tie_weights=False)[0]


shared = nn.Linear(5, 5)
twice = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, C))
weight = shared.weight
J = vmap(jacrev(twice_outputs), (None, 0))(detached_params(twice), X)
check("vector", J, twice(X), twice)
assert shared.weight is weight
assert_close(vmap_jacrev(twice, X), J)
print(f"After the plain recipe the weight is still itself: {shared.weight is weight}")

# %%
# Modules that write to themselves
# --------------------------------
# ActNorm sets its parameters from the first batch that it sees, and some masked layers
# set theirs in each call, through ``.data``. Let the first call happen before you
# differentiate. Where each call writes, take autograd sample by sample, as
# ``scale/universal_jacobian.py`` does: it lets ``.data`` pass, as the loop does here.


class ActNorm(nn.Linear):
    ready = False

    def forward(self, x):
        if not self.ready:
            self.bias.data = self.bias - super().forward(x).mean(0)
            self.ready = True
        return super().forward(x)


act_norm = ActNorm(5, C)
show_error(RuntimeError, vmap_jacrev, act_norm, X)
fs = act_norm(X)  # sets the bias
check("vector", vmap_jacrev(act_norm, X), fs, act_norm)

# %%
# A buffer that is updated in place raises, too. Pass the buffers, one copy for each
# sample: ``functional_call`` takes several dicts. The copies are dropped, and the model
# stays as it is. If the outputs depend on what the whole batch wrote, as in batch norm
# in training mode, samples mix: see ``trust/residual_networks.py``.


class Watched(nn.Linear):
    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
        return super().forward(x)


def with_buffers(params, buffers, x):
    own = {name: b.clone() for name, b in buffers.items()}
    return functional_call(watched, (params, own), x[None])[0]


watched = Watched(5, C)
watched.register_buffer("largest", torch.tensor(0.0))
show_error(RuntimeError, vmap_jacrev, watched, X)
buffers = {name: b.expand(N, *b.shape) for name, b in watched.named_buffers()}
J = vmap(jacrev(with_buffers), (None, 0, 0))(detached_params(watched), buffers, X)
assert watched.largest == 0
check("vector", J, watched(X), watched)

# %%
# Complex parameters
# ------------------
# ``jacrev`` refuses complex parameters and complex outputs. Pass real and imaginary
# part as a last axis of length 2, and return them so. The Jacobian is
# ``[N, C, 2, *p.shape, 2]``. The outputs ``z`` are holomorphic here, so the 2 x 2
# blocks satisfy the equations of Cauchy and Riemann, and one complex number holds each:
# the derivative. Autograd returns its conjugate.

weight = torch.randn(5, C, dtype=torch.cdouble)


def holomorphic(weight, x):  # [C], complex
    return torch.exp(x.to(weight) @ weight)


def in_real_numbers(weight, x):  # [C, 2]
    return torch.view_as_real(holomorphic(torch.view_as_complex(weight), x))


show_error(RuntimeError, vmap(jacrev(holomorphic), (None, 0)), weight, X)
parts = torch.view_as_real(weight)
complex_outputs = jacrev(lambda w, x: holomorphic(torch.view_as_complex(w), x))
show_error(RuntimeError, vmap(complex_outputs, (None, 0)), parts, X)
J = vmap(jacrev(in_real_numbers), (None, 0))(parts, X)  # [N, C, 2, 5, C, 2]
leaf = parts.clone().requires_grad_()
assert_close(J, loop(in_real_numbers(leaf, X), {"weight": leaf})["weight"])
print(f"Real and imaginary parts {list(J.shape)}: right.")

# %%
# The derivative, and its conjugate, which autograd returns:

parts = J.movedim(2, -1).contiguous()  # [N, C, 5, C, 2, 2]
by_real, by_imaginary = torch.view_as_complex(parts).unbind(-1)
assert_close(by_imaginary, 1j * by_real)  # Cauchy and Riemann
leaf = weight.clone().requires_grad_()
by_autograd = loop(holomorphic(leaf, X), {"weight": leaf})["weight"]
assert_close(by_autograd, by_real.conj())
print(f"Derivatives {list(by_real.shape)}: autograd returns the conjugate.")

# %%
# Several models at once
# ----------------------
# ``stack_module_state`` stacks the parameters of ``M`` models of one architecture, and
# their buffers: each model has its own batch norm. A second ``vmap`` runs over the
# models, and the Jacobian is ``[M, N, C, *p.shape]``.


def with_norm():
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, C))
    net(torch.randn(20, 5))  # statistics
    return net.eval()


models = [with_norm() for _ in range(M)]
stacked, buffers = stack_module_state(models)
stacked = {name: p.detach() for name, p in stacked.items()}


def of_one_model(params, buffers, x):
    return functional_call(models[0], (params, buffers), x[None])[0]


jacobian_of_one = vmap(jacrev(of_one_model), (None, None, 0))
J = vmap(jacobian_of_one, (0, 0, None))(stacked, buffers, X)
for m, model in enumerate(models):
    blocks = loop(model(X), dict(model.named_parameters()))
    assert_close({name: block[m] for name, block in J.items()}, blocks)
assert J["0.bias"].shape == (M, N, C, 7)
print(f"Each of {M} models: right, {M * N * C} rows.")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - Write ``f(params, x)`` of one sample that returns what you want rows for, and no
#   more. ``vmap(jacrev(f))`` keeps its tree and its axes.
# - Count rows times bytes of the parameters before you compute.
# - What ``vmap`` refuses is a decision, a draw or a write inside the forward pass: move
#   it out, or go sample by sample.
#
# Next: ``trust/check_a_jacobian.py`` checks what you computed. The alternative:
# ``scale/universal_jacobian.py`` has one function that finds its way for any model with
# outputs ``[N, C]``.
