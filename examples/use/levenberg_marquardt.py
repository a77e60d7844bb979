r"""
Levenberg-Marquardt for a network
=================================

After this page you can train a network with second-order steps, if it has more
parameters than residuals: each step solves a system as small as the number of
residuals. The example is a network that solves a differential equation.
"""

# fold: Imports
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close
from torch.utils.benchmark import Timer

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # small models gain nothing from more
_ = torch.manual_seed(0)

# %%
# Residuals as a model
# --------------------
# The loss is half the sum of squares of residuals ``r``, here the outputs of a model
# ``[N, C]``. Take the equation ``-u'' = pi^2 sin(pi x)`` with ``u(0) = u(1) = 0``. The
# residual at a point ``x`` is its right side minus its left, divided by ``pi^2``. A
# network with this loss is called physics-informed (PINN). The solution is
# ``sin(pi x)``. In ``u``, the factor ``x (1 - x)`` keeps the ends at zero, so the
# boundary needs no weight. A regression is below.


class Residual(nn.Module):
    """Map points ``[N, 1]`` to the residuals of the equation, ``[N, 1]``."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def u(self, x):
        return x * (1 - x) * self.net(x)

    def forward(self, X):
        second = vmap(grad(grad(lambda x: self.u(x[None, None])[0, 0])))(X[:, 0])
        return second[:, None] / torch.pi**2 + torch.sin(torch.pi * X)


# %%

# fold: The network, its error, and the Jacobian as a matrix


def error(model):
    """Return the L2 error of ``u`` on a fine grid, relative to the solution."""
    x = torch.linspace(0, 1, 301)[:, None]
    with torch.no_grad():
        solution = torch.sin(torch.pi * x)
        return ((model.u(x) - solution).norm() / solution.norm()).item()


def pinn(seed):
    torch.manual_seed(seed)
    layers = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    return Residual(nn.Sequential(*layers))


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


def flat_jacobian(model, X):
    """Return the Jacobian as a matrix ``[N * C, P]``."""
    blocks = [J.flatten(2) for J in vmap_jacrev(model, X).values()]
    return torch.cat(blocks, dim=2).flatten(0, 1)


# %%
# A damped step
# -------------
# A step comes from ``J``, the Jacobian of the residuals, of shape ``[N * C, P]``. A
# residual may itself hold derivatives by ``x``, as here.


def damped_step(J, r, mu):
    """Return a step ``[P]`` for ``J [N * C, P]``, ``r [N * C]`` and a damping."""
    K = J @ J.T
    return -J.T @ torch.linalg.solve(K + mu * torch.eye(len(K)).to(K), r)


# %%
# A first try: five steps with a small constant damping. Nothing keeps the loss from a
# rise.

X, model = torch.linspace(0, 1, 66)[:, None], pinn(seed=0)
params, losses = list(model.parameters()), [model(X).square().sum().item() / 2]
for _ in range(5):
    step = damped_step(flat_jacobian(model, X), model(X).detach().flatten(), mu=1e-6)
    vector_to_parameters(parameters_to_vector(params).detach() + step, params)
    losses.append(model(X).square().sum().item() / 2)
print("loss:", ", ".join(f"{loss:.0e}" for loss in losses))

# %%
# Damping that adapts and refuses
# -------------------------------
# Small ``mu`` is a long step, and the linear model may not hold there. So compare the
# loss before and after, on the same points. If it falls, keep the step and divide
# ``mu`` by 5. If not, refuse the step and double ``mu``. A second try costs a solve and
# a forward pass, but no new Jacobian.


def levenberg_marquardt(model, X, steps, mu=1.0, tries=30, log=lambda: None):
    """Minimize the sum of squares of ``model(X) [N, C]`` in place.

    Calls ``log`` after each step. Returns the damping at each step, and how many tries
    were refused. Stops early if no damping lowers the loss.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    theta, r = parameters_to_vector(params).detach(), model(X).detach()
    if r.ndim != 2 or len(r) != len(X):
        raise ValueError(f"model(X) has shape {list(r.shape)}, not [N={len(X)}, C]")
    history, refused = [], 0
    for _ in range(steps):
        J = flat_jacobian(model, X)
        for _ in range(tries):
            trial = theta + damped_step(J, r.flatten(), mu)
            vector_to_parameters(trial, params)
            r_trial = model(X).detach()
            if r_trial.square().sum() < r.square().sum():  # not if it is not a number
                break
            refused, mu = refused + 1, 2 * mu
        else:
            vector_to_parameters(theta, params)
            break
        theta, r = trial, r_trial
        history.append(mu)
        rounding = torch.finfo(J.dtype).eps * J.square().sum().item()
        mu = max(mu / 5, rounding)  # less would not change J @ J.T
        log()
    return history, refused


# %%
# It trains the network from above.

model, steps = pinn(seed=0), 30
history, refused = levenberg_marquardt(model, X, steps)
print(f"{len(history)} steps, {refused} tries refused, error {error(model):.0e}")
low, high = min(history), max(history)
print(f"damping from {high:.0e} to {low:.0e}")

# %%
# Regression
# ----------
# The function takes one input: give it the targets as last columns. To take it along:
# ``from levenberg_marquardt import levenberg_marquardt``, and this class. All here is
# in double precision.


class Misfit(nn.Module):
    """Map inputs beside targets, ``[N, D + C]``, to ``fs - Y``, ``[N, C]``."""

    def __init__(self, net, C):
        super().__init__()
        self.net, self.C = net, C

    def forward(self, XY):
        return self.net(XY[:, : -self.C]) - XY[:, -self.C :]


points = torch.rand(50, 2)
XY = torch.cat([points, torch.sin(3 * points).prod(1, keepdim=True)], dim=1)
net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1))
misfit = Misfit(net, C=1)
before = misfit(XY).square().mean()
_ = levenberg_marquardt(misfit, XY, steps=40)
after = misfit(XY).square().mean()
print(f"mean square of fs - Y: from {before:.0e} to {after:.0e}")

# %%
# Error against seconds
# ---------------------
# The others are what people take: Adam, and L-BFGS with a line search. They need only
# gradients, and take more steps in that time. Three seeds each.

# fold: How the methods are timed


def adam(model, log):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(200):
        optimizer.zero_grad()
        (model(X).square().sum() / 2).backward()
        optimizer.step()
        log()


def lbfgs(model, log):
    options = {"max_iter": 10, "max_eval": 100, "line_search_fn": "strong_wolfe"}
    options |= {"history_size": 50, "tolerance_change": 0, "tolerance_grad": 0}
    optimizer = torch.optim.LBFGS(model.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().sum() / 2
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
        log()


def ours(model, log):
    levenberg_marquardt(model, X, steps, log=log)


def note(curve, model, start):
    curve.append((time.perf_counter() - start, error(model)))


methods = {"Adam": adam, "L-BFGS": lbfgs, "Levenberg-Marquardt": ours}
curves = {name: [] for name in methods}
for seed in range(3):
    for name, method in methods.items():
        model = pinn(seed)
        curve = [(0, error(model))]
        method(model, partial(note, curve, model, time.perf_counter()))
        curves[name].append(curve)

for name, runs in curves.items():
    seconds, errors = zip(*(run[-1] for run in runs))
    print(
        f"{name}: {min(seconds):.1f} to {max(seconds):.1f} s, "
        f"error {min(errors):.0e} to {max(errors):.0e}"
    )

# %%
# A line is one seed. Lower is better.

# fold: How the figure is drawn
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for (name, runs), color in zip(curves.items(), ["#E69F00", "#56B4E9", "#D55E00"]):
    for run in runs:
        label = name if run is runs[0] else None
        ax.semilogy(*zip(*run), color=color, linewidth=3, label=label)
worst = {name: max(run[-1][1] for run in runs) for name, runs in curves.items()}
ax.set_title(
    f"Largest error at the end: {worst['Adam']:.0e} of Adam,\n"
    f"{worst['Levenberg-Marquardt']:.0e} of Levenberg-Marquardt"
)
ax.set(xlabel="seconds", ylabel="relative error of the solution")
ax.yaxis.set_major_formatter("{x:g}")
fig.legend(loc="outside lower center", ncols=3)
plt.show()

# %%
# Step in the space of samples
# ----------------------------
# The step minimizes the loss of the linear model plus ``mu / 2`` times the squared norm
# of the step. In parameter space that is a ``[P, P]`` system, in sample space an
# ``[N * C, N * C]`` one, with the neural tangent kernel (NTK) ``J @ J.T``. Two
# references: ``lstsq`` on the stacked rows, and SciPy's own Levenberg-Marquardt, told
# to minimize the same.

model = Residual(nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)))
J, r, mu = flat_jacobian(model, X), model(X).detach().flatten(), 0.01
step = damped_step(J, r, mu)
N, P = J.shape
stacked = torch.cat([J, mu**0.5 * torch.eye(P)])
right = torch.cat([-r, torch.zeros(P)])
assert_close(step, torch.linalg.lstsq(stacked, right[:, None]).solution[:, 0])

A, b = stacked.numpy(), right.numpy()
fit = least_squares(lambda d: A @ d - b, torch.zeros(P), lambda d: A, method="lm")
assert_close(step, torch.tensor(fit.x))
print(f"A [{N}, {N}] system gives the step of lstsq and SciPy on [{N + P}, {P}].")

# %%
# Cost
# ----
# ``J`` holds ``N * C * P`` numbers, the product ``J @ J.T`` takes ``(N * C) ** 2 * P``
# operations, and the solve ``(N * C) ** 3``.

model = pinn(seed=0)
for N in 66, 264:
    points = torch.linspace(0, 1, N)[:, None]
    J, r = flat_jacobian(model, points), model(points).detach().flatten()
    jacobian = Timer("flat_jacobian(model, points)", globals=globals()).timeit(5)
    step = Timer("damped_step(J, r, 0.1)", globals=globals()).timeit(5)
    times = f"Jacobian {jacobian.mean * 1e3:.0f} ms, step {step.mean * 1e3:.1f} ms"
    print(f"N = {N}: J has {J.numel() * 8 / 1e6:.1f} MB, {times}")
torch.set_num_threads(threads)

# %%
# - If ``J`` does not fit, sum ``J @ J.T`` over blocks of parameters, or multiply with
#   ``J`` and never store it: ``scale/jacobians_without_memory.py``.
# - ``batched_jacobian`` from ``batched_jacobian.py`` goes in the place of
#   ``vmap_jacrev``, on this residual as well: same arguments, same result.
#   Where the residuals are plain outputs of layers, ``scale/neural_tangent_kernel.py``
#   has ``J @ J.T`` without ``J``.
#
# When not to use it
# ------------------
# - Mini-batches: a step is judged on the same residuals before and after. With new
#   samples each time, take a first-order optimizer.
# - Fewer parameters than residuals: solve ``(J.T @ J + mu) step = -J.T @ r`` instead,
#   and compare with Adam, which may win.
# - Noisy targets: a better minimum of the training loss fits the noise as well, and
#   predicts no better.
# - No sum of squares, as with a softmax: weight the rows first.
# - The error comes from the points or the network and not from the training: better
#   steps do not help.
#
# What to take home
# -----------------
# - With more parameters than residuals, a second-order step is a small solve.
# - Raise the damping until the loss falls, then lower it. A refused try needs no new
#   Jacobian.
# - One step costs more than one of Adam or L-BFGS: compare in seconds.
#
# Next: ``scale/universal_jacobian.py``, to compute ``J`` in less time. The alternative:
# ``use/training_predicted.py``, what first-order steps would reach, without training.

# sphinx_gallery_parallel = False
