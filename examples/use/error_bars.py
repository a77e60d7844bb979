r"""
Error bars for a network
========================

After this page you can put error bars on the predictions of a network that is already
trained: intervals for regression, and less blind confidence for classification. You
need its Jacobian and one fit of a linear model. The method is called the linearized
Laplace approximation.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.linear_model import BayesianRidge
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# Intervals from one linear fit
# -----------------------------
# ``J`` of shape ``[N, C, P]`` holds the derivatives of ``C`` outputs by ``P``
# parameters ``theta``. With it, the network is close to a linear model in ``theta``. A
# Bayesian linear model has error bars, and scikit-learn's ``BayesianRidge`` fits one:
# the rows are those of ``J``, the targets ``Y - fs + J @ theta``. A bar has two parts,
# the noise of the data and the doubt about the parameters.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def linearized(model, X):
    """Return ``fs [N, C]``, ``J [N, C, P]`` and ``theta [P]``, without a graph."""
    fs, jacobian = model(X).detach(), vmap_jacrev(model, X)
    theta = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return fs, torch.cat([J.flatten(2) for J in jacobian.values()], 2), torch.cat(theta)


def error_bars(model, X, Y, X_new):
    """Return the standard deviation ``[N_new, C]`` of new targets, and the linear fit.

    The model maps ``X`` to ``[N, C]``, the shape of ``Y``, and is trained on them.
    """
    fs, J, theta = linearized(model, X)
    if Y.shape != fs.shape:
        raise ValueError(f"Y has shape {list(Y.shape)}, model(X) {list(fs.shape)}")
    rows, target = J.flatten(0, 1), (Y - fs + J @ theta).flatten()
    ridge = BayesianRidge(fit_intercept=False, max_iter=1000)
    ridge.fit(rows.numpy(force=True), target.numpy(force=True))
    fs, J, _ = linearized(model, X_new)
    _, sd = ridge.predict(J.flatten(0, 1).numpy(force=True), return_std=True)
    return torch.from_numpy(sd).to(fs).view_as(fs), ridge


# %%
# ``load_diabetes`` has 442 patients with 10 measurements each, and a number that tells
# how the disease goes on in a year. 100 patients are for training. The network has 32
# hidden units. All is in units of its standard deviation.

# fold: How the data is split and a network is trained
patients, progress = map(torch.tensor, load_diabetes(return_X_y=True))
patients = patients / patients.std(0)
progress = ((progress - progress.mean()) / progress.std())[:, None]


def split(seed):
    """Return ``X, Y, X_test, Y_test``."""
    order = torch.randperm(442, generator=torch.Generator().manual_seed(seed))
    train_regression, test = order[:100], order[100:]
    return (
        patients[train_regression],
        progress[train_regression],
        patients[test],
        progress[test],
    )


def train_regression(model, loss, weight_decay, steps=400):
    """Return the model after these steps of Adam on the whole batch."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def regression(X, Y):
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    return train_regression(model, lambda model: (model(X) - Y).square().mean(), 0.03)


# %%
# The 95 % interval reaches 1.96 standard deviations to both sides.

X, Y, X_test, Y_test = split(seed=0)
model = regression(X, Y)
sd, ridge = error_bars(model, X, Y, X_test)
inside = (Y_test - model(X_test)).abs() < 1.96 * sd
inside = inside.double().mean()
print(f"{inside:.0%} of {len(X_test)} test targets are in their interval.")

# %%
# Without a Jacobian, the nearest thing to an error bar is the standard deviation of the
# training residuals. It is too small, since the network has fitted the noise.

# fold: How the figure is drawn
fs, residual = model(X_test).detach(), (Y - model(X)).detach().std()
bars = {"training residuals": residual.expand_as(sd), "Laplace": sd}
fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (name, bar) in zip(axes, bars.items()):
    inside = (Y_test - fs).abs() < 1.96 * bar
    for hit, color in (inside, "#0072B2"), (~inside, "#D55E00"):
        x, y, half = (t[:24][hit[:24]] for t in (Y_test, fs, 1.96 * bar))
        label = "inside" if hit is inside else "outside"
        ax.errorbar(x, y, half, fmt="o", color=color, label=label, linewidth=4)
    ax.axline((0, 0), slope=1, color="black", zorder=0)
    ax.set_title(f"{name}: {inside.double().mean():.0%} of targets inside")
    ax.set(xlabel="true target (sd)", xlim=(-2, 2.3), ylim=(-4.5, 4.5))
axes[0].set_ylabel("prediction and interval (sd)")
axes[0].legend(loc="upper left")
plt.show()

# %%
# Coverage over seeds
# -------------------
# Each seed is another split and another start. The third method needs no mathematics:
# train on 75 of the 100, and take the residuals of the other 25. The coverage of a 95 %
# interval should be 0.95. For the negative log likelihood (NLL), lower is better.
#
# - The training residuals cover far too little. The other two cover enough, or more.
# - Laplace keeps all data for the training. If you can spare some, held-out residuals
#   are simpler, and here no worse.
# - A rank correlation near zero says: wide bars do not mark the large errors. They are
#   right on the average, but they do not tell these patients apart.


def score(Y, fs, sd):
    """Return the coverage of the 95 % interval and the NLL of a normal distribution."""
    z = (Y - fs) / sd
    nll = z.square() / 2 + (sd * (2 * torch.pi) ** 0.5).log()
    return torch.stack([(z.abs() < 1.96).double().mean(), nll.mean()])


results, ranks = [], []
for seed in range(5):
    _ = torch.manual_seed(seed)
    X, Y, X_test, Y_test = split(seed)
    model, part = regression(X, Y), regression(X[:75], Y[:75])
    sd, ridge = error_bars(model, X, Y, X_test)
    with torch.no_grad():
        fs, residual, held_out = model(X_test), Y - model(X), Y[75:] - part(X[75:])
        tries = (fs, residual.std()), (fs, sd), (part(X_test), held_out.std())
        results.append(torch.stack([score(Y_test, *bar) for bar in tries]))
        pair = torch.stack([(Y_test - fs).abs().flatten(), sd.flatten()])
    ranks.append(pair.argsort().argsort().double().corrcoef()[0, 1])

low, high = torch.stack(results).aminmax(dim=0)
for name, a, b in zip(["training residuals", "Laplace", "held out"], low, high):
    print(f"{name:18}: coverage {a[0]:.2f} to {b[0]:.2f}, NLL {a[1]:.1f} to {b[1]:.1f}")
print(f"rank correlation of bar and error: {min(ranks):.1f} to {max(ranks):.1f}")

# %%
# Prior and noise by evidence
# ---------------------------
# ``theta`` has a normal prior of precision ``lambda_``, the noise has the precision
# ``alpha_``. ``BayesianRidge`` chooses both: it raises the evidence, the probability of
# the training targets. So there is nothing to tune, and no validation set.
#
# The model has two forms. In weight space one inverts a ``[P, P]`` matrix. In function
# space it is ``[N * C, N * C]``, with the kernel ``J @ J.T``: the neural tangent kernel
# (NTK). Both give the same bars, as does a Gaussian process on the rows of ``J``.

prior, noise = 1 / ridge.lambda_, 1 / ridge.alpha_  # variances
fs, J, theta = linearized(model, X)
target, J = Y - fs + J @ theta, J.flatten(0, 1)
J_test = linearized(model, X_test)[1].flatten(0, 1)

H = J.T @ J / noise + torch.eye(J.shape[1]) / prior
assert_close((J_test @ H.inverse() * J_test).sum(1) + noise, sd.flatten() ** 2)

K, cross = prior * J @ J.T + noise * torch.eye(len(J)), prior * J_test @ J.T
doubt = prior * J_test.square().sum(1) - (cross @ K.inverse() * cross).sum(1)
assert_close(doubt + noise, sd.flatten() ** 2)

kernel = prior * DotProduct(0.0, "fixed")
process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
process.fit(J.numpy(), target.numpy())
doubt = torch.tensor(process.predict(J_test.numpy(), return_std=True)[1]) ** 2
assert_close(doubt + noise, sd.flatten() ** 2)
print(f"{list(H.shape)}, {list(K.shape)} and a Gaussian process give the same bars.")

# %%
# Why ``J @ theta``? The prior is one of ``theta``, not of its change. With ``Y - fs``
# alone, the evidence takes the training residuals for the noise.

wrong = BayesianRidge(fit_intercept=False).fit(J.numpy(), (Y - fs).flatten().numpy())
bar = torch.tensor(wrong.predict(J_test.numpy(), return_std=True)[1])[:, None]
coverage = score(Y_test, model(X_test).detach(), bar)[0]
print(f"Without J @ theta in the target, the coverage is {coverage:.2f}.")

# %%
# Confidence of a classifier
# --------------------------
# The loss is cross-entropy, summed over samples, plus ``precision / 2`` times the
# squared norm of ``theta``: a normal prior. The second derivatives of cross-entropy by
# the outputs are ``diag(p) - p p^T``, whatever the labels are. ``J`` carries them to
# the parameters: the generalized Gauss-Newton matrix (GGN), ``[P, P]``. With the prior
# on its diagonal, its inverse is the covariance of the parameters. We draw parameters
# from it, and average the softmax of the linear model.


def softmax_precision(J, fs, precision):
    """Return the GGN ``[P, P]`` of a softmax plus the prior, with ``J [N, C, P]``."""
    p = fs.softmax(1)
    curvature = p.diag_embed() - p[:, :, None] * p[:, None]
    H = torch.einsum("ncp,ncd,ndq->pq", J, curvature, J)
    return H + precision * torch.eye(len(H)).to(H)


def confidence(J, fs, S, draws=500):
    """Return mean probabilities ``[N, C]`` for parameters with covariance ``S``."""
    draw = torch.randn(draws, len(S), generator=torch.Generator().manual_seed(0)).to(S)
    change = torch.linalg.cholesky(S) @ draw.T
    return (fs[..., None] + J @ change).softmax(1).mean(2)


flowers, y = map(torch.tensor, load_iris(return_X_y=True))
X = ((flowers - flowers.mean(0)) / flowers.std(0))[:, 2:]
model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
_ = train_regression(
    model, lambda model: cross_entropy(model(X), y, reduction="sum"), 0.3, 1000
)

fs, J, theta = linearized(model, X)
H = softmax_precision(J, fs, precision=0.3)
S = H.inverse()


def loss(change):  # of the linear model
    return cross_entropy(fs + J @ change, y, reduction="sum")


reference = jacrev(jacrev(loss))(torch.zeros_like(theta))
assert_close(H, reference + 0.3 * torch.eye(len(theta)))
print("The GGN is autograd's second derivative of the linear model's loss.")

# %%
# ``load_iris``: two measurements of 150 flowers, three kinds. Ten standard deviations
# away from the data, nobody knows the kind. There, the softmax is surer than Laplace.


def probabilities(name, inputs):
    fs, J, _ = linearized(model, inputs)
    return fs.softmax(1) if name == "softmax" else confidence(J, fs, S)


angle = torch.arange(0, 2 * torch.pi, 0.1)
away = 10 * torch.stack([angle.cos(), angle.sin()], dim=1)
accuracy = (fs.argmax(1) == y).double().mean()
print(
    f"accuracy {accuracy:.2f}; mean of the largest probability on the data | far away"
)
for name in "softmax", "Laplace":
    near, far = (probabilities(name, z).amax(1).mean() for z in (X, away))
    print(f"{name}: {near:.2f} | {far:.2f}")

# %%
# Color is the largest probability, points are flowers.

# fold: How the map is drawn
axis = torch.linspace(-8, 8, 41)
fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, name in zip(axes, ["softmax", "Laplace"]):
    area = probabilities(name, torch.cartesian_prod(axis, axis)).amax(1).view(41, 41)
    image = ax.contourf(axis, axis, area.T, torch.linspace(0.3, 1, 15), cmap="cividis")
    for kind, color in enumerate(["#E69F00", "#56B4E9", "#CC79A7"]):
        ax.scatter(*X[y == kind].T, color=color, edgecolor="black", s=25)
    far = probabilities(name, away).amax(1).mean()
    ax.set_title(f"{name}: {far:.0%} sure far from the data")
    ax.set(xlabel="petal length (sd)", aspect="equal")
axes[0].set_ylabel("petal width (sd)")
fig.colorbar(image, ax=axes, label="largest probability")
plt.show()

# %%
# Last layer with thousands of outputs
# ------------------------------------
# Often the last layer alone is taken. Let ``phi`` of shape ``[N, D]`` hold its inputs,
# and a one for the bias. Its Jacobian is ``phi`` times the identity of the outputs,
# ``[N, C, C, D]``: nearly all zeros. Keep ``phi``:
#
# - A diagonal covariance ``s`` of shape ``[C, D]`` gives the variance of output ``c``
#   as the sum of ``phi[n, d] ** 2 * s[c, d]``.
# - A Kronecker product ``kron(B, A)`` stands for the GGN, with ``B [C, C]`` the mean
#   curvature of the loss and ``A [D, D]`` the sum of ``phi[n] phi[n]^T``. The
#   eigenvectors of both turn it into a diagonal, to which the prior adds.


def last_inputs(model, X):
    """Return ``phi [N, D]`` of an ``nn.Sequential`` that ends in a linear layer."""
    a = model[:-1](X).detach()
    return torch.cat([a, torch.ones_like(a[:, :1])], dim=1)


def diagonal_variance(phi, s):
    """Return the variance ``[N, C]`` of the outputs for a covariance ``s [C, D]``."""
    return phi.square() @ s.T


def kronecker_variance(phi, B, A, precision):
    """Return the variance ``[N, C]`` for the inverse of ``kron(B, A) + precision``."""
    (b, U), (a, V) = torch.linalg.eigh(B), torch.linalg.eigh(A)
    s = 1 / (b[:, None] * a + precision)
    return diagonal_variance(phi @ V, U.square() @ s)


phi, p = last_inputs(model, X), fs.softmax(1)
s = 1 / ((p - p * p).T @ phi.square() + 0.3)
B, A = (p.sum(0).diag() - p.T @ p) / len(p), phi.T @ phi
variances = diagonal_variance(phi, s), kronecker_variance(phi, B, A, 0.3)

blocks = vmap_jacrev(model[-1], model[:-1](X).detach())
J = torch.cat([blocks["weight"], blocks["bias"][..., None]], dim=3).flatten(2)
H = softmax_precision(J, fs, 0.3)
kron = torch.kron(B, A) + 0.3 * torch.eye(len(H))
dense = [(J @ S * J).sum(2) for S in (s.flatten().diag(), kron.inverse(), H.inverse())]
assert_close(list(variances), dense[:2])
print("Both forms give the variances of the dense Jacobian and covariance.")
for name, variance in zip(["diagonal", "Kronecker", "exact"], dense):
    print(
        f"mean standard deviation of the outputs, {name}: {variance.sqrt().mean():.2f}"
    )

# %%
# For a square loss ``B`` is the identity: all outputs have the same variance, and it is
# that of a Gaussian process with the kernel ``phi @ phi.T``.

N, D, C = 200, 128, 3100
wide = nn.Sequential(nn.Linear(12, D), nn.Tanh(), nn.Linear(D, C))
phi, phi_new = (last_inputs(wide, torch.randn(n, 12)) for n in (N, 7))
A = phi.T @ phi / noise + torch.eye(D + 1)  # prior variance 1
variance = (phi_new @ A.inverse() * phi_new).sum(1)  # of each of the C outputs


K, cross = phi @ phi.T + noise * torch.eye(N), phi_new @ phi.T
doubt = phi_new.square().sum(1) - (cross @ K.inverse() * cross).sum(1)
assert_close(variance, doubt)
dense = C * C * (D + 1) * 4 / 1e9
print(f"A sample in float32: J has {dense:.1f} GB, phi {(D + 1) * 4} bytes. Same bars.")
torch.set_num_threads(threads)

# %%
# Cost
# ----
# - ``J`` holds ``N * C * P`` numbers. Take new samples in chunks, and sum the GGN of
#   the chunks: ``scale/jacobians_without_memory.py``.
# - Weight space takes time ``P ** 3``, function space ``(N * C) ** 3``, and
#   ``BayesianRidge`` factors ``J`` in ``N * C * P`` times the smaller of ``N * C`` and
#   ``P``. If all are large, take the last layer.
# - ``batched_jacobian`` from ``scale/universal_jacobian.py`` goes in the place of
#   ``vmap_jacrev``: same arguments, same result, and it uses the layers' structure.
#
# Limits
# ------
# - It is no detector of inputs of another kind: doubt grows only where ``J`` looks. For
#   that, first try the largest softmax probability.
# - Noise is one number for all samples and outputs. Scale outputs of different units.
# - A network far from a minimum, or another prior than in its training: then the linear
#   model and the network disagree, and the bars are those of the linear model.
# - Dropout, or batch norm in training mode: call ``model.eval()`` first.
#
# What to take home
# -----------------
# - A Bayesian linear model on the rows of ``J`` gives error bars for a trained network.
# - The target is ``Y - fs + J @ theta``; for a softmax, average over parameters.
# - For the last layer, keep ``phi`` and not the Jacobian.
#
# Next: ``scale/jacobians_without_memory.py``, for a Jacobian that does not fit. The
# alternative: ``compute/torch_func_jacobians.py``, for more ways to the Jacobian.
