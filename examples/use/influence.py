r"""
Influence of training samples
=============================

After this page you can say how the test loss would change had a trained classifier
never seen one of its training samples, for all samples at once and without training
again. You find the samples that help or harm an answer, with the whole Jacobian or with
a random projection of it.
"""

# fold: Imports
import copy
import warnings
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close

# %%
# Network at its optimum
# ----------------------
#
# The digits 3, 5 and 8 go through a small network with a smooth activation. Two things
# make a prediction possible. The weights are at an optimum for the whole training set,
# reached with L-BFGS until the gradient is small. And weight decay keeps the matrix of
# second derivatives invertible: ``decay / 2`` times the squared norm, beside the sum of
# all losses, or ``decay / N`` as the ``weight_decay`` of Adam with a mean loss.
#
# Your own network, from Adam or AdamW, is not at its optimum: ``from influence import
# influence, optimum``, and train a copy on, ``optimum(copy.deepcopy(model).double(),
# X.double(), y, decay=10.0)``: with less decay than here, one step tells less. See
# whether it still predicts the same. With ReLU the gradient need not vanish: take the
# last layer alone, ``model[:-1].requires_grad_(False)``. The scores then tell what
# another fit of this layer would do, and nothing of the layers before it.

# fold: Jacobian, data, and training
torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # faster for matrices this small
digits = load_digits()
among = np.isin(digits.target, (3, 5, 8))
images = torch.from_numpy(digits.data[among]) / 16
targets = torch.from_numpy(np.searchsorted((3, 5, 8), digits.target[among]))
N, C = 150, 3


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


def optimum(model, X, y, decay, steps=500):
    """Minimize the sum of losses + decay / 2 |p|^2 in place, and return the model.

    Raises ``ValueError`` if ``y`` holds no labels ``[N]``.
    """
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"y must be labels [N], but is {list(y.shape)}, {y.dtype}")
    options = {"tolerance_grad": 3e-4, "tolerance_change": 0, "history_size": 50}
    options |= {"max_iter": steps, "line_search_fn": "strong_wolfe"}
    lbfgs = torch.optim.LBFGS(model.parameters(), **options)

    def objective():
        lbfgs.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = cross_entropy(model(X), y, reduction="sum") + decay / 2 * squares
        loss.backward()
        return loss

    lbfgs.step(objective)
    return model


def trained_network(seed, decay, steps=500):
    """Return a trained model, and images and labels to train and to test."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, C))
    order = torch.randperm(len(images))
    X, X_test = images[order].split([N, len(images) - N])
    y, y_test = targets[order].split([N, len(images) - N])
    return optimum(model, X, y, decay, steps), X, y, X_test, y_test


# %%

decay = 10.0
model, X, y, X_test, y_test = trained_network(seed=1, decay=decay)
norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
accuracy = (model(X_test).argmax(1) == y_test).double().mean()
print(f"Test accuracy {accuracy:.2f}. Gradient norm below 0.01: {norm < 0.01}.")

# %%
# Step of the parameters without a sample
# ---------------------------------------
#
# Let ``J [N, C, P]`` be the Jacobian, ``e [N, C]`` the first derivative of each
# sample's loss by its outputs, and ``L [N, C, C]`` the second. The generalized
# Gauss-Newton matrix :math:`G = \sum_n J_n^\top L_n J_n + \lambda I`, of shape ``[P,
# P]``, stands for the second derivative of the objective. One Newton step leads from
# the optimum to the one without sample :math:`n`:
#
# .. math::
#
#     \Delta_n &= (G - J_n^\top L_n J_n)^{-1} J_n^\top e_n \\
#              &= G^{-1} J_n^\top (I - L_n J_n G^{-1} J_n^\top)^{-1} e_n
#
# The first form inverts a ``[P, P]`` matrix for each sample. The second inverts one for
# all samples, and a ``[C, C]`` matrix for each. For a linear model and the square loss
# the step is exact.


def gauss_newton(rows, L, decay):
    """Return ``G [P, P]`` of rows ``[N, C, P]`` and ``L [N, C, C]``."""
    G = rows.flatten(0, 1).T @ (L @ rows).flatten(0, 1)
    return G + decay * torch.eye(len(G)).to(G)


def steps_without(rows, L, e, decay):
    """Return ``[N, P]``: how the parameters change if sample n is left out.

    The parameters minimize the sum of the losses of all samples plus ``decay / 2``
    times the squared distance to a fixed point. ``rows [N, C, P]`` is the Jacobian,
    ``e [N, C]`` and ``L [N, C, C]`` are the loss's derivatives by the outputs.
    """
    N, C, P = rows.shape
    G = gauss_newton(rows, L, decay)
    solved = torch.linalg.solve(G, rows.flatten(0, 1).T).T.view(N, C, P)
    left = torch.eye(C).to(rows) - L @ rows @ solved.transpose(1, 2)
    return torch.einsum("nc,ncp->np", torch.linalg.solve(left, e), solved)


# %%
# What goes into it, and the gradient of the test loss:


def derivatives(fs, y):
    """Return e [N, C] and L [N, C, C] of the cross entropy at outputs fs [N, C]."""
    p = fs.detach().softmax(1)
    return p - one_hot(y, p.shape[1]), torch.diag_embed(p) - p[:, :, None] * p[:, None]


def flat(jacobian):
    """Return the rows ``[N, C, P]`` of ``{name: [N, C, *p.shape]}``."""
    return torch.cat([block.flatten(2) for block in jacobian.values()], 2)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model, X, y):
    """Return the gradient of the mean loss, ``[P]``."""
    if y.shape != X.shape[:1]:
        shapes = f"{list(y.shape)} for inputs {list(X.shape)}"
        raise ValueError(f"labels must have the shape [N], but have {shapes}")
    grads = autograd.grad(cross_entropy(model(X), y), trained(model))
    return torch.cat([g.flatten() for g in grads])


# %%
# The gradient of the mean test loss times a step is the change to expect. A positive
# number says that the test loss rises without the sample: it helps.


def influence(model, X, y, X_test, y_test, decay):
    """Return ``[N]``: by how much the mean test loss grows without sample n.

    ``model(X) [N, C]`` are logits, trained on labels ``y [N]`` as ``optimum`` does.
    ``y_test`` are the true labels, or others whose loss you ask about. Needs memory for
    the Jacobian and a matrix ``[P, P]``. Raises ``ValueError`` if the model is not at
    its optimum, or labels have another shape.
    """
    with unchanged(model):
        theta = torch.cat([p.detach().flatten() for p in trained(model)])
        slope = len(X) * gradient(model, X, y) + decay * theta
        pull = decay * theta.norm()
        if not slope.norm() < 0.1 * pull:
            off = f"a gradient of {slope.norm():.2g}, of the decay {pull:.2g}"
            raise ValueError(f"model not at its optimum: {off}. Call optimum(...)")
        e, L = derivatives(model(X).double(), y)
        steps = steps_without(flat(vmap_jacrev(model, X)).double(), L, e, decay)
        return steps @ gradient(model, X_test, y_test).double()


scores = influence(model, X, y, X_test, y_test, decay)
print(f"{(scores > 0).sum()} of {N} training digits help, {(scores < 0).sum()} harm.")

# %%
# Why does the network say what it says? Ask about the label that it predicts. These
# training digits are behind its first answer:

x = X_test[:1]  # a batch of one
said = model(x).argmax(1)
most = influence(model, X, y, x, said, decay).argsort(descending=True)[:5]
print(f"It says {(3, 5, 8)[said]}, due to digits {most.tolist()}")
print(f"with the labels {[(3, 5, 8)[label] for label in y[most]]}.")

# %%
# Each step agrees with the one from a matrix without the sample.

e, L = derivatives(model(X), y)
rows = flat(vmap_jacrev(model, X))
steps = steps_without(rows, L, e, decay)
n = scores.argmax()
G = gauss_newton(rows, L, decay) - rows[n].T @ L[n] @ rows[n]
assert_close(steps[n], torch.linalg.solve(G, rows[n].T @ e[n]))
assert_close(steps @ gradient(model, X_test, y_test), scores)
print("The step for the most helpful digit agrees.")

# %%
# Retrained without a sample
# --------------------------
#
# Now the truth: we leave out the digit of the largest score, train again from the
# optimum, and measure the loss. Check a few of yours like this.


def retrained(model, X, y, decay, left_out):
    """Return a copy of the model, trained on from here without the samples left out."""
    keep = ~torch.isin(torch.arange(len(X)), left_out)
    return optimum(copy.deepcopy(model), X[keep], y[keep], decay)


other, (n,) = retrained(model, X, y, decay, most[:1]), most[:1].tolist()
with torch.no_grad():
    measured = cross_entropy(other(x), said) - cross_entropy(model(x), said)
predicted = influence(model, X, y, x, said, decay)[n]
print(f"Without digit {n}: loss {measured:+.4f}, predicted {predicted:+.4f}")

# %%
# The same for ten random digits of five networks, and the test loss. Two simpler scores
# need no ``G``: the product of the sample's gradient and that of the test loss, and the
# sample's own loss.

# fold: Training again, for five seeds


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def retraining_study(seed, decay=decay, steps=500, count=10):
    """Return predictions {name: [count]} and measured changes [count] of a seed."""
    model, X, y, X_test, y_test = trained_network(seed, decay, steps)
    e, L = derivatives(model(X), y)
    rows, g = flat(vmap_jacrev(model, X)), gradient(model, X_test, y_test)
    left_out = torch.randperm(N)[:count]
    guesses = {
        "influence": steps_without(rows, L, e, decay) @ g,
        "gradients": torch.einsum("nc,ncp,p->n", e, rows, g),
        "own loss": cross_entropy(model(X), y, reduction="none").detach(),
    }
    others = [retrained(model, X, y, decay, n) for n in left_out]
    with torch.no_grad():
        losses = [cross_entropy(net(X_test), y_test) for net in [model, *others]]
    change = torch.stack(losses[1:]) - losses[0]
    return {name: guess[left_out] for name, guess in guesses.items()}, change


# %%

studies = [retraining_study(seed) for seed in range(5)]
for name in "own loss", "gradients", "influence":
    each = [correlation(guess[name], change) for guess, change in studies]
    text = ", ".join(f"{value:.2f}" for value in each)
    print(f"{name}: correlation with the measured change {text}")

# %%
# All seeds in one picture. Ranks are more reliable than sizes: where the second
# derivatives of the network matter, the step has another length.

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
for guess, change in studies:
    predicted = 1e3 * guess["influence"]
    ax.scatter(predicted, 1e3 * change, s=50, color="#0072B2", alpha=0.4, linewidth=0)
ax.axline((0, 0), slope=1, color="black", linestyle="--", label="equal")
ax.set(xlabel="predicted change of the test loss / 0.001", ylabel="measured / 0.001")
ax.legend()
ax.set_title(f"Predicted against retrained:\ncorrelation {min(each):.2f} or more")
plt.show()

# %%
# Digits that help and digits that harm
# -------------------------------------
#
# Which training digits are to blame for a wrong answer? The gradient of that test
# digit's own loss takes the place of the mean. For each test digit that the network
# gets wrong, we leave out the ten most harmful, train again, and compare with ten
# random ones. (``m`` has shape ``[1]``, so ``X_test[m]`` is a batch of one.)

wrong, right = (model(X_test).argmax(1) != y_test).nonzero(), [0, 0]
for m in wrong:
    order = (steps @ gradient(model, X_test[m], y_test[m])).argsort()
    for i, group in enumerate([order[:10], torch.randperm(N)[:10]]):
        other = retrained(model, X, y, decay, group)
        right[i] += (other(X_test[m]).argmax() == y_test[m]).item()
print(
    f"{right[0]} of {len(wrong)} wrong answers turn right without the 10 most harmful"
)
print(f"digits, {right[1]} without 10 random ones.")

# %%
# A harmful digit typically looks like the test digit and has another label: the label
# that the network gives by mistake. Here is the last of the wrong ones.

# fold: The picture of the digits
fig, axes = plt.subplots(1, 7, figsize=(5, 1.6), layout="constrained")
extremes = torch.cat([order[-3:].flip(0), order[:3]])
shown = torch.cat([X_test[m], X[extremes]]).view(-1, 8, 8).numpy()
labels = torch.cat([y_test[m], y[extremes]])
names = ["test"] + 3 * ["helps"] + 3 * ["harms"]
for ax, image, label, name in zip(axes, shown, labels, names):
    ax.imshow(image, cmap="gray_r")
    ax.set(xticks=[], yticks=[], xlabel=f"{name}\n{(3, 5, 8)[label]}")
fig.suptitle("A test digit, and the training digits\nthat help and harm it most")
plt.show()

# %%
# Random projections
# ------------------
#
# ``G`` has ``P * P`` numbers. Multiply the rows with a random matrix of shape ``[P,
# k]``, and they have ``k`` columns and nearly the same inner products. The block of a
# parameter is drawn from a seed when its turn comes, and dropped: it is never stored,
# and is the same for every chunk of samples. `TRAK <https://arxiv.org/abs/2303.14186>`_
# attributes with projected gradients.


def project(jacobian, k, seed):
    """Return ``[N, C, k]`` from ``{name: [N, C, *p.shape]}``, the same for a seed."""
    projected, generator = 0, torch.Generator().manual_seed(seed)
    for block in jacobian.values():
        block = block.flatten(2)
        random = torch.randn(block.shape[2], k, generator=generator).to(block)
        projected = projected + block @ random / k**0.5
    return projected


jacobian = vmap_jacrev(model, X)
test = autograd.grad(cross_entropy(model(X_test), y_test), model.parameters())
test = {name: g[None, None] for name, g in zip(jacobian, test)}
sizes, found = (32, 128, 512), {}
for k in sizes:
    found[k] = []
    for seed in range(3):
        small = steps_without(project(jacobian, k, seed), L, e, decay)
        found[k].append(correlation(small @ project(test, k, seed)[0, 0], scores))
    values = ", ".join(f"{value:.2f}" for value in found[k])
    print(f"k = {k} of P = {rows.shape[2]}: correlation with the exact scores {values}")

parts = [project(vmap_jacrev(model, part), 32, seed=0) for part in X.split(40)]
assert_close(torch.cat(parts), project(jacobian, 32, seed=0))

# %%

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
ax.plot(sizes, list(found.values()), "o", color="#0072B2", markersize=9)
ax.set_xscale("log", base=2)
ax.set(xticks=sizes, xticklabels=sizes)
ax.set(xlabel="columns k of the projected Jacobian", ylabel="correlation")
ax.set_title("More columns, closer to the exact scores\n(three seeds)")
plt.show()

# %%
# Cost
# ----
#
# - The rows have ``N * C * P`` numbers. If they do not fit,
#   ``scale/jacobians_without_memory.py`` writes them to disk, in checked chunks, and
#   ``G`` is the sum of those of the chunks.
# - Where layers are wide, ``batched_jacobian`` from ``batched_jacobian.py`` goes in the
#   place of ``vmap_jacrev``: same arguments, same result.
# - ``G`` takes ``N * C * P * P`` operations to form and ``P * P * P`` to solve. With
#   many parameters, project, or take the same step from the ``[N * C, N * C]`` kernel:
#   ``scale/neural_tangent_kernel.py``.
#
# When not to use it
# ------------------
#
# - The network is not at its optimum: what training would still change hides what the
#   sample does. Below, we stop after 5 steps.
# - The weight decay is weak: where the loss is flat, one step is not enough. Some seeds
#   fail then, such as the one that we take below.
# - You look for wrong labels: try the plain loss of each training sample first.
# - You leave out many samples at once: their steps do not add up. Train again.

for seed, name, value in (0, "steps", 5), (3, "decay", 1.0):
    guess, change = retraining_study(seed, **{name: value}, count=8)
    each = correlation(guess["influence"], change)
    print(f"{name} = {value}: correlation {each:.2f} with the measured change")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
#
# - One Newton step per sample predicts what training without it would do.
# - Train to the optimum with a decay, and check a few samples by training again.
# - A random projection replaces the rows when they do not fit.
#
# Next: ``use/active_learning.py``, which samples to add instead. The alternative:
# ``use/private_training.py``, which bounds what any sample can do.
