"""
Residual networks and batch norm
================================

After this page you can compute the Jacobian of a residual network with ``torch.func``
and with BackPACK. You know what batch norm in training mode does to it, how to see
whether the samples of a batch mix in your own model, and the change that mends each
error on the way.
"""

# fold: Imports
import copy
import operator
import warnings
from itertools import product

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.custom_module.branching import SumModule
from backpack.extensions import BatchGrad, SqrtGGNExact
from torch import autograd, nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more threads only disturb a network this small
_ = torch.manual_seed(0)

# %%
# Residual network in eval mode
# -----------------------------
# The network has what a ResNet of torchvision has: a ReLU that works in place and is
# called twice, ``out += identity``, batch norm, a ``downsample`` branch, adaptive
# pooling, and ``torch.flatten``. One pass in training mode fills the running statistics
# of batch norm. Then ``eval()`` makes them constants, and the samples no longer mix.

# fold: A small ResNet


class ResidualBlock(nn.Module):
    def __init__(self, inputs, width, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = ResidualBlock(3, 4, 3)
        self.layer2 = ResidualBlock(3, 5, 6, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# %%
# The reference is one backward pass for each output of each sample.

# fold: The Jacobian from a loop


def autograd_loop(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``N * C`` backward passes."""
    fs = model(X)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "materialize_grads": True}  # zeros if unused
    places = product(*map(range, fs.shape))
    rows = [autograd.grad(fs[place], params.values(), **options) for place in places]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


# %%
# In eval mode the recipe ``vmap(jacrev)`` takes the network as it is. The images ``X``
# are ``[N, 1, 8, 8]``, the outputs ``fs = model(X)`` are ``[N, C]``, and a parameter
# ``p`` has the Jacobian ``[N, C, *p.shape]``.


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)


N, C, X, model = 7, 10, torch.rand(7, 1, 8, 8), ResNet()
_ = model(torch.rand(50, 1, 8, 8))
_ = model.eval()

jacobian = vmap_jacrev(model, X)
assert_close(jacobian, autograd_loop(model, X))
for name, block in list(jacobian.items())[:2]:
    print(f"{name}: {list(block.shape)}")
print(f"All {len(jacobian)} blocks agree with the loop.")

# %%
# A model whose first operation works in place overwrites your ``X``, with this method
# and with others. Then pass ``X.clone()``.

threshold = nn.Threshold(0.5, 0, inplace=True)
begins_in_place = nn.Sequential(threshold, nn.Flatten(), nn.Linear(64, C))
kept = X.clone()
_ = vmap_jacrev(begins_in_place, X.clone())
print("X is the same after a call with X.clone():", X.equal(kept))
_ = vmap_jacrev(begins_in_place, X)
print("X is the same after a call with X:", X.equal(kept))
X = kept

# %%
# Below, ``error_text`` returns the text of the error, or the warning, of a call.

# fold: The text of an error


def error_text(function, *args):
    """Return the error, or the warning, of a call that has to fail."""
    try:
        with warnings.catch_warnings(action="error"):
            function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}"
    raise AssertionError("this call raises no error any more: correct this page")


# %%
# Batch norm in training mode
# ---------------------------
# In training mode, batch norm divides by the standard deviation of the batch, so each
# output depends on each sample. The Jacobian exists: ``J[n, c]`` is the derivative of
# ``fs[n, c]`` for this batch, and another batch gives sample ``n`` another one. Methods
# for one sample at a time raise, or, from hooks of your own, are wrong. ``jacrev`` over
# the batch is right, if it has clones of the buffers, because a forward pass in
# training mode moves the running statistics.

training = copy.deepcopy(model).train()
params = {name: p.detach() for name, p in training.named_parameters()}


def of_the_batch(params):
    buffers = {name: b.clone() for name, b in training.named_buffers()}
    return functional_call(training, (params, buffers), X)


without_clones = jacrev(lambda params: functional_call(training, params, X))
print("vmap_jacrev,", error_text(vmap_jacrev, training, X))
print("jacrev without clones,", error_text(without_clones, params))

mixed = jacrev(of_the_batch)(params)
assert_close(mixed, autograd_loop(copy.deepcopy(training), X))
print("jacrev over the batch agrees with the loop.")

# %%
# ``autograd.grad`` with ``is_grads_batched=True`` is right in training mode, too, but
# the forward pass before it moves the running statistics of your model. Pass clones of
# the buffers there as well.


def from_grads_batched(fs):
    E = torch.eye(fs.numel()).to(fs).unflatten(1, fs.shape)
    rows = autograd.grad(fs, list(training.parameters()), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


before = {name: b.clone() for name, b in training.named_buffers()}
clones = {name: b.clone() for name, b in training.named_buffers()}
for title, forward in {
    "functional_call with clones": lambda: functional_call(training, clones, X),
    "model(X)": lambda: training(X),
}.items():
    assert_close(from_grads_batched(forward()), mixed)
    moved = sum(not b.equal(before[name]) for name, b in training.named_buffers())
    print(f"{title} agrees, and has moved {moved} of {len(before)} buffers.")

# %%
# Batch norm without running statistics goes through ``vmap``, and the result is wrong
# without an error: each image is normalized by its own pixels.

alone = copy.deepcopy(training)
for module in alone.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.running_mean = module.running_var = module.num_batches_tracked = None
found = vmap_jacrev(alone, X)
good = [name for name in mixed if torch.allclose(found[name], mixed[name])]
print(f"vmap_jacrev is right for {len(good)} of {len(mixed)} parameters: {good}")
assert len(good) < len(mixed), "it is right now: correct this page"

# %%
# Test for samples that mix
# -------------------------
# Row ``n``, column ``m`` shows the norm of the derivative of ``fs[n]`` by the image
# ``X[m]``. Where samples stand alone, all but the diagonal is exactly zero, marked by
# ``0`` on gray. Run this on a model of yours before you take a method for one sample at
# a time. Zeros at one ``X`` are evidence, and no proof.


def sample_influence(model, X):
    """Return ``[N, N]``: the norm of the derivative of ``fs[n]`` by ``X[m]``."""

    def f(X):  # a model may write to parameters and buffers
        tensors = *model.named_parameters(), *model.named_buffers()
        copies = {name: tensor.detach().clone() for name, tensor in tensors}
        return functional_call(model, copies, X.clone())

    J = autograd.functional.jacobian(f, X)  # [N, C, N, *X.shape[1:]]
    return J.flatten(3).norm(dim=(1, 3))


maps = {"eval mode": sample_influence(model, X)}
maps["training mode"] = sample_influence(training, X)
off = ~torch.eye(N, dtype=torch.bool)
counts = {mode: (values[off] != 0).sum().item() for mode, values in maps.items()}
for mode, count in counts.items():
    print(f"{mode}: {count} of {N * (N - 1)} pairs of samples mix.")
assert_close(maps["eval mode"] == 0, off)

# %%
# The picture of both modes, each divided by its maximum.

# fold: How it is drawn
fig, axes = plt.subplots(1, 2, figsize=(5, 3.2), sharey=True, layout="constrained")
title = "{} pairs of samples mix in eval mode,\n{} in training mode"
fig.suptitle(title.format(*counts.values()))
colors = plt.get_cmap("cividis").with_extremes(bad="0.85")
for ax, (mode, values) in zip(axes, maps.items()):
    nonzero = (values / values.max()).where(values != 0, torch.nan).numpy()
    image = ax.imshow(nonzero, cmap=colors, vmin=0, vmax=1)
    for n, m in (values == 0).nonzero().tolist():
        ax.text(m, n, "0", ha="center", va="center")
    ax.set_title(mode, loc="left")
    ax.set(xlabel="input of sample m", xticks=range(N), yticks=range(N))
axes[0].set_ylabel("output of sample n")
fig.colorbar(image, ax=axes, label="norm of the derivative / maximum")
plt.show()

# %%
# BackPACK with a residual network
# --------------------------------
# BackPACK works layer by layer: ``BatchGrad`` takes one pass per output and needs a
# rule for each layer with parameters, ``SqrtGGNExact`` takes one pass in all and needs
# a layer with a rule for every operation. Both are explained in
# ``batched_jacobians.py``. Here they take a model that is extended already. Times
# against ``vmap(jacrev)`` are in ``compute/choosing_a_method.py``, and ``verdicts`` of
# ``trust/layer_support.py`` says for your model where they are right.

# fold: The Jacobian from BatchGrad, and from SqrtGGNExact


def batch_grad(extended, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from ``C`` backward passes."""
    X = X.detach().requires_grad_(X.is_floating_point())
    fs = extended(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    N, C = fs.shape
    params = {k: p for k, p in extended.named_parameters() if p.requires_grad}
    inputs = [X] * X.requires_grad + list(params.values())
    jacobian = {name: p.new_empty(N, C, *p.shape) for name, p in params.items()}
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), inputs, retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch.reshape(N, *p.shape)
            del p.grad_batch
    return jacobian


def sqrt_ggn(extended, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one backward pass."""
    X = X.detach().requires_grad_(X.is_floating_point())
    fs = extended(X)
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    params = {k: p for k, p in extended.named_parameters() if p.requires_grad}
    inputs = [X] * X.requires_grad + list(params.values())
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, inputs)
    jacobian = {}
    for name, p in params.items():  # from [C, N, *p.shape]
        jacobian[name] = p.sqrt_ggn_exact.transpose(0, 1) / 2**0.5
        del p.sqrt_ggn_exact  # as large as the Jacobian
    return jacobian


# %%
# ``extend(model, use_converter=True)`` traces the forward pass and writes it anew, with
# ``SumModule`` for ``+``, ``nn.Flatten`` for ``torch.flatten``, and an ``nn.ReLU`` for
# each call of one, none of them in place. A function such as ``torch.relu`` stays:
# write ``nn.ReLU()`` for ``SqrtGGNExact``. Three things are left to do. It changes the
# model that it gets, so we copy. It keeps adaptive pooling, which has no rule, so we
# put ``AvgPool2d`` there. And it can change the function, so we compare the outputs.


def extended_copy(model, X):
    """Return a copy of ``model`` that BackPACK takes, for inputs of the size of ``X``.

    For other sizes it can be wrong without an error. Adaptive average pooling stays
    where no ``AvgPool2d`` is the same. Raises ``ValueError`` for batch norm in training
    mode, and if the outputs differ.
    """
    model, kernels = copy.deepcopy(model), {}

    def record(pool, inputs, output):
        sizes = list(zip(inputs[0].shape[-2:], output.shape[-2:]))
        exact = all(size % to == 0 for size, to in sizes)
        kernel = tuple(size // to for size, to in sizes) if exact else None
        kernels.setdefault(pool, set()).add(kernel)

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"{name} is batch norm in training mode: model.eval()")
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        fs = model(X.clone())
    for name, module in list(model.named_modules()):
        kernel, *others = kernels.get(module, [None])
        if kernel and not others:
            model.set_submodule(name, nn.AvgPool2d(kernel))
    extended = extend(model, use_converter=True)
    near = torch.finfo(fs.dtype).eps ** 0.5
    with torch.no_grad():
        if not torch.allclose(extended(X.clone()), fs, near, near):
            raise ValueError("the converter changed the outputs of the model")
    return extended


# %%
# Both methods take the copy.

for method in batch_grad, sqrt_ggn:
    assert_close(method(extended_copy(model, X), X), jacobian)
    print(f"{method.__name__} of extended_copy(model, X) agrees with vmap_jacrev.")

# %%
# Errors of a model that is extended by hand
# ------------------------------------------
# Without the converter, each operation has to be a layer, and each layer is extended,
# not the class that holds them. ``SmallResidual`` is a smallest network with this form.
# Both methods are right for it, for ``x`` of shape ``[N, 1, 6, 6]``.


class SmallResidual(nn.Module):
    def __init__(self, **steps):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1)
        self.relu1, self.relu2, self.add = nn.ReLU(), nn.ReLU(), SumModule()
        self.pool, self.flatten = nn.AvgPool2d(4), nn.Flatten()
        self.fc = nn.Linear(2, 3)
        for name, step in steps.items():
            delattr(self, name)
            setattr(self, name, step)

    def forward(self, x):
        h = self.conv1(x)
        out = self.add(self.conv2(self.relu1(h)), h)
        return self.fc(self.flatten(self.pool(self.relu2(out))))


def extended_leaves(model):
    """Extend the layers of ``model``, not the classes that hold them."""
    for module in model.modules():
        if not list(module.children()):
            extend(module)
    return model


x, net = torch.randn(N, 1, 6, 6), SmallResidual()
for method in batch_grad, sqrt_ggn:
    assert_close(method(extended_leaves(copy.deepcopy(net)), x), vmap_jacrev(net, x))
    print(f"{method.__name__} of SmallResidual() agrees with vmap_jacrev.")
    print(
        f"Its class extended, too: {error_text(method, extend(copy.deepcopy(net)), x)}"
    )

# %%
# Now we put one step back at a time as it stands in common networks. Operations in
# place fail with both methods: ``extend`` gives each layer a full backward hook, for
# which PyTorch returns the output as a view, and a view must not be overwritten.

in_place = {"ReLU(inplace=True)": {"relu1": nn.ReLU(inplace=True)}}
in_place["+="] = {"add": operator.iadd}
for title, step in in_place.items():
    net = SmallResidual(**step)
    for method in batch_grad, sqrt_ggn:
        text = error_text(method, extended_leaves(copy.deepcopy(net)), x)
        print(f"{title}, {method.__name__}: {text}")

# %%
# The other steps fail with ``SqrtGGNExact`` alone, ``BatchGrad`` is right. BackPACK
# passes a quantity from layer to layer, and finds it by the memory address of a layer's
# output. A function between two layers has no rule, so the quantity ends there. A layer
# that is called twice keeps one output of two. ``torch.flatten`` keeps the address, but
# changes the shape. Where a shortcut leads around a function, nothing raises, and the
# result is wrong: see ``trust/silent_failures.py``.

relu = nn.ReLU()
no_layer = {
    "torch.relu": {"relu2": torch.relu},
    "+": {"add": operator.add},
    "one ReLU, called twice": {"relu1": relu, "relu2": relu},
    "AdaptiveAvgPool2d": {"pool": nn.AdaptiveAvgPool2d(1)},
    "torch.flatten": {"flatten": lambda out: torch.flatten(out, 1)},
}
for title, step in no_layer.items():
    net = SmallResidual(**step)
    print(f"{title}: {error_text(sqrt_ggn, extended_leaves(copy.deepcopy(net)), x)}")
    assert_close(
        batch_grad(extended_leaves(copy.deepcopy(net)), x), vmap_jacrev(net, x)
    )
print("batch_grad agrees with vmap_jacrev for each.")

# %%
# Errors of the converter
# -----------------------
# The converter fails where one function is called twice, as in DenseNet or GoogLeNet,
# and where two tensors are multiplied, as in the attention of EfficientNet. Make the
# function a layer, or take ``vmap_jacrev``. Where an operation in place overwrites what
# a shortcut reads, its model is another function, and nothing is said. So
# ``extended_copy`` compares the outputs.

swish = {"relu1": lambda h: h * torch.sigmoid(h)}
cases = {"torch.relu, called twice": {"relu1": torch.relu, "relu2": torch.relu}}
cases |= {"x * sigmoid(x)": swish, "ReLU(inplace=True)": in_place["ReLU(inplace=True)"]}
for title, step in cases.items():
    net = SmallResidual(**step)
    print(f"{title}: {error_text(extended_copy, net, x)}")
    assert_close(vmap_jacrev(net, x), autograd_loop(net, x))
print("vmap_jacrev agrees with the loop for each.")

right = vmap_jacrev(net, x)["conv1.weight"]
for method in batch_grad, sqrt_ggn:
    converted = extend(copy.deepcopy(net), use_converter=True)
    same = torch.allclose(method(converted, x)["conv1.weight"], right)
    verdict = "right" if same else "wrong, no error"
    print(f"{method.__name__} after the converter alone: {verdict}")

# %%
# A layer with parameters and without a rule, such as ``GroupNorm``, fails with both
# methods. ``BatchGrad`` warns, and where the warning is ignored, the result is missing.

grouped = SmallResidual(relu2=nn.GroupNorm(1, 2))
extended = extended_copy(grouped, x)
print(error_text(batch_grad, extended, x))
try:
    with warnings.catch_warnings(action="ignore"):
        batch_grad(extended, x)
except AttributeError as error:
    print(f"AttributeError: {error}")
assert_close(vmap_jacrev(grouped, x), autograd_loop(grouped, x))
print("vmap_jacrev with GroupNorm agrees with the loop.")

# %%
# BackPACK and batch norm in training mode
# ----------------------------------------
# ``SqrtGGNExact`` raises. ``BatchGrad`` only warns, and its result is wrong: what it
# stores for sample ``n`` is the part of the derivative of ``fs[:, c].sum()`` that flows
# through sample ``n``. Summed over the samples it is right, a single entry only where
# no batch norm follows.

extended = extend(copy.deepcopy(training), use_converter=True)
_ = extended.set_submodule("avgpool", extend(nn.AvgPool2d(4)))
print("sqrt_ggn,", error_text(sqrt_ggn, extended, X))
print("batch_grad,", error_text(batch_grad, extended, X))
with warnings.catch_warnings(action="ignore"):
    shares = batch_grad(extended, X)
good = [name for name in mixed if torch.allclose(shares[name], mixed[name])]
print(f"batch_grad is right for {len(good)} of {len(mixed)} parameters: {good}")
assert len(good) < len(mixed), "it is right now: correct this page"
assert_close(*({name: b.sum(0) for name, b in J.items()} for J in (shares, mixed)))
print("Summed over the samples, batch_grad agrees with jacrev.")
torch.set_num_threads(threads)

# %%
# What to take home
# -----------------
# - ``model.eval()`` and ``vmap_jacrev``: residual networks need no change.
# - Samples that mix: ``jacrev`` or ``is_grads_batched`` over the batch, with clones of
#   the buffers.
# - BackPACK: ``extended_copy``, or a layer for each operation and none in place.
#
# Next: ``trust/sequence_models.py`` does the same for recurrent networks and attention.
# The alternative: ``scale/universal_jacobian.py`` takes these models unchanged, in
# training mode, too, and checks its result.
