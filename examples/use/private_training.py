r"""
Private training with clipped gradients
=======================================

After this page you can bound how much any single training sample shows in the weights
of a network (DP-SGD): clip the gradient of each sample, add noise, and say how much
privacy that buys and how much accuracy it costs. You also see two ways to get it wrong.
"""

# fold: Imports
import math
import warnings
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp
from sklearn.datasets import load_digits
from torch import autograd, nn
from torch.func import functional_call, grad, jacrev, vmap
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
threads = torch.get_num_threads()
torch.set_num_threads(1)  # faster for matrices this small
_ = torch.manual_seed(0)
digits, order = load_digits(), torch.randperm(1797)
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)
labels = labels[order]
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
X, y, bound = images[:50].clone(), labels[:50], 1.0
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
# and no gradient of a single sample is ever stored. This function is for stacks of
# linear layers.

# fold: unchanged, which puts back what a call of the model changes


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


# %%


def clipped_gradient(model, X, y, bound):
    """Return the sum of clipped gradients, a list like the parameters, and norms [N].

    The model is an ``nn.Sequential`` of ``nn.Linear`` with all parameters trained, each
    used once, and of layers without parameters that treat each sample alone.
    """
    if not bound > 0:
        raise ValueError(f"{bound=} must be positive")
    with unchanged(model):
        fs, calls, params = X, [], []
        for layer in model:
            a, fs = fs, layer(fs)
            if isinstance(layer, nn.Linear):
                calls.append((layer, a.detach(), fs))
            elif any(True for _ in layer.parameters()):
                raise TypeError(f"no rule for {layer}: take clipped_in_chunks")
            params += layer.parameters()
        if any(a.ndim != 2 for _, a, _ in calls) or len(set(params)) < len(params):
            raise ValueError("an input is not [N, I], or layers share a parameter")
        losses = cross_entropy(fs, y, reduction="none")
        outputs = [output for *_, output in calls]
        deltas = autograd.grad(losses.sum(), outputs, retain_graph=True)
        squares = 0
        for (layer, a, _), delta in zip(calls, deltas):
            ones = 0 if layer.bias is None else 1
            squares = squares + (a.square().sum(1) + ones) * delta.square().sum(1)
        weights = 1 / (squares.sqrt() / bound).clamp(min=1)
        return autograd.grad(losses @ weights, params), squares.sqrt()


# %%

total, norms = clipped_gradient(model, X, y, bound)
assert_close(norms, g.norm(dim=1))
assert_close(torch.cat([t.flatten() for t in total]), clipped.sum(0))
print("Norms and clipped sum agree with those of the stored gradients.")

# %%
# Any other model, a few samples at a time
# ----------------------------------------
#
# Convolutions have small weights and large outputs: their gradients are cheaper than
# their factors. Take the gradients of a few samples, clip, add, and go on. A layer in
# which samples mix, such as batch norm in training, raises an error of ``vmap``, or
# sees each sample alone if it keeps no running statistics: take group norm.


def clipped_in_chunks(model, X, y, bound, samples):
    """Return the sum of clipped gradients, a list like the parameters, and norms [N].

    Of those that require a gradient. Holds the gradients of ``samples`` at a time, and
    draws other random numbers for each. Raises ``ValueError`` if a number is not
    positive or nothing is trained, and what ``vmap`` raises.
    """
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if not (params and bound > 0 and samples > 0):
        got = f"{len(params)} trained parameters, {bound=} and {samples=}"
        raise ValueError(f"{got}: all must be positive")

    def loss(params, x, label):  # of one sample
        return cross_entropy(functional_call(model, params, x[None])[0], label)

    gradients = vmap(grad(loss), (None, 0, 0), randomness="different")
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    norms = next(iter(params.values())).new_zeros(len(X))
    with unchanged(model):
        for start in range(0, len(X), samples):
            part = slice(start, start + samples)
            rows = gradients(params, X[part], y[part])
            squares = sum(row.flatten(1).square().sum(1) for row in rows.values())
            norms[part] = squares.sqrt()
            weights = 1 / (norms[part] / bound).clamp(min=1)
            for name, row in rows.items():
                total[name] += torch.tensordot(weights, row, 1)
    return list(total.values()), norms


# %%

convolve = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU()
conv_net = nn.Sequential(*convolve, nn.Flatten(), nn.Linear(216, 10))
g_conv = sample_gradients(conv_net, X, y)
clipped = g_conv / (g_conv.norm(dim=1, keepdim=True) / bound).clamp(min=1)
total, norms_conv = clipped_in_chunks(conv_net, X, y, bound, samples=8)
assert_close(norms_conv, g_conv.norm(dim=1))
assert_close(torch.cat([t.flatten() for t in total]), clipped.sum(0))
print("So do those of convolutions with group norm, eight samples at a time.")

# %%
# Sensitivity
# -----------
#
# Privacy rests on one number: how far the sum moves if one sample is taken away. That
# is the norm of what the sample adds. Noise that hides ``bound`` does not hide a sample
# that moves the sum by more. Two mistakes run without an error:
#
# - Inverted clipping. `BackPACK's example
#   <https://github.com/f-dangel/backpack/blob/8e258b9e8eeb62291405720a7a20395c3caa3c61/docs_src/examples/use_cases/example_differential_privacy.py>`_
#   has the right formula, but multiplies with ``clamp_max(norm / bound, 1)``. Large
#   gradients pass, and small ones shrink.
# - A mean loss. ``loss.backward()`` of the mean makes each sample's gradient ``N``
#   times smaller, so hardly any is clipped, and the noise is ``N`` times too large.
#
# We take the median of the norms as the bound, so that half of the samples are clipped.

tight = norms.median()
scale, N = norms[:, None] / tight, len(X)
sums = {
    "clipped": g / scale.clamp(min=1),
    "inverted clipping": g * scale.clamp(max=1),
    "mean loss, clipped": g / N / (scale / N).clamp(min=1),
}
moves = {name: (rows.norm(dim=1).max() / tight).item() for name, rows in sums.items()}
for name, move in moves.items():
    print(f"{name}: one sample moves the sum by up to {move:.2f} bounds")
total, _ = clipped_gradient(model, X, y, tight)
rest, _ = clipped_gradient(model, X[1:], y[1:], tight)
moved = torch.cat([(t - r).flatten() for t, r in zip(total, rest)]).norm()
assert_close(moved, tight)
print("Without the bright image, the clipped sum moves by the bound.")

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
#     R_\alpha &= \frac{1}{\alpha - 1} \log \sum_{k=0}^{\alpha} \binom{\alpha}{k} \\
#     & \quad \times (1 - q)^{\alpha - k} q^k e^{(k^2 - k) / (2 \sigma^2)}
#
# Divergences of steps add up, and each order gives a bound on epsilon (`Balle et al.,
# 2020 <https://arxiv.org/abs/1905.09982>`_). The least is the price.


def renyi(q, sigma, order):
    """Return the divergence of one step, for a whole order above 1."""
    k = np.arange(order + 1)
    logs = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    logs += (order - k) * math.log1p(-q) + k * math.log(q)
    return logsumexp(logs + (k * k - k) / (2 * sigma**2)) / (order - 1)


def epsilon(q, sigma, steps, delta, orders=range(2, 65)):
    """Return epsilon after so many steps with sampling rate q and noise sigma."""
    if not (0 < q < 1 and sigma > 0 and steps >= 1 and 0 < delta < 1):
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
# The reference is the integral that the sum stands for.

# fold: The integral
q, sigma, order = 0.2, 1.5, 6


def integrand(x):
    density = math.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    ratio = (1 - q) + q * math.exp((2 * x - 1) / (2 * sigma**2))
    return density * ratio**order


integral = quad(integrand, -30, 40, epsabs=0, epsrel=1e-11)[0]
divergence = torch.tensor(math.log(integral) / (order - 1))
assert_close(torch.tensor(renyi(q, sigma, order)), divergence)
print(f"Sum and integral: {divergence:.4f}")

# %%
# Accuracy against epsilon
# ------------------------
#
# We train on 1200 digits. The noise is drawn once per step. The sum is divided by the
# expected batch size, since the true one depends on the samples. Bound and learning
# rate are chosen at epsilon 3 on 200 of the training digits, after training on the
# others. The test digits play no part in the choice.

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


def accuracy(seed, sigma, bound, lr, first, last):
    """Return the accuracy on digits ``first:last``, trained on those before them."""
    model = train(images[:first], labels[:first], seed, sigma, bound, q, steps, lr)
    right = model(images[first:last]).argmax(1) == labels[first:last]
    return right.double().mean().item()


def chosen(sigma, bounds, rates):
    """Return the bound and the learning rate that are best on held-out digits."""
    pairs = [(bound, lr) for bound in bounds for lr in rates]
    return max(pairs, key=lambda pair: accuracy(0, sigma, *pair, 1000, 1200))


# %%

q, steps, delta, prices, seeds = 1 / 6, 120, 1e-4, (1, 3, 8), range(5)
sigmas = {price: noise_for(price, q, steps, delta) for price in prices}
grid = (0.5, 1), (1, 2)  # bounds, learning rates
bound, lr = chosen(sigmas[3], *grid)
runs = {f"epsilon {price}": (sigmas[price], bound, lr) for price in prices}
runs["no privacy"] = 0, *chosen(0, [1e9], (0.5, 1))
runs["epsilon 3, noise for a mean loss"] = sigmas[3] * q * 1200, bound, lr
found = {
    name: [accuracy(seed, *options, 1200, 1797) for seed in seeds]
    for name, options in runs.items()
}
print(f"Chosen on held-out training digits: bound {bound}, learning rate {lr}")
for name, values in found.items():
    spread = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    print(f"{name}: accuracy {spread}")

# %%
# The curve rises towards the accuracy without privacy. Each dot is a seed, of weights,
# samples and noise.

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
dots = [found[f"epsilon {price}"] for price in prices]
plain = np.mean(found["no privacy"])
ax.axhline(plain, color="black", linewidth=3, linestyle="--")
ax.text(1, plain + 0.006, "without privacy")
ax.plot(prices, np.mean(dots, 1), color="#0072B2", linewidth=3)
ax.plot(prices, dots, "o", color="#0072B2", markersize=8)
ax.set_xscale("log", base=2)
ax.set(xticks=prices, xticklabels=prices, ylim=(None, 1))
ax.set(xlabel="epsilon (less is more private)", ylabel="test accuracy")
low = np.mean(dots[0])
ax.set_title(f"Accuracy {low:.2f} at epsilon 1,\n{plain:.2f} without privacy")
plt.show()

# %%
# Cost
# ----
#
# - Stored gradients have ``N * P`` numbers, and the Jacobian has ``C`` times as many.
# - ``clipped_gradient`` needs ``N * (I + O)`` numbers per layer and two backward
#   passes, whatever ``C`` is.
# - ``clipped_in_chunks`` needs ``samples * P`` numbers, and those that the layers
#   return for so many samples. With fewer it takes longer: time some.
# - `Opacus <https://opacus.ai>`_ has rules for many layers; its default
#   ``loss_reduction="mean"`` multiplies with ``N``.
#
# When not to use it
# ------------------
#
# - With few samples, the noise wins: it is the same for a sum over fewer samples. Here
#   we give the network 200 digits.
# - Epsilon counts training runs, not models: the choice of bound and learning rate on
#   private data has a price that is not counted here.
# - A layer in which samples mix, such as batch norm in training, has no gradient of one
#   sample. Shuffled batches in turn are not the sampling that epsilon was computed for.
# - PyTorch's random numbers are no secret. For a promise to people, take a library.

few = train(images[:200], labels[:200], 0, sigmas[1], bound, q, steps, lr)
few = (few(images[1200:]).argmax(1) == labels[1200:]).double().mean()
print(f"200 digits at epsilon 1: accuracy {few:.2f}")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
#
# - Clip every sample's gradient of the summed loss, divide by ``max(norm / bound, 1)``,
#   and add noise once a step.
# - Check that one sample moves the sum by at most the bound.
# - The norms of linear layers come without the gradients. Of other layers, clip and add
#   the gradients of a few samples at a time.
#
# Next: ``scale/neural_tangent_kernel.py``, norms of gradients by any outputs. The
# alternative: ``use/influence.py``, what one sample does when nothing is clipped.
