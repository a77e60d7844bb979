r"""
Confidence of a classifier
==========================

After this page you can ask a classifier that is too sure for better probabilities, by
the linearized Laplace approximation: of all its parameters, or of the last layer alone,
also with thousands of classes.
"""

# fold: Imports
import warnings
from contextlib import contextmanager

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, nll_loss
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# The function and its precision
# ------------------------------
# ``from laplace_softmax import laplace_softmax, softmax_ggn``. Then ``H =
# softmax_ggn(model.eval(), X)`` of all training samples ``X``, once, and
# ``laplace_softmax(model, H, X_new, precision)``.
#
# - ``precision``: **choose it on held-out data**, as below, for a last layer, too. The
#   loss is cross-entropy, summed over samples, plus ``precision / 2`` times the squared
#   norm of ``theta``, a normal prior. So the ``weight_decay`` of SGD or Adam with a
#   mean loss stands for ``N * weight_decay``. But that is often far too small, and the
#   network unsure on its own data. That of AdamW is no such prior.
# - ``H`` takes ``8 P ** 2`` bytes, and a call has two more of this size: that fits
#   for some 10 000 parameters. For larger networks require gradients of the last layer
#   alone, ``model.fc`` or ``model[-1]``: ``model.requires_grad_(False)``, then
#   ``model.fc.requires_grad_(True)``. To train again: ``model.requires_grad_(True)``.
#
# The second derivatives of cross-entropy by the outputs are ``diag(p) - p p^T``,
# whatever the labels are. ``J`` carries them to the parameters: the generalized
# Gauss-Newton matrix (GGN), ``[P, P]``. With the prior on its diagonal, its inverse is
# the covariance of the parameters. We draw parameters from it, and average the softmax
# of the linear model.

# fold: Outputs, Jacobian and parameters; GGN, draws, and the mean softmax

AT_ONCE = 64  # samples whose rows are in memory


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


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


def linearized(model, X):
    """Return ``fs [N, C]``, ``J [N, C, P]`` and ``theta [P]``, without a graph."""
    theta = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    if not theta:
        raise ValueError("no parameter of the model requires a gradient")
    with unchanged(model):
        fs = model(X)
        if not isinstance(fs, torch.Tensor) or fs.ndim != 2 or len(fs) != len(X):
            got = list(fs.shape) if isinstance(fs, torch.Tensor) else type(fs).__name__
            raise ValueError(f"model(X) must be a tensor [N={len(X)}, C], but is {got}")
        J = torch.cat([J.flatten(2) for J in vmap_jacrev(model, X).values()], 2)
    return fs.detach(), J, torch.cat(theta)


def draws_of_parameters(H, draws):
    """Return ``[P, draws]``: normal numbers with the precision ``H``."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(len(H), draws, generator=generator, device="cpu").to(H)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(H).mT, draw, upper=True)


def confidence(J, fs, changes):
    """Return mean probabilities ``[N, C]`` for changes ``[P, draws]`` of parameters."""
    return (fs[..., None] + J @ changes.to(J)).softmax(1).mean(2)


def softmax_ggn(model, X):
    """Return the GGN ``[P, P]`` of the summed cross-entropy, in float64.

    The model is in eval mode, and returns logits ``[N, C]`` for its training samples
    ``X [N, ...]``. Raises ``ValueError`` if a shape does not fit, and what ``vmap``
    raises.
    """
    if not len(X):
        raise ValueError("X holds no samples")
    H = None
    for x in X.split(AT_ONCE):
        fs, J, theta = linearized(model, x)
        if fs.shape[1] < 2:
            raise ValueError(
                f"model(X) has shape {list(fs.shape)}: softmax needs C > 1"
            )
        H = theta.new_zeros(2 * theta.shape, dtype=torch.float64) if H is None else H
        p, J = fs.double().softmax(1)[..., None], J.double()
        mean = (p * J).sum(1, keepdim=True)
        H.addmm_(J.flatten(0, 1).T, (p * (J - mean)).flatten(0, 1))
    return H


# %%
# With these, the function is short.


def laplace_softmax(model, H, X_new, precision, draws=500):
    """Return probabilities ``[N_new, C]`` of classes, averaged over parameters.

    ``H [P, P]`` is ``softmax_ggn(model, X)``. The loss is the summed cross-entropy plus
    ``precision / 2`` times the squared norm of the parameters. Raises ``ValueError`` if
    a shape or a number does not fit, and what ``vmap`` raises.
    """
    if not (precision > 0 and draws > 0):
        raise ValueError(f"{precision=} and {draws=} must be positive")
    P = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if H.shape != (P, P):
        raise ValueError(f"H must be [{P}, {P}], but is {list(H.shape)}")
    if not len(X_new):
        raise ValueError("X_new holds no samples")
    with_prior = H.clone()
    with_prior.diagonal().add_(precision)
    changes = draws_of_parameters(with_prior, draws)
    new = (linearized(model, x) for x in X_new.split(AT_ONCE))
    return torch.cat([confidence(J, fs, changes) for fs, J, _ in new])


# %%
# ``load_iris`` has 150 flowers of three kinds. The model looks at two measurements of
# 100 of them. Trained for long, it is too sure: on the other 50 flowers, the negative
# log-likelihood (NLL) of Laplace is lower.

# fold: The flowers, and how the network is trained


def flower_network(X, y, steps=3000):
    """Return a network trained by these steps of Adam on the cross-entropy."""
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(X), y).backward()
        optimizer.step()
    return model


flowers, kinds = map(torch.tensor, load_iris(return_X_y=True))
flowers = ((flowers - flowers.mean(0)) / flowers.std(0))[:, -2:]
order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
(X, X_new), (y, y_new) = flowers[order].split([100, 50]), kinds[order].split([100, 50])
model = flower_network(X, y)

# %%

H = softmax_ggn(model, X)
p, fs_new = laplace_softmax(model, H, X_new, precision=3), model(X_new).detach()
print(f"NLL: softmax {cross_entropy(fs_new, y_new):.3f}", end=", ")
print(f"Laplace {nll_loss(p.log(), y_new):.3f}")

# %%
# The reference for the GGN is autograd's second derivative of the linear model's loss.

fs, J, theta = linearized(model, X)


def loss(change):  # of the linear model
    return cross_entropy(fs + J @ change, y, reduction="sum")


assert_close(H, jacrev(jacrev(loss))(torch.zeros_like(theta)))
print("The GGN is autograd's second derivative of the linear model's loss.")

# %%
# Choice of the precision
# -----------------------
# The larger the precision, the nearer to the softmax. **Take the one with the lowest
# NLL on samples that the network has not seen.** If that is the first or the last,
# go on. If none is below the softmax, the softmax is not too sure. These samples made
# the choice: for a fair NLL of it, keep others apart.
#
# The simplest rival divides all logits by one number, the temperature: try it first. It
# needs no matrix, and looks at no distance to the data.

nll = {}
for precision in 0.1, 0.3, 1, 3, 10, 30, 100:
    p = laplace_softmax(model, H, X_new, precision)
    nll[precision] = nll_loss(p.log(), y_new).item()
    print(f"{precision}: NLL {nll[precision]:.3f}, {p.amax(1).mean():.0%} sure")
choice = min(nll, key=nll.get)
scaled = {T: cross_entropy(fs_new / T, y_new).item() for T in range(1, 16)}
T = min(scaled, key=scaled.get)
print(f"chosen: {choice}. Temperature {T}: NLL {scaled[T]:.3f}")

# %%
# In the map, color is the largest probability, and points are the unseen flowers.

# fold: How the map is drawn
axis = torch.linspace(-4, 4, 81)
grid = torch.cartesian_prod(axis, axis)
found = {"softmax": model(grid).detach().softmax(1)}
found["Laplace"] = laplace_softmax(model, H, grid, choice)
losses = {"softmax": cross_entropy(fs_new, y_new).item(), "Laplace": nll[choice]}
fig, axes = plt.subplots(1, 2, figsize=(5, 3.8), sharey=True, layout="constrained")
for ax, (name, p) in zip(axes, found.items()):
    area, levels = p.amax(1).view(81, 81).T, torch.linspace(0.3, 1, 15)
    image = ax.contourf(axis, axis, area, levels, cmap="cividis")
    for kind, color in enumerate(["#E69F00", "#56B4E9", "#CC79A7"]):
        ax.scatter(*X_new[y_new == kind].T, color=color, edgecolor="black", s=25)
    ax.set_title(f"{name}: NLL {losses[name]:.2f}\non unseen flowers")
    ax.set(xlabel="petal length (sd)", aspect="equal")
axes[0].set_ylabel("petal width (sd)")
fig.colorbar(image, ax=axes, label="largest probability", location="bottom")
plt.show()

# %%
# Last layer with thousands of outputs
# ------------------------------------
# The last layer alone, with the model in ``eval()``: while its parameters are some
# 10 000, take ``laplace_softmax``, which neglects nothing. For more, let ``phi`` of
# shape ``[N, D]`` hold its inputs, and a one for the bias. Its Jacobian is ``phi``
# times the identity of the outputs, ``[N, C, C, D]``: nearly all zeros. Keep ``phi``:
# a Kronecker product ``kron(B, A)`` stands for the GGN, with ``B [C, C]`` the mean
# curvature of the loss and ``A [D, D]`` the sum of ``phi[n] phi[n]^T``. Eigenvectors of
# both turn it into a diagonal, to which the prior adds. They are found once for all
# precisions, in time ``C ** 3``. Choose one as above. Tokens are samples: of ``[N, T,
# D]`` the inputs are flattened here, flatten the logits ``[N, T, C]`` alike.


def last_inputs(model, layer, X):
    """Return ``phi [N, D]`` of the linear layer that ends the model, such as its fc."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(X)
    finally:
        hook.remove()
    a = seen[0].flatten(0, -2)
    return torch.cat([a, torch.ones_like(a[:, :1])], dim=1).detach()


def kronecker_factors(phi, fs):
    """Return ``b, U`` of B and ``a, V`` of A, from training inputs and logits."""
    if fs.ndim != 2 or len(fs) != len(phi):
        raise ValueError(f"logits {list(fs.shape)} do not fit phi {list(phi.shape)}")
    phi, p = phi.double(), fs.detach().double().softmax(1)
    B = (p.sum(0).diag() - p.T @ p) / len(p)
    return *torch.linalg.eigh(B), *torch.linalg.eigh(phi.T @ phi)


# %%
# With the factors of the training samples, and ``phi`` and logits of new ones. The
# smaller the precision, the more the product differs from the dense matrix.


def kronecker_variance(factors, phi, precision):
    """Return the variances ``[N, C]`` of ``fs @ U`` for the inputs ``phi``."""
    b, _, a, V = factors
    return (phi.to(V) @ V).square() @ (1 / (a[:, None] * b + precision))


def kronecker_softmax(factors, phi, fs, precision, draws=500):
    """Return probabilities ``[N, C]``, averaged over the last layer's parameters."""
    U, generator, means = factors[1].to(fs), torch.Generator().manual_seed(0), []
    deviations = kronecker_variance(factors, phi, precision).sqrt().to(fs)
    for f, sd in zip(fs.detach().split(8), deviations.split(8)):  # all draws of eight
        z = torch.randn(*f.shape, draws, generator=generator, device="cpu").to(f)
        means.append((f[..., None] + U @ (sd[..., None] * z)).softmax(1).mean(2))
    return torch.cat(means)


factors = kronecker_factors(last_inputs(model, model[-1], X), fs)
phi = last_inputs(model, model[-1], X_new)
_ = model[:-1].requires_grad_(False)
H_last = softmax_ggn(model, X)
for precision in 0.01, 0.3, 10:
    found = kronecker_softmax(factors, phi, fs_new, precision)
    off = (found - laplace_softmax(model, H_last, X_new, precision)).abs().max()
    print(f"precision {precision}: off by {off:.2f} or less from the dense matrix")

# %%
# The variances are those of the dense Jacobian and ``kron(B, A)``.

blocks = vmap_jacrev(model[-1], model[:-1](X).detach())
J = torch.cat([blocks["weight"], blocks["bias"][..., None]], dim=3).flatten(2)
phi, p = last_inputs(model, model[-1], X), fs.softmax(1)
product = torch.kron((p.sum(0).diag() - p.T @ p) / len(p), phi.T @ phi)
covariance = J @ (product + 0.3 * torch.eye(len(product))).inverse() @ J.mT
variance, U = kronecker_variance(factors, phi, precision=0.3), factors[1]
assert_close(U.T @ covariance @ U, variance.diag_embed())
print("They agree.")

# %%
# With 700 outputs, nothing else changes.

D, C = 128, 700
wide = nn.Sequential(nn.Linear(2, D), nn.Tanh(), nn.Linear(D, C))
phi, logits = last_inputs(wide, wide[-1], X), wide(X).detach()
p = kronecker_softmax(kronecker_factors(phi, logits), phi[:9], logits[:9], 0.3)
dense = C * C * (D + 1) * 4 / 1e9
print(f"Probabilities {list(p.shape)}. For a sample in float32, J has {dense:.1f} GB,")
print(f"and phi has {(D + 1) * 4} bytes.")
torch.set_num_threads(threads)

# %%
# Cost
# ----
# - ``softmax_ggn`` has the rows of a chunk, ``[n, C, P]``, and takes time
#   ``N * C * P ** 2``. ``laplace_softmax`` factors a matrix in time ``P ** 3``.
# - The mean over ``draws`` has an error of its own: take more to see how large it is.
# - Where layers are wide, ``batched_jacobian`` from ``batched_jacobian.py`` goes in the
#   place of ``vmap_jacrev``: same arguments, same result.
#
# When not to use it
# ------------------
# - The softmax is not too sure: no precision has a lower NLL.
# - You want good probabilities on data like yours alone: try a temperature first.
# - You look for inputs of another kind: doubt grows only where ``J`` looks. Compare
#   with the largest softmax probability on inputs that you know.
# - The network is far from a minimum: the doubt is that of the linear model.
#
# What to take home
# -----------------
# - Draw parameters around the trained ones, and average the softmax of the linear
#   model.
# - Choose the precision by the NLL on held-out samples, not by the weight decay.
# - For the last layer, keep ``phi`` and not the Jacobian.
#
# Next: ``use/training_predicted.py``, what the kernel of the rows says before the
# training. The alternative: ``use/error_bars.py``, bars for a regression.
