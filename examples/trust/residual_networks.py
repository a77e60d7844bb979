"""
Residual networks and batch norm
================================

After this page you can compute the Jacobian of a residual network with each method, and
you know which change fixes each error on the way: in-place operations, layers without
rules, functions between layers, and containers. You also know what batch norm in
training mode does to a Jacobian, and which methods then return another derivative.

The packages are ``torch``, ``backpack-for-pytorch``, ``matplotlib``, and
``scikit-learn`` for its images of digits.
"""

import copy
import warnings

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.custom_module.branching import SumModule
from backpack.extensions import BatchGrad, SqrtGGNExact
from sklearn.datasets import load_digits
from torch import autograd, nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.testing import assert_close

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # more threads only disturb a network this small
_ = torch.manual_seed(0)

# %%
# Network
# -------
# The network has what is hard in a ResNet of torchvision: a ReLU that works in place
# and is called twice, ``out += identity``, batch norm, a ``downsample`` branch where
# the shape changes, adaptive pooling, and ``torch.flatten`` before the last layer.


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
    def __init__(self, block=ResidualBlock):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = block(3, 4, 3)
        self.layer2 = block(3, 5, 6, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# %%
# We train it briefly. ``X`` holds ``N`` images that it has not seen, with shape
# ``[N, 1, 8, 8]``, and the outputs ``fs`` have shape ``[N, C]``. ``model`` is in eval
# mode from here on.

digits = load_digits()
images = torch.from_numpy(digits.images)[:, None] / 16
labels = torch.from_numpy(digits.target)
model = ResNet()
optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
for batch in torch.cat([torch.randperm(1600) for _ in range(4)]).split(50):
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

N, C = 7, 10
X = images[-N:]
_ = model.eval().zero_grad()
right = (model(images[1600:]).argmax(1) == labels[1600:]).double().mean()
print(f"Right for {right:.0%} of the images that it has not seen.")

# %%
# Methods that need no change
# ---------------------------
# In eval mode, these need nothing but the model: the loop over ``autograd.grad``, which
# is the reference, the same with ``is_grads_batched=True``, and ``torch.func``. Each
# returns ``{name: Jacobian [N, C, *p.shape]}``. All of them call ``outputs``, which
# works on clones of the buffers, so that the running statistics of batch norm stay.


def checked(fs, X):
    if fs.ndim != 2 or len(fs) != len(X):
        raise ValueError(f"model(X) has shape {list(fs.shape)}, not [N={len(X)}, C]")
    return fs


def outputs(model, params, X):
    """Return ``fs`` of shape ``[N, C]``, and leave the buffers of ``model`` alone."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return checked(functional_call(model, (params, buffers), (X,)), X)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop_jacobian(model, X):
    params = trained(model)
    fs = outputs(model, params, X)
    options = {"retain_graph": True, "materialize_grads": True}
    rows = [autograd.grad(f, params.values(), **options) for f in fs.flatten()]
    blocks = [torch.stack(block).unflatten(0, fs.shape) for block in zip(*rows)]
    return dict(zip(params, blocks))


def grads_batched_jacobian(model, X):
    params = trained(model)
    fs = outputs(model, params, X)
    E = torch.eye(fs.numel(), dtype=fs.dtype).unflatten(1, fs.shape)
    rows = autograd.grad(fs, params.values(), E, is_grads_batched=True)
    return {name: row.unflatten(0, fs.shape) for name, row in zip(params, rows)}


def jacrev_jacobian(model, X):
    params = {name: p.detach() for name, p in trained(model).items()}
    return jacrev(lambda params: outputs(model, params, X))(params)


def vmap_jacobian(model, X):
    params = {name: p.detach() for name, p in trained(model).items()}
    jacobian = jacrev(lambda params, x: outputs(model, params, x[None])[0])
    return vmap(jacobian, (None, 0))(params, X)


jacobian = loop_jacobian(model, X)
for method in grads_batched_jacobian, jacrev_jacobian, vmap_jacobian:
    assert_close(method(model, X), jacobian)
    print(f"{method.__name__} agrees with the loop for {len(jacobian)} parameters.")

# %%
# BackPACK with a residual network
# --------------------------------
# The two BackPACK methods take a model that is extended already, because this page is
# about how to get there. ``BatchGrad`` takes one pass per output, ``SqrtGGNExact`` one
# pass in all. Both are explained in ``batched_jacobians.py``.


def batchgrad_jacobian(extended, X):
    X, params = X.detach().requires_grad_(), trained(extended)
    fs = checked(extended(X), X)
    N, C = fs.shape
    jacobian = {name: p.new_empty(N, C, *p.shape) for name, p in params.items()}
    for c in range(C):
        retain = c < C - 1
        with backpack(BatchGrad(), retain_graph=retain):
            autograd.grad(fs[:, c].sum(), [X, *params.values()], retain_graph=retain)
        for name, p in params.items():
            jacobian[name][:, c] = p.grad_batch.reshape(len(X), *p.shape)
            del p.grad_batch
    return jacobian


def sqrt_ggn_jacobian(extended, X):
    X, params = X.detach().requires_grad_(), trained(extended)
    fs = checked(extended(X), X)
    loss = extend(nn.MSELoss(reduction="sum"))(fs, torch.zeros_like(fs))
    with backpack(SqrtGGNExact()):
        autograd.grad(loss, [X, *params.values()])
    jacobian = {}
    for name, p in params.items():
        jacobian[name] = p.sqrt_ggn_exact.transpose(0, 1) / 2**0.5
        del p.sqrt_ggn_exact  # [C, N, *p.shape]: as large as the Jacobian
    return jacobian


def fails(text, method, *args, on_warning="error"):
    """Print the error or the warning of a call, which has to contain ``text``."""
    try:
        with warnings.catch_warnings(action=on_warning):
            method(*args)
    except Exception as error:
        assert text in str(error), f"{text!r} became {error!r}: correct this page"
        print(f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}")
    else:
        raise AssertionError(f"{text!r} is gone: correct this page")


# %%
# Output 0 of BackwardHookFunction is a view
# ------------------------------------------
# The first attempt fails in the forward pass. ``extend`` gives each layer a full
# backward hook, for which PyTorch returns the output of the layer as a view. ReLU with
# ``inplace=True`` then overwrites a view, and PyTorch forbids that. Without ``inplace``
# the text stays: ``out += identity`` overwrites the output of batch norm. Both have to
# go.


def extend_leaves(model):
    """Extend the layers of ``model``, not the classes that hold them."""
    for module in model.modules():
        if not list(module.children()):
            extend(module)
    return model


def rebuilt(block, avgpool=None):
    """Return a copy of ``model`` from other blocks, without in-place ReLU."""
    net = ResNet(block)
    net.load_state_dict(model.state_dict())
    net.avgpool = avgpool or net.avgpool
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net.eval()


class SumBlock(ResidualBlock):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


text = "Output 0 of BackwardHookFunction is a view and is being modified inplace"
fails(text, batchgrad_jacobian, extend(copy.deepcopy(model)), X)
fails(text, batchgrad_jacobian, extend(rebuilt(ResidualBlock)), X)

# %%
# With ``+`` instead of ``+=``, ``BatchGrad`` runs, but warns that it finds no rule for
# the class ``SumBlock``. The class needs none: its layers have theirs. With extended
# layers, ``BatchGrad`` is right, without a warning.

no_rule = "Extension saving to grad_batch does not have an extension for Module"
fails(no_rule, batchgrad_jacobian, extend(rebuilt(SumBlock)), X)
assert_close(batchgrad_jacobian(extend_leaves(rebuilt(SumBlock)), X), jacobian)
print("BatchGrad with + and extended layers agrees with the loop.")

# %%
# BackPACK extension expects a backpropagation quantity
# -----------------------------------------------------
# ``SqrtGGNExact`` sends a quantity of its own back from layer to layer. So it needs a
# rule for each layer, and a layer for each operation. We change one thing at a time:
#
# 1. Adaptive pooling has no rule. The images have 4 x 4 pixels there: ``AvgPool2d(4)``
#    is the same function.
# 2. BackPACK finds the quantity of a layer by the memory address of its output.
#    ``torch.flatten`` keeps the address and changes the shape. Take ``nn.Flatten``.
# 3. The sum with ``+`` is no layer. The quantity ends there, and the layer before gets
#    ``None``. Take BackPACK's ``SumModule``, and one ReLU for each call.
# 4. Now all layers have rules, but the container has not. Extend the layers only.

pool, head = nn.AvgPool2d(4), nn.Sequential(nn.AvgPool2d(4), nn.Flatten())


class LayerBlock(ResidualBlock):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sum, self.relu2 = SumModule(), nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu2(self.sum(self.bn2(self.conv2(out)), self.downsample(x)))


missing = "Extension saving to sqrt_ggn_exact does not have an extension for Module"
lost = "BackPACK extension expects a backpropagation quantity but it is None."
fails(missing, sqrt_ggn_jacobian, extend_leaves(rebuilt(SumBlock)), X)
shape = "Difference in dimension must be 1."
fails(shape, sqrt_ggn_jacobian, extend_leaves(rebuilt(SumBlock, pool)), X)
fails(lost, sqrt_ggn_jacobian, extend_leaves(rebuilt(SumBlock, head)), X)
fails(missing, sqrt_ggn_jacobian, extend(rebuilt(LayerBlock, head)), X)
assert_close(sqrt_ggn_jacobian(extend_leaves(rebuilt(LayerBlock, head)), X), jacobian)
print("SqrtGGNExact with a layer for each operation agrees with the loop.")

# %%
# Converter
# ---------
# ``extend(model, use_converter=True)`` does almost all of this: it traces the forward
# pass and writes it again with ``SumModule``, ``nn.Flatten``, and a ReLU for each call,
# none of them in place. Two things are left to you: it changes the model that you pass,
# so pass a copy, and it keeps the adaptive pooling. ``extended_copy`` takes care of
# both.


def extended_copy(model, X):
    """Return a copy of ``model`` that BackPACK's methods take, for inputs like ``X``.

    Its forward pass is traced, so it must not depend on values. Adaptive average
    pooling becomes ``AvgPool2d`` where the sizes divide. Elsewhere it stays, which is
    enough for ``BatchGrad``. Raises ``ValueError`` for batch norm in training mode, and
    if the copy has other outputs.
    """
    model, kernels = copy.deepcopy(model), {}

    def record(module, inputs, output):
        sizes = list(zip(inputs[0].shape[-2:], output.shape[-2:]))
        exact = all(size % to == 0 for size, to in sizes)
        kernel = tuple(size // to for size, to in sizes) if exact else None
        kernels.setdefault(module, set()).add(kernel)

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


changed = copy.deepcopy(model)
extended = extend(changed, use_converter=True)
print(f"The model that was passed, before and after: {model.relu}, {changed.relu}")
assert_close(batchgrad_jacobian(extended, X), jacobian)
fails(missing, sqrt_ggn_jacobian, extended, X)

for method in batchgrad_jacobian, sqrt_ggn_jacobian:
    assert_close(method(extended_copy(model, X), X), jacobian)
    print(f"{method.__name__} of extended_copy agrees with the loop.")

# %%
# The converter can change the function. Here the ReLU in place overwrites ``x``, which
# the shortcut then reads, as in a network with the activation first. In the converted
# model ``x`` keeps its values: both methods are wrong, and nothing is said. So
# ``extended_copy`` compares the outputs.


class ActivationFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 9), nn.Linear(9, 9)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.relu(x)) + x


net, x = ActivationFirst(), torch.rand(N, 8)
weight = "first.weight"
expected = loop_jacobian(net, x)[weight]
for method in batchgrad_jacobian, sqrt_ggn_jacobian:
    found = method(extend(copy.deepcopy(net), use_converter=True), x)[weight]
    assert not torch.allclose(found, expected), "it is right now: correct this page"
    print(f"{method.__name__} after the converter: wrong, without an error")
fails("the converter changed the outputs", extended_copy, net, x)

# %%
# 'Parameter' object has no attribute 'grad_batch'
# ------------------------------------------------
# ``BatchGrad`` stores nothing for a layer whose rule did not run, and reading the
# result raises. Frequent causes:
#
# - The layer has no rule. The converter does not help: in the same network with
#   ``GroupNorm`` for batch norm, the warning comes first, then the error. The methods
#   without rules are right there.
# - ``X`` is not differentiated, so the hook of the first layer does not run. Pass ``X``
#   to ``autograd.grad`` together with the parameters.
# - The parameter is frozen. ``trained`` leaves it out.

grouped = copy.deepcopy(model)
for name, module in model.named_modules():
    if isinstance(module, nn.BatchNorm2d):
        grouped.set_submodule(name, nn.GroupNorm(1, module.num_features))

absent = "'Parameter' object has no attribute 'grad_batch'"
fails(no_rule, batchgrad_jacobian, extended_copy(grouped, X), X)
fails(absent, batchgrad_jacobian, extended_copy(grouped, X), X, on_warning="ignore")
assert_close(vmap_jacobian(grouped, X), loop_jacobian(grouped, X))
print("vmap_jacobian with GroupNorm agrees with the loop.")

extended, leaf = extended_copy(model, X), X.clone().requires_grad_()
weight = extended.conv1.weight


def first_layer(*differentiated):
    with backpack(BatchGrad()):
        autograd.grad(extended(leaf).sum(), differentiated)
    return weight.grad_batch


fails(absent, first_layer, weight)
assert_close(first_layer(leaf, weight), jacobian["conv1.weight"].sum(1))
print("With X in the list, the first layer agrees with the loop.")
_ = weight.requires_grad_(False)
del weight.grad_batch
fails(absent, first_layer, leaf)

# %%
# Batch norm in training mode
# ---------------------------
# In training mode, batch norm divides by the standard deviation of the batch, so that
# each output depends on each sample. The Jacobian still exists: ``J[n, c]`` is the
# derivative of ``fs[n, c]`` for this batch, and changes with the other samples. A
# forward pass also moves the running statistics, which are buffers: clone them, as
# ``outputs`` does. A pass that changes them is an error for ``torch.func``.

training = copy.deepcopy(model).train()
statistics = copy.deepcopy(dict(training.named_buffers()))
params = trained(training)
direct = jacrev(lambda params: functional_call(training, params, (X,)))
fails("would mutate a captured Tensor", direct, params)

mixed = loop_jacobian(training, X)
for method in grads_batched_jacobian, jacrev_jacobian:
    assert_close(method(training, X), mixed)
    print(f"{method.__name__} agrees with the loop in training mode.")

# %%
# Forward mode shares no backward pass, so it is an independent check: for a random
# direction in the space of the parameters, ``jvp`` gives the derivative of ``fs``, and
# the Jacobian times the direction has to be the same.

# the rules that jvp loads are scripted, which PyTorch itself warns about
warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
direction = {name: torch.randn_like(p) for name, p in params.items()}
_, slope = jvp(lambda params: outputs(training, params, X), (params,), (direction,))
product = sum((J * direction[name]).flatten(2).sum(2) for name, J in mixed.items())
assert_close(product, slope)
assert_close(dict(training.named_buffers()), statistics, rtol=0, atol=0)
print("The loop agrees with forward mode. The running statistics have not changed.")
_ = training(X)
changes = [not b.equal(statistics[name]) for name, b in training.named_buffers()]
print(f"A plain forward pass changes {sum(changes)} of {len(changes)} buffers.")

# %%
# The other methods assume that samples do not mix:
#
# - ``vmap`` raises. Without running statistics it does not, and normalizes each image
#   by its own pixels: the result is wrong, and nothing is said.
# - ``SqrtGGNExact`` raises.
# - ``BatchGrad`` warns. What it stores for sample ``n`` is the part of the derivative
#   of ``fs[:, c].sum()`` that flows through sample ``n``. The sum over samples is
#   right. A single entry is right only where no batch norm follows.

fails("Batch norm got a batched tensor as input", vmap_jacobian, training, X)
alone = copy.deepcopy(training)
for module in alone.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None

text = "Encountered BatchNorm module in training mode"
extended = extend(copy.deepcopy(training), use_converter=True)
_ = extended.set_submodule("avgpool", extend(nn.AvgPool2d(4)))
fails(text, sqrt_ggn_jacobian, extended, X)
fails(text, batchgrad_jacobian, extended, X)
with warnings.catch_warnings(action="ignore"):
    shares = batchgrad_jacobian(extended, X)
for method, J in ("vmap", vmap_jacobian(alone, X)), ("BatchGrad", shares):
    good = [name for name in mixed if torch.allclose(J[name], mixed[name])]
    assert len(good) < len(mixed), f"{method} is right now: correct this page"
    print(f"{method} is right for {len(good)} of {len(mixed)} parameters: {good}")
assert_close(*({name: b.sum(0) for name, b in J.items()} for J in (shares, mixed)))
print("Summed over the samples, BatchGrad agrees with the loop.")

# %%
# Test for samples that mix
# -------------------------
# Row ``n``, column ``m`` shows the norm of the derivative of ``fs[n]`` with respect to
# the image ``X[m]``. In eval mode all but the diagonal is exactly zero, marked by ``0``
# on gray. Run this on a model of yours before you take a method that assumes that
# samples do not mix. Zeros at one ``X`` are evidence, and no proof.


def sample_influence(model, X):
    """Return ``[N, N]``: the norm of the derivative of ``fs[n]`` by ``X[m]``."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda X: outputs(model, params, X))(X)  # [N, C, N, *X.shape[1:]]
    return J.flatten(3).norm(dim=(1, 3))


modes = {"eval mode": model, "training mode": training}
maps = {mode: sample_influence(net, X) for mode, net in modes.items()}
off = ~torch.eye(N, dtype=torch.bool)
for mode, values in maps.items():
    print(f"{mode}: {(values[off] != 0).sum()} of {N * (N - 1)} pairs of samples mix.")
assert_close(maps["eval mode"] == 0, off)

plt.rcParams["font.size"] = 11
fig, axes = plt.subplots(1, 2, figsize=(6, 4), sharey=True, layout="constrained")
fig.suptitle("Which sample's output depends on which sample's input")
colors = plt.get_cmap("cividis").with_extremes(bad="0.85")
limit = max(values.max().item() for values in maps.values())
for ax, (mode, values) in zip(axes, maps.items()):
    nonzero = values.where(values != 0, torch.nan).numpy()
    image = ax.imshow(nonzero, cmap=colors, vmin=0, vmax=limit)
    for n, m in (values == 0).nonzero().tolist():
        ax.text(m, n, "0", ha="center", va="center")
    ax.set(title=mode, xlabel="input of sample m", xticks=range(N), yticks=range(N))
axes[0].set_ylabel("output of sample n")
fig.colorbar(image, ax=axes, label="norm of the derivative", location="bottom")
plt.show()

# %%
# Which method to take
# --------------------
# - Eval mode first, unless you want the derivative of a batch that mixes.
# - No rules needed: ``vmap(jacrev)`` where samples do not mix, ``is_grads_batched`` or
#   ``jacrev`` over the batch with clones of the buffers where they do.
# - BackPACK: ``extended_copy``, and one of the methods above to compare with.

# %%
# Where to go next
# ----------------
# Next: ``trust/sequence_models.py`` does the same for recurrent networks and attention.
# The alternative: ``scale/universal_jacobian.py`` takes these models unchanged, and
# checks its result.
