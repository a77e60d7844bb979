r"""
Private training with clipped gradients
=======================================

After this page you can bound how much any single training sample shows in the weights
of a network (DP-SGD): clip the gradient of each sample, add noise, and say how much
privacy that buys and how much accuracy it costs. You also see two ways to get it wrong.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp
from scipy.stats import norm as gaussian
from sklearn.datasets import load_digits
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close

# %%
# Gradients of single samples
# ---------------------------
#
# Let ``e [N, C]`` be the derivative of each sample's loss by its outputs. For the cross
# entropy that is the softmax minus the one-hot label. The gradient of sample ``n`` is
# its Jacobian ``J[n]``, of shape ``[C, *p.shape]``, times ``e[n]``. Clip each gradient
# to a norm of at most ``bound``, then sum. The first image here is ten times as bright
# as the others: a sample that gives itself away.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def sample_gradients(model, X, y):
    """Return the gradient ``[N, P]`` of each sample's cross entropy."""
    fs = model(X).detach()
    e = fs.softmax(1) - one_hot(y, fs.shape[1])
    rows = [J.flatten(2) for J in vmap_jacrev(model, X).values()]
    return torch.einsum("nc,ncp->np", e, torch.cat(rows, 2))


torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # faster for matrices this small
torch.manual_seed(0)
digits = load_digits()
images, targets = torch.from_numpy(digits.data) / 16, torch.from_numpy(digits.target)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
X, y, bound = images[:50].clone(), targets[:50], 1.0
X[0] *= 10
g = sample_gradients(model, X, y)
clipped = g / (g.norm(dim=1, keepdim=True) / bound).clamp(min=1)
print(f"Gradients {list(g.shape)}: norms {g.norm(dim=1).min():.2f}", end=" ")
print(f"to {g.norm(dim=1).max():.2f}, clipped to {clipped.norm(dim=1).max():.2f}.")

# %%
# Norms without gradients of single samples
# -----------------------------------------
#
# For a linear layer, a sample's gradient is the outer product of ``delta [N, O]``, the
# derivative of its loss by the layer's output, and the layer's input ``a [N, I]``. Its
# squared norm is the product of two squared norms. With the norms known, the sum of the
# clipped gradients is the gradient of a weighted sum of losses: a second backward pass,
# and no gradient of a single sample is ever stored.


def clipped_gradient(model, X, y, bound):
    """Return the sum of clipped gradients, a list like the parameters, and norms [N].

    The model is an ``nn.Sequential`` of ``nn.Linear`` with all parameters trained, each
    used once, and of layers without parameters that treat each sample alone.
    """
    value, inputs, outputs, params = X, [], [], []
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(value.detach())
            params += layer.parameters()
        elif any(True for _ in layer.parameters()):
            raise TypeError(f"no rule for {layer}")
        value = layer(value)
        if isinstance(layer, nn.Linear):
            outputs.append(value)
    if value.ndim != 2 or len(set(map(id, params))) < len(params):
        shape = list(value.shape)
        raise ValueError(f"outputs {shape} are not [N, C], or layers share a parameter")
    losses = cross_entropy(value, y, reduction="none")
    squares = 0
    deltas = autograd.grad(losses.sum(), outputs, retain_graph=True)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer, a, delta in zip(linear, inputs, deltas):
        ones = 0 if layer.bias is None else 1
        squares = squares + (a.square().sum(1) + ones) * delta.square().sum(1)
    weights = 1 / (squares.sqrt() / bound).clamp(min=1)
    return autograd.grad(losses @ weights, params), squares.sqrt()


total, norms = clipped_gradient(model, X, y, bound)
assert_close(norms, g.norm(dim=1))
assert_close(torch.cat([t.flatten() for t in total]), clipped.sum(0))
print("Norms and clipped sum agree with those of the stored gradients.")

# %%
# Sensitivity
# -----------
#
# Privacy rests on one number: how far the sum moves if one sample is taken away. That
# is the norm of what the sample adds. Noise that hides ``bound`` does not hide a sample
# that moves the sum by more. Two mistakes run without an error:
#
# - Inverted clipping. `BackPACK's example
#   <https://docs.backpack.pt/en/master/use_cases/example_differential_privacy.html>`_
#   multiplies with ``clamp_max(norm / bound, 1)``, where one divides by
#   ``clamp_min(norm / bound, 1)``. Large gradients pass, and small ones shrink.
# - A mean loss. ``loss.backward()`` of the mean makes each sample's gradient ``N``
#   times smaller, so hardly any is clipped, and the noise is ``N`` times too large.

norms = g.norm(dim=1, keepdim=True)
tight = norms.median()
sums = {
    "nothing clipped": g,
    "clipped": g / (norms / tight).clamp(min=1),
    "inverted clipping": g * (norms / tight).clamp(max=1),
    "mean loss, clipped": g / len(X) / (norms / len(X) / tight).clamp(min=1),
}
moves = {name: (rows.norm(dim=1).max() / tight).item() for name, rows in sums.items()}
for name, move in moves.items():
    print(f"{name}: one sample moves the sum by up to {move:.2f} bounds")
assert moves["clipped"] < 1 + 1e-9 < moves["inverted clipping"]
assert_close(moves["mean loss, clipped"] * len(X), moves["nothing clipped"])
total, _ = clipped_gradient(model, X, y, tight)
rest, _ = clipped_gradient(model, X[1:], y[1:], tight)
moved = torch.cat([(t - r).flatten() for t, r in zip(total, rest)]).norm()
assert moved <= tight * (1 + 1e-9)
print("Without the first sample, the clipped sum moves by at most the bound.")

# %%
# Price in epsilon
# ----------------
#
# Training is :math:`(\epsilon, \delta)` private if taking a sample away changes the
# probability of any outcome by a factor of at most :math:`e^\epsilon`, up to
# :math:`\delta`. Each step draws each sample with probability ``q``, and adds normal
# noise with standard deviation ``sigma * bound`` to the sum. Its Rényi divergence of
# order :math:`\alpha` is a finite sum (`Mironov, Talwar and Zhang, 2019
# <https://arxiv.org/abs/1908.10530>`_) for whole :math:`\alpha`:
#
# .. math::
#
#     R_\alpha = \frac{1}{\alpha - 1} \log \sum_{k=0}^{\alpha}
#     \binom{\alpha}{k} (1 - q)^{\alpha - k} q^k e^{(k^2 - k) / (2 \sigma^2)}
#
# Divergences of steps add up, and each order gives a bound on epsilon (`Balle et al.,
# 2020 <https://arxiv.org/abs/1905.09982>`_). The least is the price.


def renyi(q, sigma, order):
    """Return the divergence of one step, for a whole order above 1."""
    if q == 1:
        return order / (2 * sigma**2)
    k = np.arange(order + 1)
    logs = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    logs += (order - k) * math.log1p(-q) + k * math.log(q)
    return logsumexp(logs + (k * k - k) / (2 * sigma**2)) / (order - 1)


def epsilon(q, sigma, steps, delta, orders=range(2, 65)):
    """Return epsilon after so many steps with sampling rate q and noise sigma."""
    if not (0 < q <= 1 and sigma > 0 and steps >= 1 and 0 < delta < 1):
        raise ValueError(f"{q=}, {sigma=}, {steps=}, {delta=} are out of range")
    return min(
        steps * renyi(q, sigma, a) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in orders
    )


def noise_for(target, q, steps, delta):
    """Return the sigma with which training costs the target epsilon, by bisection."""
    low, high = 0.1, 1000.0
    if not epsilon(q, high, steps, delta) <= target <= epsilon(q, low, steps, delta):
        raise ValueError(f"no noise from {low} to {high} gives epsilon {target}")
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        above = epsilon(q, middle, steps, delta) > target
        low, high = (middle, high) if above else (low, middle)
    return high


# %%
# Two references: the integral that the sum stands for, and, where every step sees all
# samples (``q = 1``), the exact relation of epsilon and delta, which no bound beats.

q, sigma, order = 0.2, 1.5, 6


def integrand(x):
    ratio = (1 - q) + q * math.exp((2 * x - 1) / (2 * sigma**2))
    return gaussian.pdf(x, scale=sigma) * ratio**order


integral = quad(integrand, -30, 40, epsabs=0, epsrel=1e-11)[0]
value = torch.tensor(renyi(q, sigma, order))
assert_close(value, torch.tensor(math.log(integral) / (order - 1)))

steps, sigma = 20, 10.0
bound_on_epsilon, mu = epsilon(1, sigma, steps, 1e-5), math.sqrt(steps) / sigma
exact = gaussian.cdf(mu / 2 - bound_on_epsilon / mu) - math.exp(
    bound_on_epsilon
) * gaussian.cdf(-mu / 2 - bound_on_epsilon / mu)
assert exact <= 1e-5
print("The sum agrees with the integral.")
print(f"At epsilon {bound_on_epsilon:.2f} delta is {exact:.1e}, below 1e-5.")

# %%
# Accuracy against epsilon
# ------------------------
#
# We train on 1200 digits, with three seeds for weights, samples and noise. The noise is
# drawn once per step. The sum is divided by the expected batch size, since the true one
# depends on the samples. The last row is the mistake with the mean loss: the noise is
# larger by the expected batch size.

# fold: Private training


def train(X, y, seed, sigma, bound, q, steps, lr):
    """Return a network trained with DP-SGD, or without privacy if sigma is 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    for _ in range(steps):
        drawn = torch.rand(len(X)) < q  # Poisson sampling, as the accountant assumes
        total, _ = clipped_gradient(model, X[drawn], y[drawn], bound)
        with torch.no_grad():
            for p, t in zip(model.parameters(), total):
                p -= lr * (t + sigma * bound * torch.randn_like(p)) / (q * len(X))
    return model


def accuracies(sigma, bound, lr):
    """Return the test accuracy of three seeds."""
    result = []
    for seed in range(3):
        order = torch.randperm(
            len(images), generator=torch.Generator().manual_seed(seed)
        )
        seen, new = order[:1200], order[1200:]
        model = train(images[seen], targets[seen], seed, sigma, bound, q, steps, lr)
        right = model(images[new]).argmax(1) == targets[new]
        result.append(right.double().mean().item())
    return result


q, steps, delta, prices = 1 / 6, 150, 1e-4, (1, 3, 8)
found = {}
for price in prices:
    sigma = noise_for(price, q, steps, delta)
    found[f"epsilon {price}"] = accuracies(sigma, bound=0.5, lr=2)
found["no privacy"] = accuracies(sigma=0, bound=1e9, lr=1)
sigma = noise_for(3, q, steps, delta)
found["epsilon 3, noise for a mean loss"] = accuracies(
    sigma * q * 1200, bound=0.5, lr=2
)
for name, values in found.items():
    print(f"{name}: accuracy {', '.join(f'{v:.2f}' for v in values)}")

# %%
# The curve rises towards the accuracy without privacy. Each dot is a seed.

fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
means = [np.mean(found[f"epsilon {price}"]) for price in prices]
plain = np.mean(found["no privacy"])
ax.axhline(plain, color="black", linewidth=3, linestyle="--")
ax.text(1, plain + 0.006, "without privacy", fontsize=12)
ax.plot(prices, means, color="#0072B2", linewidth=3)
for price in prices:
    ax.scatter([price] * 3, found[f"epsilon {price}"], color="#0072B2", s=70)
ax.set_xscale("log", base=2)
ax.set(xticks=prices, xticklabels=prices, ylim=(None, 1))
ax.set(xlabel="epsilon (less is more private)", ylabel="test accuracy")
ax.set_title(f"Accuracy {means[0]:.2f} at epsilon 1, {plain:.2f} without privacy")
plt.show()

# %%
# When not to use it
# ------------------
#
# - With few samples, the noise wins: it is the same for a sum over fewer samples. We
#   give the network 200 digits.
# - Epsilon counts training runs, not models: tuning ``bound`` and ``lr`` on the private
#   data, as one does, has a price that is not counted here.
# - A layer in which samples mix, such as batch norm in training, has no gradient of one
#   sample. Shuffled batches in turn are not the sampling that epsilon was computed for.

sigma = noise_for(1, q, steps, delta)
torch.manual_seed(0)
few = train(images[:200], targets[:200], 0, sigma, 0.5, q, steps, 2)
accuracy = (few(images[1200:]).argmax(1) == targets[1200:]).double().mean()
print(f"200 digits at epsilon 1: accuracy {accuracy:.2f}")

try:
    norm = nn.BatchNorm1d(64)
    clipped_gradient(nn.Sequential(norm, model), X, y, bound)
except TypeError as error:
    print(f"TypeError: {error}")
else:
    raise AssertionError("batch norm went through")

# %%
# Costs
# -----
#
# Stored gradients have ``N * P`` numbers, and the Jacobian has ``C`` times as many.
# Norms from factors need ``N * (I + O)`` numbers per layer and two backward passes,
# whatever ``C`` is. Convolutions
# and layers on sequences sum over places first, see
# ``scale/jacobians_without_memory.py``.
# `Opacus <https://opacus.ai>`_ has rules for many layers; its default
# ``loss_reduction="mean"`` multiplies with ``N``.
#
# What to take home
# -----------------
#
# - Clip every sample's gradient of the summed loss, divide by ``max(norm / bound, 1)``,
#   and add noise once a step.
# - Check that one sample moves the sum by at most the bound.
# - The norms of linear layers come without the gradients.
#
# Next: ``scale/jacobians_without_memory.py`` computes with factors of more layers. The
# alternative: ``use/influence.py`` asks what one sample does when nothing is clipped.
