r"""
Training predicted: the neural tangent kernel
=============================================

After this page you can say what a wide network will answer after training, at every
step, before you train it. You also get the eigenvalues and eigenvectors of its
Gauss-Newton matrix without building that matrix, and you know when float32 spoils them.
"""

# fold: Imports
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

# %%
# Outcome of training
# -------------------
#
# In training, the parameters of a wide network move so little that its first-order
# expansion describes it. With the square loss, the outcome is then one linear solve
# with the empirical neural tangent kernel (NTK): the inner products of the rows of the
# Jacobian, of shape ``[N, C, N, C]``. The network tells images of the digits 3, 5 and 8
# apart: ``N = 60`` samples to train, ``M = 100`` to test, ``C = 3`` outputs. For the
# kernel alone, there is ``scale/neural_tangent_kernel.py``.

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more threads only disturb networks this small
digits, keep = load_digits(), torch.tensor([3, 5, 8])
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
images, labels = images[torch.isin(labels, keep)], labels[torch.isin(labels, keep)]


def draw_digits(seed, width):
    """Return training images, their one-hot targets, test images, and a network."""
    torch.manual_seed(seed)
    train, test = torch.randperm(len(images))[:160].split([60, 100])
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))
    return images[train], 1.0 * (labels[train, None] == keep), images[test], model


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def jacobian_kernel(J, other):
    """Return the inner products ``[N, C, M, C]`` of the rows of two Jacobians."""
    blocks = [(J[name].flatten(2), other[name].flatten(2)) for name in J]
    return sum(torch.tensordot(a, b, ([2], [2])) for a, b in blocks)


X, targets, Z, model = draw_digits(seed=0, width=256)
J, J_test = vmap_jacrev(model, X), vmap_jacrev(model, Z)
K, K_test = jacobian_kernel(J, J), jacobian_kernel(J_test, J)
error, start = (targets - model(X)).detach(), model(Z).detach()
outcome = start + torch.tensordot(K_test, torch.linalg.tensorsolve(K, error), 2)
print("Digits read at the start:", keep[start[:12].argmax(1)].tolist())
print("Predicted after training:", keep[outcome[:12].argmax(1)].tolist())

# %%
# Every step in closed form
# -------------------------
#
# Gradient descent on half the sum of squares, with step length :math:`\eta`, shrinks
# the error along each eigenvector of the kernel by :math:`1 - \eta \lambda` a step.
# After :math:`t` steps, the share :math:`1 - (1 - \eta \lambda)^t` of it is learned:
#
# .. math::
#
#     f_t = f_0 + K_* \, U \, \frac{1 - (1 - \eta \Lambda)^t}{\Lambda} \,
#     U^\top (y - f_0)
#
# with :math:`K = U \Lambda U^\top`, and :math:`K_*`, of shape ``[M, C, N, C]``, between
# test and training samples. One eigendecomposition serves all steps. ``expm1`` keeps
# the fraction right where :math:`\lambda` is tiny. For ``nn.MSELoss()``, which is a
# mean, pass ``lr * 2 / (N * C)``.


def predicted_change(K, K_test, error, lr, steps):
    """Return the change of the test outputs, ``[len(steps), M, C]``.

    ``K [N, C, N, C]`` and ``K_test [M, C, N, C]`` are kernels, ``error [N, C]`` is the
    targets minus the outputs at the start. Raises ``ValueError`` if ``lr`` is above 1 /
    largest eigenvalue.
    """
    eigenvalues, U = torch.linalg.eigh(K.flatten(0, 1).flatten(1))
    largest = eigenvalues[-1]
    if not 0 < lr * largest <= 1:
        raise ValueError(f"lr = {lr:.3g} is not between 0 and {1 / largest:.3g}")
    eigenvalues = eigenvalues.clamp(min=torch.finfo(K.dtype).eps * largest)
    t = torch.as_tensor(steps).to(K)[:, None]
    learned = -torch.expm1(torch.special.xlog1py(t, -lr * eigenvalues))
    weights = learned / eigenvalues * (error.flatten() @ U) @ U.T
    return torch.tensordot(weights.unflatten(1, error.shape), K_test, ([1, 2], [2, 3]))


def longest_step(K):
    """Return a learning rate that is safe for this kernel: 0.9 / largest eigenvalue."""
    return 0.9 / torch.linalg.eigvalsh(K.flatten(0, 1).flatten(1))[-1].item()


lr, steps = longest_step(K), torch.logspace(0, 2.5, 26).long().unique()  # 1 to 316
change = predicted_change(K, K_test, error, lr, steps)

# %%
# The reference is gradient descent on the linear model in all ``P`` parameters, here
# for 100 steps. After infinitely many, the outcome is that of the first section.

rows, rows_test = [
    torch.cat([b.flatten(2) for b in D.values()], 2) for D in (J, J_test)
]
theta = torch.zeros(rows.shape[2])
for _ in range(100):
    theta += lr * torch.tensordot(error - rows @ theta, rows, 2)
after, limit = predicted_change(K, K_test, error, lr, [100, torch.inf])
assert_close(after, rows_test @ theta)
assert_close(start + limit, outcome)
print(f"Gradient descent in {len(theta)} parameters agrees.")

# %%
# Real training
# -------------
#
# Now the network itself takes these steps. All its parameters move, and so does its
# Jacobian, which the prediction takes as fixed.

# fold: How the network is trained


def trained_outputs(model, X, targets, Z, lr, steps):
    """Train the model, in place, and return ``model(Z)`` after numbers of steps."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr), []
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        (0.5 * (model(X) - targets).square().sum()).backward()
        optimizer.step()
        if step in steps:
            outputs.append(model(Z).detach())
    return torch.stack(outputs)


# %%
# The figure shows the test image whose outputs change most.

trained = trained_outputs(model, X, targets, Z, lr, steps)
shown = change[-1].norm(dim=1).argmax()
lines, dots = trained[:, shown], (start + change)[:, shown]
same = (trained[-1].argmax(1) == outcome.argmax(1)).sum()
print(f"The predicted digit is the trained network's for {same} of {len(Z)} images.")

# %%

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
for c, color in enumerate(["#E69F00", "#56B4E9", "#009E73"]):
    ax.plot(steps, lines[:, c], color=color, linewidth=4, label=f"digit {keep[c]}")
    ax.plot(steps, dots[:, c], "k.", markersize=7)
ax.set(xscale="log", xlabel="steps of gradient descent", ylabel="output for an image")
ax.xaxis.set_major_formatter("{x:g}")
gap = (lines - dots).abs().max()
ax.set_title(f"Training (lines) and prediction (dots):\nat most {gap:.2f} apart")
ax.legend()
plt.show()

# %%
# Error of the prediction by width
# --------------------------------
#
# The wider the network, the less its Jacobian moves. We draw images and network anew
# for each seed. After the last step, the error is the norm of prediction minus trained
# network, over the norm of what training changed. Without a Jacobian, one would fit a
# linear model to the pixels, and hope that it answers as the network does.

# fold: How the widths are compared


def width_study(seed, width):
    """Return errors of prediction and linear model, and the share of equal digits."""
    X, targets, Z, model = draw_digits(seed, width)
    J, error, start = vmap_jacrev(model, X), targets - model(X), model(Z)
    K, K_test = jacobian_kernel(J, J), jacobian_kernel(vmap_jacrev(model, Z), J)
    lr, last = longest_step(K), steps[-1:]
    predicted = start + predicted_change(K, K_test, error, lr, last)
    linear = torch.tensor(KernelRidge(alpha=1).fit(X, targets).predict(Z))
    trained = trained_outputs(model, X, targets, Z, lr, last)
    outputs = torch.stack([predicted[0], linear])
    errors = (outputs - trained).flatten(1).norm(dim=1) / (start - trained).norm()
    return *errors.tolist(), (predicted.argmax(2) == trained.argmax(2)).double().mean()


# %%
# Over five seeds, the mean, and the range of the error:

seeds, widths = [1, 2, 3, 4, 5], [8, 64, 512]
results = torch.tensor(
    [[width_study(seed, width) for seed in seeds] for width in widths]
)
for width, result in zip(widths, results):
    mean, low, high = result.mean(0), result.amin(0), result.amax(0)
    spread = f"{mean[0]:.1%} ({low[0]:.1%} to {high[0]:.1%}), same class {mean[2]:.0%}"
    print(f"Width {width:3}: error {spread}; error of the linear model {mean[1]:.0%}")

# %%

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
for i, (label, color) in enumerate([("NTK", "#0072B2"), ("linear model", "#D55E00")]):
    values = results[:, :, i]
    ax.fill_between(widths, values.amin(1), values.amax(1), color=color, alpha=0.25)
    ax.loglog(widths, values.mean(1), "o-", color=color, label=label)
ax.set(xlabel="width", ylabel="error after training")
ax.set_xticks(widths, widths)
ax.set_yticks([0.05, 0.1, 0.2, 0.4], ["5 %", "10 %", "20 %", "40 %"])
ax.minorticks_off()
ax.set_title(
    f"Error of the prediction:\n{results[0, :, 0].mean():.0%} at width {widths[0]}, "
    f"{results[-1, :, 0].mean():.0%} at {widths[-1]}"
)
ax.legend()
plt.show()

# %%
# Cost
# ----
#
# - A Jacobian holds ``N * C * P`` numbers and the kernel ``(N * C) ** 2``; its
#   eigendecomposition takes of the order of ``(N * C) ** 3`` operations.
# - With many parameters, ``ntk(model, X, Z)`` from ``ntk.py`` takes the place of
#   ``jacobian_kernel``: the same kernel, for most layers without the Jacobian.
# - With many samples the kernel itself is too large. Write it in tiles:
#   ``scale/neural_tangent_kernel.py``.
#
# When not to use it
# ------------------
#
# - Training by other means: the prediction is for full-batch gradient descent on the
#   square loss, with short steps. Adam, momentum, mini-batches and the cross-entropy
#   take other paths.
# - A narrow network learns features, which a fixed Jacobian cannot. At the least width
#   above, compare with the linear model, which needs no Jacobian.
# - To predict costs a decomposition. If training is cheaper, train.
#
# Kernel of infinite width
# ------------------------
#
# With standard normal weights and no biases, let the first layer divide by the root of
# the ``D`` pixels, and the last by the root of half the width. This is the NTK
# parametrization. The kernel of two images at angle :math:`\varphi` tends to
#
# .. math::
#
#     \frac{|x| \, |z|}{\pi D} \left( \sin\varphi
#     + 2 (\pi - \varphi) \cos\varphi \right)
#
# for each output, and to zero between two outputs. The code divides the inputs and the
# kernel in place of the layers: with ReLU, that is the same. PyTorch's own
# initialization has no such limit, and the prediction above does not need one.


def arc_cosine_ntk(X, Z):
    """Return the NTK ``[N, M]`` of one infinitely wide ReLU layer, for each output."""
    lengths = torch.outer(X.norm(dim=1), Z.norm(dim=1)) / X.shape[1]
    cosine = nn.functional.normalize(X) @ nn.functional.normalize(Z).T
    angle = cosine.clamp(-1, 1).acos()
    return lengths / torch.pi * (angle.sin() + 2 * (torch.pi - angle) * cosine)


limit = torch.einsum("nm,cd->ncmd", arc_cosine_ntk(X[:8], X[:8]), torch.eye(3))
for width in widths:
    errors = torch.zeros(len(seeds))
    for i in range(len(seeds)):
        layers = nn.Linear(64, width, bias=False), nn.Linear(width, 3, bias=False)
        for layer in layers:
            nn.init.normal_(layer.weight)
        J = vmap_jacrev(nn.Sequential(layers[0], nn.ReLU(), layers[1]), X[:8] / 64**0.5)
        errors[i] = (jacobian_kernel(J, J) * 2 / width - limit).norm() / limit.norm()
    spread = f"{errors.mean():.2f} ({errors.min():.2f} to {errors.max():.2f})"
    print(f"Width {width:3}: the kernel is off by {spread}")

# %%
# Eigenvectors of the Gauss-Newton matrix
# ---------------------------------------
#
# The Gauss-Newton matrix ``J^T J``, of shape ``[P, P]``, and the kernel ``J J^T`` share
# all eigenvalues but zeros. If :math:`u` is an eigenvector of the kernel, then
# :math:`J^\top u / \sqrt{\lambda}` is one of the Gauss-Newton matrix, of length 1. The
# product :math:`J^\top u` is one backward pass, without a Jacobian.


def gauss_newton_eigenvectors(model, X, K, k):
    """Return the ``k`` largest eigenvalues, falling, and ``{name: [k, *p.shape]}``.

    Raises ``ValueError`` if one of them cannot be told from rounding.
    """
    fs, params = model(X), dict(model.named_parameters())
    params = {name: p for name, p in params.items() if p.requires_grad}
    eigenvalues, U = torch.linalg.eigh(K.flatten(0, 1).flatten(1))
    eigenvalues, U = eigenvalues.flip(0), U.flip(1)
    rank = (eigenvalues > len(U) * torch.finfo(K.dtype).eps * eigenvalues[0]).sum()
    if k > rank:
        raise ValueError(f"k = {k}, but only {rank} eigenvalues are above rounding")
    us = (U / eigenvalues.sqrt())[:, :k].T.unflatten(1, fs.shape)
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    vectors = [autograd.grad(fs, params.values(), u, **options) for u in us]
    return eigenvalues[:k], dict(zip(params, map(torch.stack, zip(*vectors))))


# %%
# A narrow network keeps ``[P, P]`` small enough for the reference. The log determinant
# of ``I + J^T J``, which the evidence of a Bayesian network asks for, comes from the
# kernel, too.

few, k = images[:160] - images[:160].mean(0), 5
narrow = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
J = vmap_jacrev(narrow, few)
top, vectors = gauss_newton_eigenvectors(narrow, few, jacobian_kernel(J, J), k)

rows = torch.cat([b.flatten(2) for b in J.values()], 2).flatten(0, 1)
NC, P = rows.shape
values, reference = torch.linalg.eigh(rows.T @ rows)
assert_close(top, values[-k:].flip(0))
found = torch.cat([v.flatten(1) for v in vectors.values()], 1)
assert_close((found @ reference[:, -k:].flip(1)).abs(), torch.eye(k))  # up to sign
logdet = torch.logdet(torch.eye(NC) + rows @ rows.T)
assert_close(logdet, torch.logdet(torch.eye(P) + rows.T @ rows))
print(f"{k} eigenvectors and the log determinant {logdet:.1f} agree, P = {P}.")

# %%
# Rank, and where float32 breaks
# ------------------------------
#
# The rank counts the directions in parameter space that the outputs can see. It is
# below both ``N * C`` and ``P``: some pixels are blank in all images, and what one
# layer scales up, the next can scale down. A kernel squares the ratios of singular
# values, so in float32 it sees fewer directions than ``J`` does. Build it in float64,
# or add more to its diagonal than the rounding of its largest eigenvalue.

single = rows.float()
matrices = rows, rows @ rows.T, single, single @ single.T
ranks = [torch.linalg.matrix_rank(matrix).item() for matrix in matrices]
assert ranks[0] == ranks[1] < min(NC, P)
print(f"Rank of J {list(rows.shape)}: {ranks[0]}, of its kernel: {ranks[1]}.")
print(f"In float32: {ranks[2]} and {ranks[3]}.")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
#
# - The kernel ``J J^T`` predicts training by gradient descent, the better the wider.
# - It has the eigenvalues, the eigenvectors and the log determinant of ``J^T J``.
# - It squares what is small: build it in float64.
#
# Next: ``scale/neural_tangent_kernel.py`` makes the kernel of larger networks. The
# alternative: ``use/error_bars.py`` takes ``J`` after the training, for error bars.
