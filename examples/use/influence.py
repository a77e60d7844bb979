r"""
Influence of training samples
=============================

After this page you can say what a trained network would answer had it never seen one of
its training samples, for all samples at once and without training again. You find the
samples that help or harm an answer, with a Jacobian in memory, projected, or on disk.
"""

import copy
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import roc_auc_score
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close

# %%
# Leave-one-out residuals of a linear layer
# -----------------------------------------
#
# Take a linear layer at the least sum of squares, with residuals ``e [N, C]``. Its
# Jacobian ``J`` has one row of ``P`` numbers for each sample, since ``C`` is 1. The
# leverage ``h [N]`` is the diagonal of :math:`J (J^\top J)^{-1} J^\top`. Fit again
# without sample ``n``, and its residual is exactly ``e / (1 - h)``.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def flat(jacobian):
    """Return the rows ``[N, C, P]`` of ``{name: [N, C, *p.shape]}``."""
    return torch.cat([block.flatten(2) for block in jacobian.values()], 2)


torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # faster for matrices this small
X, y = map(torch.from_numpy, load_diabetes(return_X_y=True))
linear = nn.Linear(X.shape[1], 1)
rows = flat(vmap_jacrev(linear, X))[:, 0]  # [N, P]
e = rows @ torch.linalg.lstsq(rows, y).solution - y
h = (rows * torch.linalg.solve(rows.T @ rows, rows.T).T).sum(1)
predicted = e / (1 - h)
print(f"Largest residual {e.abs().max():.0f}, and {predicted.abs().max():.0f} without.")

# %%
# We fit again without each sample in turn.

refit = torch.empty_like(e)
for n in range(len(X)):
    keep = torch.arange(len(X)) != n
    refit[n] = rows[n] @ torch.linalg.lstsq(rows[keep], y[keep]).solution - y[n]
assert_close(predicted, refit)
print(f"e / (1 - h) agrees with {len(X)} fits.")

# %%
# Step of the parameters without a sample
# ---------------------------------------
#
# A network has ``C`` outputs and a loss of its own. Let ``e [N, C]`` be the first
# derivative of each sample's loss by its outputs, and ``L [N, C, C]`` the second. The
# generalized Gauss-Newton matrix :math:`G = \sum_n J_n^\top L_n J_n + \lambda I`, of
# shape ``[P, P]``, stands for the second derivative of the objective. Where the
# gradient of the objective is zero, one Newton step leads to the optimum without
# sample :math:`n`:
#
# .. math::
#
#     \Delta_n = (G - J_n^\top L_n J_n)^{-1} J_n^\top e_n
#              = G^{-1} J_n^\top (I - L_n J_n G^{-1} J_n^\top)^{-1} e_n
#
# The right side inverts one ``[P, P]`` matrix for all samples, and one ``[C, C]``
# matrix for each. The matrix in the second bracket is ``1 - h`` again.


def gauss_newton(rows, L, decay):
    """Return ``G [P, P]`` of rows ``[N, C, P]`` and ``L [N, C, C]``."""
    eye = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
    return rows.flatten(0, 1).T @ (L @ rows).flatten(0, 1) + decay * eye


def steps_without(rows, L, e, decay):
    """Return ``[N, P]``: how the parameters change if sample n is left out.

    The parameters minimize the sum of the losses of all samples plus ``decay / 2``
    times the squared distance to a fixed point. ``rows [N, C, P]`` is the Jacobian,
    ``e [N, C]`` and ``L [N, C, C]`` are the loss's derivatives by the outputs.
    """
    N, C, P = rows.shape
    if e.shape != (N, C) or L.shape != (N, C, C):
        shapes = f"e {list(e.shape)}, L {list(L.shape)}"
        raise ValueError(f"rows {list(rows.shape)} do not fit to {shapes}")
    G = gauss_newton(rows, L, decay)
    solved = torch.linalg.solve(G, rows.flatten(0, 1).T).T.view(N, C, P)
    leverage = L @ rows @ solved.transpose(1, 2)
    eye = torch.eye(C, dtype=rows.dtype, device=rows.device)
    corrected = torch.linalg.solve(eye - leverage, e)
    return torch.einsum("nc,ncp->np", corrected, solved)


steps = steps_without(rows[:, None], torch.ones(len(X), 1, 1), e[:, None], decay=0)
assert_close(e + (rows * steps).sum(1), refit)
print("The step of the parameters gives the same residuals.")

# %%
# Network at its optimum
# ----------------------
#
# The digits 3, 5 and 8 go through a small network with a smooth activation. Two things
# make the prediction possible. The weights are at an optimum of the whole training set,
# reached with L-BFGS until the gradient is small. And a decay holds each weight near
# the ``start``, as in fine-tuning. Its pull keeps ``G`` away from singular.

# fold: Data, network and training
digits = load_digits()
among = np.isin(digits.target, (3, 5, 8))
images = torch.from_numpy(digits.data[among]) / 16
targets = torch.from_numpy(np.searchsorted((3, 5, 8), digits.target[among]))
N, C, decay = 150, 3, 10


def train_to_optimum(model, start, X, y, decay, steps=500):
    """Minimize sum of losses + decay / 2 |p - start|^2; return the gradient's norm."""
    params = list(model.parameters())
    options = {"tolerance_grad": 1e-4, "tolerance_change": 0, "history_size": 50}
    lbfgs = torch.optim.LBFGS(
        params, max_iter=steps, line_search_fn="strong_wolfe", **options
    )

    def objective():
        lbfgs.zero_grad()
        distance = sum((p - s).square().sum() for p, s in zip(params, start))
        loss = cross_entropy(model(X), y, reduction="sum") + decay / 2 * distance
        loss.backward()
        return loss

    lbfgs.step(objective)
    return torch.cat([p.grad.flatten() for p in params]).norm().item()


def trained_network(seed, steps=500):
    """Return a trained model, its start, and images and labels to train and to test."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, C))
    order = torch.randperm(len(images))
    X, X_test = images[order].split([N, len(images) - N])
    y, y_test = targets[order].split([N, len(images) - N])
    start = [p.detach().clone() for p in model.parameters()]
    norm = train_to_optimum(model, start, X, y, decay, steps)
    return model, start, X, y, X_test, y_test, norm


model, start, X, y, X_test, y_test, norm = trained_network(seed=0)
accuracy = (model(X_test).argmax(1) == y_test).double().mean()
print(f"Test accuracy {accuracy:.2f}. Gradient norm below 0.01: {norm < 0.01}.")

# %%
# Predicted change of the test loss
# ---------------------------------
#
# The gradient of the mean test loss times a step is the change to expect. A positive
# number says that the test loss rises without the sample: it helps.


def derivatives(fs, y):
    """Return e [N, C] and L [N, C, C] of the cross entropy at outputs fs [N, C]."""
    p = fs.detach().softmax(1)
    return p - one_hot(y, p.shape[1]), torch.diag_embed(p) - p[:, :, None] * p[:, None]


def gradient(model, X, y):
    """Return the gradient of the mean loss, ``[P]``."""
    grads = autograd.grad(cross_entropy(model(X), y), model.parameters())
    return torch.cat([g.flatten() for g in grads])


e, L = derivatives(model(X), y)
rows = flat(vmap_jacrev(model, X))
steps = steps_without(rows, L, e, decay)
scores = steps @ gradient(model, X_test, y_test)
print(
    f"Of {N} training digits, {(scores > 0).sum()} help and {(scores < 0).sum()} harm."
)

n = scores.argmax()
G = gauss_newton(rows, L, decay) - rows[n].T @ L[n] @ rows[n]
assert_close(steps[n], torch.linalg.solve(G, rows[n].T @ e[n]))
print("The step agrees with the one from a matrix without the sample.")

# %%
# Retrained without a sample
# --------------------------
#
# Now the truth: we leave out one of 15 random digits, train again from the optimum, and
# measure the test loss. We repeat it with other digits and weights. What people do
# without ``G`` is to multiply the two gradients, or to look at the sample's own loss.

# fold: Training again, for three seeds


def retrained(model, start, X, y, keep):
    """Return a copy of the model, trained on from here with the samples in keep."""
    model = copy.deepcopy(model)
    train_to_optimum(model, start, X[keep], y[keep], decay)
    return model


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def retraining_study(seed, steps=500, count=15):
    """Return predictions {name: [count]} and measured changes [count] of a seed."""
    model, start, X, y, X_test, y_test, _ = trained_network(seed, steps)
    e, L = derivatives(model(X), y)
    rows, g = flat(vmap_jacrev(model, X)), gradient(model, X_test, y_test)
    left_out = torch.randperm(N)[:count]
    guesses = {
        "influence": steps_without(rows, L, e, decay) @ g,
        "gradients": torch.einsum("nc,ncp,p->n", e, rows, g),
        "own loss": cross_entropy(model(X), y, reduction="none").detach(),
    }
    with torch.no_grad():
        before = cross_entropy(model(X_test), y_test)
    change = []
    for n in left_out:
        other = retrained(model, start, X, y, torch.arange(N) != n)
        with torch.no_grad():
            change.append(cross_entropy(other(X_test), y_test) - before)
    return {k: guess[left_out] for k, guess in guesses.items()}, torch.stack(change)


studies = [retraining_study(seed) for seed in range(3)]
for name in studies[0][0]:
    each = [correlation(guess[name], change) for guess, change in studies]
    text = ", ".join(f"{value:.2f}" for value in each)
    print(f"{name}: correlation with the measured change {text} (seeds 0, 1, 2)")
    if name == "influence":
        least = min(each)

# %%
# The picture has the three seeds in three colors. Ranks are more reliable than sizes:
# where the second derivatives of the network matter, the step has another length.

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (guess, change), color in zip(studies, ("#0072B2", "#E69F00", "#009E73")):
    x, y_measured = (1e3 * guess["influence"]).tolist(), (1e3 * change).tolist()
    ax.scatter(x, y_measured, s=50, color=color)
ax.axline((0, 0), slope=1, color="black", linewidth=2, linestyle="--")
ax.set(xlabel="predicted change of the test loss / 0.001", ylabel="retrained / 0.001")
ax.set_title(f"Predicted against retrained: correlation {least:.2f} or more")
plt.show()

# %%
# Digits that help and digits that harm
# -------------------------------------
#
# Which training digits are to blame for a wrong answer? The gradient of that test
# digit's own loss takes the place of the mean. For each test digit that the network
# gets wrong, we leave out the ten most harmful, train again, and compare with ten
# random ones.


def right_without(group, x, y_true):
    """Return whether the network trained without this group gets x right."""
    keep = torch.ones(N, dtype=torch.bool)
    keep[group] = False
    return retrained(model, start, X, y, keep)(x).argmax(1).eq(y_true).item()


wrong = (model(X_test).argmax(1) != y_test).nonzero()[:, 0]
orders, right = [], {"harmful": 0, "random": 0}
for m in wrong:
    x, y_true = X_test[m, None], y_test[m, None]
    orders.append((steps @ gradient(model, x, y_true)).argsort())
    right["harmful"] += right_without(orders[-1][:10], x, y_true)
    right["random"] += right_without(torch.randperm(N)[:10], x, y_true)
print(
    f"Of {len(wrong)} wrong answers, {right['harmful']} turn right without the 10 most"
)
print(f"harmful digits, and {right['random']} without 10 random ones.")

# %%
# A harmful digit typically looks like the test digit and has another label: the label
# that the network gives by mistake. Here is the first of the wrong ones.

# fold: The picture of the digits
fig, axes = plt.subplots(1, 7, figsize=(6, 1.6), layout="constrained")
extremes = torch.cat([orders[0][-3:].flip(0), orders[0][:3]])
shown = torch.cat([X_test[wrong[:1]], X[extremes]]).view(-1, 8, 8).tolist()
labels = torch.cat([y_test[wrong[:1]], y[extremes]])
names = ["test"] + 3 * ["helps"] + 3 * ["harms"]
for ax, image, label, name in zip(axes, shown, labels, names):
    ax.imshow(image, cmap="gray_r")
    ax.set(xticks=[], yticks=[], xlabel=f"{name}: {(3, 5, 8)[label]}")
fig.suptitle("A test digit, and the training digits that help and harm it most")
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
    first = next(iter(jacobian.values()))
    options = {"dtype": first.dtype, "device": first.device}
    generator = torch.Generator(first.device).manual_seed(seed)
    projected = torch.zeros(*first.shape[:2], k, **options)
    for block in jacobian.values():
        block = block.flatten(2)
        random = torch.randn(block.shape[2], k, generator=generator, **options)
        projected += block @ random / k**0.5
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
print("Chunks of 40 samples have the same projection.")

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for k in sizes:
    ax.scatter([k] * 3, found[k], s=70, color="#0072B2")
ax.plot(sizes, [np.mean(found[k]) for k in sizes], linewidth=3, color="#0072B2")
ax.set_xscale("log", base=2)
ax.set(xticks=sizes, xticklabels=sizes, ylim=(0, 1.05))
ax.set(xlabel="columns k of the projected Jacobian", ylabel="correlation with exact")
ax.set_title("More columns, closer to the exact scores (three seeds)")
plt.show()

# %%
# Rows on disk
# ------------
#
# If the rows do not fit in memory, write them chunk by chunk with ``numpy.memmap``, and
# read them as often as you like. Only one chunk is in memory.


def write_rows(path, model, X, chunk):
    """Write the Jacobian as rows [N, C, P] to a file and return the open array."""
    rows = None
    for n in range(0, len(X), chunk):
        part = flat(vmap_jacrev(model, X[n : n + chunk])).cpu().numpy()
        if rows is None:
            shape = len(X), *part.shape[1:]
            rows = np.memmap(path, part.dtype, "w+", shape=shape)
        rows[n : n + chunk] = part
    rows.flush()
    return rows


with tempfile.NamedTemporaryFile() as file:
    on_disk = write_rows(file.name, model, X, chunk=40)
    G = gauss_newton(rows[:0], L[:0], decay)
    for n in range(0, N, 40):
        part = torch.from_numpy(on_disk[n : n + 40])
        G += gauss_newton(part, L[n : n + 40], decay=0)
    print(f"{on_disk.nbytes / 1e6:.1f} MB are on disk, as {list(on_disk.shape)}.")
    del on_disk, part
assert_close(G, gauss_newton(rows, L, decay))
print("G from the file agrees with G from memory.")

# %%
# When not to use it
# ------------------
#
# Without convergence, the step without a sample is lost in the step that training would
# still make. We stop the training after five steps of L-BFGS.

guess, change = retraining_study(seed=0, steps=5)
print(f"After 5 steps: correlation {correlation(guess['influence'], change):.2f}")

# %%
# To find wrong labels you need no Jacobian. We change every tenth label and rank the
# digits by how much their own loss would rise without them, and by that loss itself.

flipped = torch.arange(N) % 10 == 0
y_wrong = torch.where(flipped, (y + 1) % C, y)
model_wrong = copy.deepcopy(model)
_ = train_to_optimum(model_wrong, start, X, y_wrong, decay)
e_wrong, L_wrong = derivatives(model_wrong(X), y_wrong)
rows_wrong = flat(vmap_jacrev(model_wrong, X))
steps = steps_without(rows_wrong, L_wrong, e_wrong, decay)
own = torch.einsum("nc,ncp,np->n", e_wrong, rows_wrong, steps)
plain = cross_entropy(model_wrong(X), y_wrong, reduction="none").detach()
for name, score in {"own influence": own, "plain loss": plain}.items():
    print(f"{name}: area under the ROC curve {roc_auc_score(flipped, score):.3f}")

# %%
# Costs
# -----
#
# The rows have ``N * C * P`` numbers, ``G`` has ``P * P``, takes
# ``N * C * P * P`` operations to form and ``P * P * P`` to solve. With many parameters,
# the same step comes from the ``[N * C, N * C]`` kernel, see
# ``scale/jacobians_without_memory.py``; ``scale/universal_jacobian.py`` has a faster
# Jacobian of the same shape to put in the place of ``vmap_jacrev``; or project. With
# many samples, work in chunks as above.
#
# What to take home
# -----------------
#
# - ``e / (1 - h)`` is exact for linear layers and square loss; one Newton step per
#   sample does for networks what this does for lines.
# - Train to the optimum with a decay, and check a few samples by training again.
# - A projection or a file replaces the rows when they do not fit.
#
# Next: ``scale/jacobians_without_memory.py`` has the kernel of large layers. The
# alternative: ``batched_jacobians.py`` shows other ways to the same Jacobian.
