r"""
Error bars for a network
========================

After this page you can put error bars on the predictions of a network that is already
trained for a regression. You need its Jacobian and one fit of a linear model. The
method is called the linearized Laplace approximation. For classes, there is
``use/classifier_confidence.py``.
"""

# fold: Imports
import warnings
from contextlib import contextmanager

import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.linear_model import BayesianRidge
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# Intervals from one linear fit
# -----------------------------
# ``J`` of shape ``[N, C, P]`` holds the derivatives of ``C`` outputs by ``P``
# parameters ``theta``. For parameters ``t`` close to these, the outputs are nearly
# ``fs + J @ (t - theta)``, which is a linear model in ``t``. A Bayesian linear model
# has error bars, and scikit-learn's ``BayesianRidge`` fits one: the rows are those of
# ``J``, the targets ``Y - fs + J @ theta``. A bar has two parts, the noise of the data
# and the doubt about the parameters. There is no number to choose: the fit finds the
# noise and the prior, and your weight decay does not enter.

# fold: Outputs, Jacobian and parameters, with checks


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


def refuse_other_samples(X, X_new):
    """Raise ``ValueError`` unless both hold samples, and of the same shape."""
    if 0 in (len(X), len(X_new)) or X.shape[1:] != X_new.shape[1:]:
        got = f"X has shape {list(X.shape)}, X_new {list(X_new.shape)}"
        raise ValueError(f"{got}: both must hold samples of the same shape")


# %%
# The function takes a trained model and its data. For bars that are right,
#
# - the model is trained with the square loss on the same ``Y``, and is in ``eval()``;
# - the noise is the same for all samples and outputs;
# - and you have looked: count targets that are in their bars, of samples that the model
#   has not seen. If they are too few or too many, the section on bars that are too
#   narrow has a remedy.
#
# Of ``P`` directions in parameter space, the rows of ``J`` span at most ``N * C``: the
# columns of ``Q``. The fit is done in these. In all others, the doubt stays that of the
# prior.


def error_bars(model, X, Y, X_new):
    """Return the standard deviation ``[N_new, C]`` of targets at ``X_new``, and a fit.

    The model is trained on ``X [N, ...]`` and ``Y [N, C]`` with the square loss, and is
    in eval mode. The deviations have the unit of ``Y``. The fit has ``1 / alpha_``, the
    variance of the noise, which is a part of each bar, and ``1 / lambda_``, that of the
    prior. Raises ``ValueError`` if a shape does not fit, and what ``vmap`` raises.
    """
    refuse_other_samples(X, X_new)
    fs, J, theta = linearized(model, X)
    if Y.shape != fs.shape:
        raise ValueError(f"Y has shape {list(Y.shape)}, model(X) {list(fs.shape)}")
    Q, R = torch.linalg.qr(J.flatten(0, 1).T)  # the rows of J are R.T @ Q.T
    target = (Y - fs + J @ theta).flatten()
    ridge = BayesianRidge(fit_intercept=False, max_iter=1000)
    ridge.fit(R.T.numpy(force=True), target.numpy(force=True))
    fs, J, _ = linearized(model, X_new)
    rows = J.flatten(0, 1)
    seen = rows @ Q
    _, sd = ridge.predict(seen.numpy(force=True), return_std=True)
    unseen = (rows - seen @ Q.T).square().sum(1) / ridge.lambda_
    return (torch.from_numpy(sd).to(fs) ** 2 + unseen).sqrt().view_as(fs), ridge


# %%
# ``load_diabetes`` has 442 patients with 10 measurements each, and a number that tells
# how the disease goes on in a year. 100 patients are for training. The network has 32
# hidden units. All is in units of its standard deviation. The 95 % interval reaches
# 1.96 standard deviations to both sides.

# fold: How the data is split and a network is trained
patients, progress = map(torch.tensor, load_diabetes(return_X_y=True))
patients = patients / patients.std(0)
progress = ((progress - progress.mean()) / progress.std())[:, None]


def split(seed):
    """Return ``X, Y, X_test, Y_test``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(patients), generator=generator)
    train, test = order[:100], order[100:]
    return patients[train], progress[train], patients[test], progress[test]


def minimize(loss, model, weight_decay, steps):
    """Return the model after these steps of Adam on the whole batch."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def regression(X, Y):
    model = nn.Sequential(nn.Linear(X.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    return minimize(lambda model: (model(X) - Y).square().mean(), model, 0.03, 400)


# %%

X, Y, X_test, Y_test = split(seed=0)
model = regression(X, Y)
sd, ridge = error_bars(model, X, Y, X_test)
inside = (Y_test - model(X_test)).abs() < 1.96 * sd
noise = (1 / ridge.alpha_ / sd**2).mean()
print(f"{inside.double().mean():.0%} of {len(X_test)} targets are in their interval.")
print(
    f"The noise makes up {noise:.0%} of the variance, doubt about parameters the rest."
)

# %%
# Without a Jacobian, the nearest thing to an error bar is the standard deviation of the
# training residuals. It is too small, since the network has fitted the noise.

# fold: How the figure is drawn
fs, residual = model(X_test).detach(), (Y - model(X)).detach().std()
bars = {"training residuals": residual.expand_as(sd), "Laplace": sd}
fig, axes = plt.subplots(1, 2, figsize=(5, 3.6), sharey=True, layout="constrained")
for ax, (name, bar) in zip(axes, bars.items()):
    inside = (Y_test - fs).abs() < 1.96 * bar
    for hit, label, color in (inside, "in", "#0072B2"), (~inside, "out", "#D55E00"):
        x, y, half = (t[:16][hit[:16]] for t in (Y_test, fs, 1.96 * bar))
        ax.errorbar(x, y, half, fmt="o", color=color, label=f"{label}side", linewidth=3)
    ax.axline((0, 0), slope=1, color="black", zorder=0)
    ax.set_title(f"{name}:\n{inside.double().mean():.0%} of targets inside")
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
    ranks.append(spearmanr((Y_test - fs).abs(), sd).statistic)

low, high = torch.stack(results).aminmax(dim=0)
for name, a, b in zip(["training residuals", "Laplace", "held out"], low, high):
    print(f"{name:18}: coverage {a[0]:.2f} to {b[0]:.2f}, NLL {a[1]:.1f} to {b[1]:.1f}")
print(f"rank correlation of bar and error: {min(ranks):.1f} to {max(ranks):.1f}")

# %%
# Bars that are too narrow
# ------------------------
# A network that has fitted the noise leaves too little of it for the bars, as some of
# these do: they learn a function of ten inputs from 100 noisy values. The remedy takes
# 50 values that the network has not seen: multiply all bars by their root mean square
# of error over bar. For bars that are too wide, it is below one. The variance
# of the noise, ``1 / alpha_``, stays as far off as it is.

# fold: The values, and a network that is trained without weight decay


def fitted_noise(seed):
    """Return 650 inputs and values, a network that has seen 100, and the noise."""
    _ = torch.manual_seed(seed)
    inputs, values = map(torch.tensor, make_friedman1(650, noise=1, random_state=seed))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    noise = 1 / values.var()
    values = ((values - values.mean()) / values.std())[:, None]
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
    X, Y = inputs[:100], values[:100]
    _ = minimize(lambda net: (net(X) - Y).square().mean(), net, 0, 400)
    return inputs, values, net, noise


# %%

narrow, mended, shares = [], [], []
for seed in range(5):
    inputs, values, net, noise = fitted_noise(seed)
    bars, found_fit = error_bars(net, inputs[:100], values[:100], inputs[100:])
    errors = ((values[100:] - net(inputs[100:])) / bars).detach()
    factor = errors[:50].square().mean().sqrt()
    for found, limit in (narrow, 1.96), (mended, 1.96 * factor):
        found.append((errors[50:].abs() < limit).double().mean().item())
    shares.append(1 / found_fit.alpha_ / noise)
print(f"as they are: coverage {min(narrow):.2f} to {max(narrow):.2f}")
print(f"multiplied:  coverage {min(mended):.2f} to {max(mended):.2f}")
print(f"variance of the noise: {min(shares):.1f} to {max(shares):.1f} of the true one")

# %%
# Prior and noise by evidence
# ---------------------------
# ``theta`` has a normal prior of precision ``lambda_``, the noise has the precision
# ``alpha_``. ``BayesianRidge`` chooses both: it raises the evidence, the probability of
# the training targets. So there is nothing to tune. Whether the bars hold, only targets
# that the model has not seen can tell.
#
# The model has two forms. In weight space one inverts a ``[P, P]`` matrix. In function
# space it is ``[N * C, N * C]``, with the kernel ``J @ J.T``, the neural tangent kernel
# (NTK): a Gaussian process on the rows of ``J``. Both give the same bars.

prior, noise = 1 / ridge.lambda_, 1 / ridge.alpha_  # variances
fs, J, theta = linearized(model, X)
target, J = Y - fs + J @ theta, J.flatten(0, 1)
J_test = linearized(model, X_test)[1].flatten(0, 1)

H = J.T @ J / noise + torch.eye(J.shape[1]) / prior
assert_close((J_test @ H.inverse() * J_test).sum(1) + noise, sd.flatten() ** 2)

kernel = prior * DotProduct(0.0, "fixed")
process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
process.fit(J.numpy(), target.numpy())
doubt = torch.tensor(process.predict(J_test.numpy(), return_std=True)[1]) ** 2
assert_close(doubt + noise, sd.flatten() ** 2)
print(f"{list(H.shape)} and a Gaussian process of {len(J)} rows give the same bars.")
torch.set_num_threads(threads)

# %%
# Cost
# ----
# - ``J`` holds ``N * C * P`` numbers. Take new samples in chunks.
# - Weight space takes time ``P ** 3``, function space ``(N * C) ** 3``. ``error_bars``
#   factors ``J`` in ``N * C * P`` times the smaller of ``N * C`` and ``P``.
#   ``scale/neural_tangent_kernel.py`` has the kernel of function space without ``J``.
#   If all are large, take the last layer.
# - Where layers are wide, ``batched_jacobian`` from ``batched_jacobian.py`` goes in the
#   place of ``vmap_jacrev``: same arguments, same result.
#
# When not to use it
# ------------------
# - You can spare data: above, held-out residuals are simpler, and their intervals hold.
#   Laplace keeps all data for the training.
# - You want to know which answers are bad. A rank correlation near zero says that wide
#   bars do not mark the large errors: they are right on the average only.
# - The noise differs between samples or outputs: here it is one number.
# - The network is far from a minimum: the bars are those of the linear model.
#
# What to take home
# -----------------
# - A Bayesian linear model on the rows of ``J`` gives error bars for a trained network.
# - The target is ``Y - fs + J @ theta``, and the noise and the prior come with the fit.
# - Count the targets in their bars, on samples that the network has not seen.
#
# Next: ``use/classifier_confidence.py``, the same for classes. The alternative:
# ``use/active_learning.py``, which samples to label instead.
