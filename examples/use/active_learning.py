r"""
Active learning: which samples to label next
============================================

After this page you can pick, from a pool without labels, the samples whose labels tell
your network most, and you know how much better than chance that is, and when it fails.
"""

# fold: Imports
import warnings
from contextlib import contextmanager
from functools import cache
from itertools import combinations

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

# %%
# Information of one label
# ------------------------
#
# The Fisher matrix of sample ``n``, of shape ``[P, P]``, says what its label can tell
# about the ``P`` parameters, and needs no label. For softmax outputs it is
# :math:`J_n^\top (\mathrm{diag}(p_n) - p_n p_n^\top) J_n`, with the Jacobian
# :math:`J_n`, of shape ``[C, P]``, of the ``C`` logits, and their probabilities
# :math:`p_n`. We keep ``C`` rows :math:`F_n`, so that it is :math:`F_n^\top F_n`. The
# parameters are those of the last layer alone, whose inputs are the hidden units.

# fold: Data, training and the Jacobian
torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more threads only disturb networks this small
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)


def trained_classifier(X, y):
    """Return a network trained with L-BFGS on the cross-entropy with weight decay."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    params, search = model.parameters(), "strong_wolfe"
    optimizer = torch.optim.LBFGS(params, max_iter=40, line_search_fn=search)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y)
        loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


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


# %%
# The larger the trace of the matrix, the more a label can tell. It is small where the
# network has learned the label already.


def fisher_rows(model, X):
    """Return rows ``[N, C, P]``: ``rows[n].T @ rows[n]`` is the Fisher matrix of n."""
    with unchanged(model):
        J = vmap_jacrev(model, X)
        p = model(X).detach().softmax(1)[..., None]
    rows = torch.cat([block.flatten(2) for block in J.values()], 2)
    return p.sqrt() * (rows - (p * rows).sum(1, keepdim=True))


torch.manual_seed(0)
model = trained_classifier(images[:20], labels[:20])
rows = fisher_rows(model[-1], model[:-1](images[:300]).detach())
totals = rows.square().sum((1, 2))  # traces of the Fisher matrices, [N]
print(
    f"Trace of the Fisher matrix, labeled images: {totals[:20].mean():.1f}, others: "
    f"{totals[20:].mean():.1f} on average, {totals.max():.1f} at most"
)

# %%
# The last layer is linear in its parameters, so its Fisher matrix is the second
# derivative of the loss, whatever the label.

(N, C, P), last = rows.shape, [p.detach().flatten() for p in model[-1].parameters()]
hidden, other_label = model[:-1](images[7:8]).detach(), labels[8:9]


def loss_of_image(params):  # of image 7, with another label
    weight, bias = params.split([P - C, C])
    logits = hidden @ weight.view(C, -1).T + bias
    return nn.functional.cross_entropy(logits, other_label)


second = torch.autograd.functional.hessian(loss_of_image, torch.cat(last))
assert_close(rows[7].T @ rows[7], second)
print(f"The Fisher matrix, {P} by {P}, is the second derivative of the loss.")

# %%
# Greedy choice
# -------------
#
# Let :math:`A`, of shape ``[P, P]``, be a prior times the identity plus the Fisher
# matrices of all samples with a label. A sample with rows :math:`F`, of shape ``[C,
# P]``, raises its log determinant by
#
# .. math::
#
#     & \log\det (A + F^\top F) - \log\det A \\
#     & \quad = \log\det (I + F A^{-1} F^\top)
#
# so that a ``[C, C]`` matrix gives the gain in information. We take the sample that
# gains most, as if its label were there, and go on. Similar samples gain little after
# the first, which is why the ten best at once are not the best ten.


def most_informative(rows, known, count, prior=1.0):
    """Return ``count`` indices that gain most, one by one, and the inverse of A then.

    ``rows [N, C, P]`` are Fisher rows, ``known`` is a list of indices into them with a
    label, and ``prior`` is what the weight decay of a summed loss would be. Raises
    ``ValueError`` if fewer than ``count`` others are left. Computes in float64.
    """
    rows = rows.double()
    N, C, P = rows.shape
    left, identity = torch.ones(N, dtype=torch.bool), torch.eye(C).to(rows)
    left[known] = False
    if count > left.sum():
        raise ValueError(f"count = {count}, but only {left.sum()} of {N} are left")
    seen = rows[known].flatten(0, 1)
    inverse = torch.linalg.inv(prior * torch.eye(P).to(rows) + seen.T @ seen)
    S, chosen = rows @ inverse @ rows.mT, []  # S: [N, C, C]
    for _ in range(count):
        gains = torch.logdet(identity + S).where(left.to(S.device), -torch.inf)
        chosen.append(gains.argmax().item())
        left[chosen[-1]] = False
        U = inverse @ rows[chosen[-1]].T
        M, cross = torch.linalg.inv(identity + S[chosen[-1]]), rows @ U
        inverse, S = inverse - U @ M @ U.T, S - cross @ M @ cross.mT
    return chosen, inverse


known = list(range(20))
chosen, inverse = most_informative(rows, known, count=10)
print(f"Label these next: {chosen}")

# %%
# No step inverts a ``[P, P]`` matrix anew: an update of rank ``C`` does. It equals a
# fresh inverse.

seen = rows[known + chosen].flatten(0, 1)
assert_close(inverse, torch.linalg.inv(torch.eye(P) + seen.T @ seen))

# %%
# Accuracy against random labels
# ------------------------------
#
# We start with two labels for each digit, and four times add 10 from a pool of 400; the
# other 1397 images are the test. Without a Jacobian, one labels at random, or the
# images between whose two most probable classes the network sees the smallest margin.

# fold: How the strategies are compared


def random_labels(model, X, known):
    """Return ten indices at random, as the two functions below do by their rules."""
    return [n for n in torch.randperm(len(X)).tolist() if n not in known][:10]


def smallest_margins(model, X, known):
    first, second = model(X).softmax(1).topk(2).values.T
    gaps = first - second
    gaps[known] = torch.inf
    return gaps.argsort()[:10].tolist()


def most_information(model, X, known):
    rows = fisher_rows(model[-1], model[:-1](X).detach())
    return most_informative(rows, known, 10)[0]


@cache
def first_labels(seed):
    """Return pool, test, indices of 20 labels, a network, and the random state."""
    torch.manual_seed(seed)
    pool, test = torch.randperm(len(images)).split([400, len(images) - 400])
    X, y = images[pool], labels[pool]
    known = [n for c in range(10) for n in (y == c).nonzero()[:2, 0].tolist()]
    model = trained_classifier(X[known], y[known])
    return X, y, images[test], labels[test], known, model, torch.get_rng_state()


def campaign(strategy, seed):
    """Return the test accuracies with 20, 30, 40, 50, 60 labels."""
    X, y, X_test, y_test, known, model, state = first_labels(seed)
    torch.set_rng_state(state)  # all strategies go on from the same
    right = [model(X_test).argmax(1) == y_test]
    while len(known) < 60:
        known = known + strategy(model, X, known)
        model = trained_classifier(X[known], y[known])
        right.append(model(X_test).argmax(1) == y_test)
    return [r.double().mean() for r in right]


# %%
# Means over five seeds, with the worst and the best:

strategies = [random_labels, smallest_margins, most_information]
counts = range(20, 61, 10)
curves = torch.tensor([[campaign(s, seed) for seed in range(5)] for s in strategies])
for name, runs in zip(("random", "margin", "information"), curves):
    for count, v in zip(counts, runs.T):
        print(f"{name}, {count}: {v.mean():.1%} ({v.min():.0%} to {v.max():.0%})")
ahead = [(curves[2, :, 1:] > other[:, 1:]).sum() for other in curves[:2]]
print(f"Information is ahead of random in {ahead[0]} of 20, of margin in {ahead[1]}.")
assert curves[2, :, -1].mean() > curves[0, :, -1].mean()

# %%
# The lines are means, and the bars reach from the worst to the best seed.

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
styles = zip("osD", ("black", "#E69F00", "#0072B2"), (-0.7, 0, 0.7))
for strategy, curve, (marker, color, shift) in zip(strategies, curves, styles):
    mean = curve.mean(0)
    spread = torch.stack([mean - curve.amin(0), curve.amax(0) - mean])
    style = {"marker": marker, "color": color, "linewidth": 2, "capsize": 4}
    name = strategy.__name__.replace("_", " ")
    ax.errorbar(torch.tensor(counts) + shift, mean, spread, label=name, **style)
ax.set(xlabel="number of labels", ylabel="test accuracy", xticks=counts)
ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
ends = curves[:, :, -1].mean(1)
ax.set_title(
    f"60 labels: {ends[2]:.0%} right if chosen\nby information, {ends[0]:.0%} at random"
)
ax.legend(loc="upper left")
plt.show()

# %%
# Greedy choice against brute force
# ---------------------------------
#
# On 12 samples, each step tries every sample with the full determinant,
# and a search through all sets of three says what greed costs. Theory promises at least
# :math:`1 - 1/e`, or 0.63, of the best.


def information(indices):
    """Return log det (I + sum of Fisher matrices), the slow way."""
    return torch.logdet(torch.eye(P) + sum(rows[n].T @ rows[n] for n in indices))


few, brute = range(100, 112), []
for _ in range(3):
    rest = [n for n in few if n not in brute]
    brute.append(max(rest, key=lambda n: information([*brute, n])))
greedy, _ = most_informative(rows[100:112], [], 3)
assert [n + 100 for n in greedy] == brute
best = max(information(trio) for trio in combinations(few, 3))
print(f"Greedy {brute} as by brute force, {information(brute) / best:.1%} of the best.")
torch.set_num_threads(threads)

# %%
# Cost
# ----
#
# - The rows hold ``N * C * P`` numbers, and one choice takes of the order of
#   ``N * C ** 2 * P`` operations. The first inverse takes ``P ** 3``, which is why the
#   last layer alone serves well.
# - With all parameters, keep the inner products of rows instead, ``[N * C, N * C]``:
#   ``ntk`` from ``ntk.py`` returns those of the Jacobian, for most layers without it.
#   ``batched_jacobian`` from ``batched_jacobian.py`` goes in the place of
#   ``vmap_jacrev``.
# - For thousands of classes, take the rows of the few most probable ones.
#
# When not to use it
# ------------------
#
# - Where the smallest margin does as well, in the numbers above, take it: it costs one
#   forward pass and no Jacobian.
# - The first labels lack a class: the network's probabilities mean nothing for a class
#   that it has not seen.
# - You need a fair sample: labels chosen by the network are none. Test on images drawn
#   at random.
#
# What to take home
# -----------------
#
# - The Fisher matrix of a sample needs its Jacobian, and no label.
# - Greedy choice by log determinant needs small matrices only, and avoids twins.
# - It beats labels drawn at random. Try the margin too, which is cheaper.
#
# Next: ``scale/neural_tangent_kernel.py`` has inner products for larger networks. The
# alternative: ``use/influence.py`` asks which labeled samples to leave out.
