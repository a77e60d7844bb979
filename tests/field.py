"""Models as people have them: real sizes, float32, in eval mode, with random inputs.

``FIELD`` maps names to functions that return a model and its inputs ``X``, and the
outputs are ``[N, C]``. ``torch.manual_seed`` makes them the same again.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import autograd, nn, rand
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F


def mlp(*widths, activation=nn.ReLU):
    """Return linear layers of these widths, with an activation between any two."""
    pairs = [[nn.Linear(*sizes), activation()] for sizes in pairwise(widths)]
    return nn.Sequential(*sum(pairs, [])[:-1])


def convs(*widths):
    """Return convolutions of these widths, each with a ReLU that works in place."""
    pairs = [
        [nn.Conv2d(*sizes, 3, padding=1), nn.ReLU(inplace=True)]
        for sizes in pairwise(widths)
    ]
    return nn.Sequential(*sum(pairs, []))


def scores(width, C=10):
    """Return what follows images with so many channels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, C))


def cnn():
    last = nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * 36, 10)
    return nn.Sequential(convs(1, 16, 16, 16), *last), rand(24, 1, 24, 24)


def pooled_cnn():
    return nn.Sequential(convs(3, 16, 16, 16), scores(16)), rand(32, 3, 32, 32)


def deep_cnn():
    return nn.Sequential(convs(3, *[16] * 7), scores(16)), rand(24, 3, 24, 24)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, X):
        hidden = self.relu(self.norms[0](self.first(X)))
        hidden = self.norms[1](self.second(hidden))
        hidden += X
        return self.relu(hidden)


def trained(model, X):
    """Return the model in eval mode, after a step of its running averages."""
    with torch.no_grad():
        model.train()(X)
    return model.eval(), X


def resnet():
    blocks = [Residual(16) for _ in range(4)]
    first = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return trained(nn.Sequential(*first, *blocks, scores(16)), rand(8, 3, 24, 24))


def depthwise(width, wider):
    mixed = nn.Conv2d(width, wider, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU6()
    apart = nn.Conv2d(wider, wider, 3, padding=1, groups=wider), nn.ReLU6()
    return nn.Sequential(*mixed, *apart)


def mobilenet():
    blocks = depthwise(3, 16), depthwise(16, 24), depthwise(24, 32)
    return trained(nn.Sequential(*blocks, scores(32)), rand(8, 3, 24, 24))


class UNet(nn.Module):
    """A mask of a sixth of the image's size in both directions, flattened."""

    def __init__(self):
        super().__init__()
        self.down, self.inner = convs(3, 12, 12), convs(12, 24, 24)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.join, self.mask = convs(24, 12), nn.Conv2d(12, 1, 6, stride=6)

    def forward(self, X):
        fine = self.down(X)
        coarse = self.inner(F.max_pool2d(fine, 2))
        both = torch.cat([fine, self.up(coarse)], dim=1)
        return self.mask(self.join(both)).flatten(1)


def unet():
    return UNet(), rand(8, 3, 24, 24)


class Attention(nn.Module):
    def __init__(self, width, causal):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, X):
        q, k, v = self.qkv(X).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, causal=False):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, causal))
        hidden = mlp(width, 4 * width, width, activation=nn.GELU)
        self.mlp = nn.Sequential(nn.LayerNorm(width), hidden)

    def forward(self, X):
        X = X + self.attention(X)
        return X + self.mlp(X)


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.position = nn.Parameter(torch.randn(36, 32) / 10)
        self.blocks = nn.Sequential(Block(32), Block(32), nn.LayerNorm(32))
        self.scores = nn.Linear(32, 10)

    def forward(self, X):
        X = self.patches(X).flatten(2).mT + self.position
        return self.scores(self.blocks(X).mean(1))


def vision_transformer():
    return VisionTransformer(), rand(16, 3, 24, 24)


class LanguageModel(nn.Module):
    """Scores of the next word, with the weight that embeds the words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.position = nn.Parameter(torch.randn(24, 32) / 10)
        self.blocks = nn.Sequential(Block(32, True), Block(32, True), nn.LayerNorm(32))
        self.next = nn.Linear(32, 40, bias=False)
        self.next.weight = self.words.weight

    def forward(self, X):
        return self.next(self.blocks(self.words(X) + self.position)[:, -1])


def language_model():
    return LanguageModel(), torch.randint(40, (8, 24))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = kind(6, 24, num_layers=2, batch_first=True)
        self.scores = nn.Linear(24, 5)

    def forward(self, X):
        return self.scores(self.layers(X)[0][:, -1])


def recurrent(kind):
    return Recurrent(kind), rand(20, 12, 6)


class ActNorm(nn.Module):
    """A shift and a scale, set by the first batch."""

    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.ready = False

    def forward(self, X):
        if not self.ready:
            self.shift.data = -X.mean(0).detach()
            self.log_scale.data = -X.std(0).log().detach()
            self.ready = True
        return (X + self.shift) * self.log_scale.exp(), self.log_scale.sum()


class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 48, 12, activation=nn.Tanh)

    def forward(self, X):
        left, right = X.chunk(2, 1)
        log_scale, shift = self.net(left).chunk(2, 1)
        log_scale = torch.tanh(log_scale)
        right = right * log_scale.exp() + shift
        return torch.cat([right, left], dim=1), log_scale.sum(1)


class Flow(nn.Module):
    """The logarithm of the density, ``[N, 1]``."""

    def __init__(self):
        super().__init__()
        layers = [[ActNorm(12), Coupling()] for _ in range(4)]
        self.layers = nn.ModuleList(sum(layers, []))

    def forward(self, X):
        total = 0
        for layer in self.layers:
            X, log_determinant = layer(X)
            total = total + log_determinant
        return (total - X.square().sum(1) / 2)[:, None]


def flow():
    return trained(Flow(), 1 + torch.randn(64, 12) / 3)


class Experts(nn.Module):
    """Each sample goes to two of the experts, all of which compute."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(20, 6)
        self.experts = nn.ModuleList(mlp(20, 48, 7) for _ in range(6))

    def forward(self, X):
        gates = self.gate(X)
        kept, chosen = gates.topk(2)
        weights = torch.zeros_like(gates).scatter(1, chosen, kept.softmax(1))
        answers = torch.stack([expert(X) for expert in self.experts], dim=1)
        return (weights[:, :, None] * answers).sum(1)


def experts():
    return Experts(), torch.randn(48, 20)


class GraphConvolution(nn.Module):
    """Sums over edges, on nodes ``[..., nodes, width]``."""

    def __init__(self, edges, width, wider):
        super().__init__()
        self.linear = nn.Linear(width, wider)
        self.register_buffer("edges", edges)

    def forward(self, X):
        sources, targets = self.edges
        messages = self.linear(X).index_select(-2, sources)
        nodes = torch.zeros_like(self.linear(X))
        return torch.relu(nodes.index_add(-2, targets, messages))


def graph_layers():
    edges = torch.randint(20, (2, 60))
    return GraphConvolution(edges, 8, 24), GraphConvolution(edges, 24, 24)


class Graphs(nn.Module):
    """Many graphs with the same edges: the nodes of a sample are ``[20, 8]``."""

    def __init__(self):
        super().__init__()
        self.layers, self.scores = nn.Sequential(*graph_layers()), nn.Linear(24, 7)

    def forward(self, X):
        return self.scores(self.layers(X).mean(1))


def graphs():
    return Graphs(), rand(24, 20, 8)


def nodes():
    """Return a model of one graph: its samples, the nodes, influence each other."""
    return nn.Sequential(*graph_layers(), nn.Linear(24, 7)), rand(20, 8)


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.each, self.all = mlp(5, 64, 48), mlp(48, 64, 9)

    def forward(self, X):
        return self.all(self.each(X).mean(1))


def deep_sets():
    return DeepSets(), torch.randn(32, 20, 5)


class Residuals(nn.Module):
    """What is left of the heat equation, ``u_t - u_xx``, at points ``(t, x)``."""

    def __init__(self):
        super().__init__()
        self.u = mlp(2, 40, 40, 1, activation=nn.Tanh)


class FuncResiduals(Residuals):
    def forward(self, X):
        def u(point):
            return self.u(point[None])[0, 0]

        slopes = vmap(jacrev(u))(X)
        curvature = vmap(jacrev(jacrev(u)))(X)[:, 1, 1]
        return (slopes[:, 0] - curvature)[:, None]


class GradResiduals(Residuals):
    def forward(self, X):
        X = X.requires_grad_()
        (slopes,) = autograd.grad(self.u(X).sum(), X, create_graph=True)
        (curvature,) = autograd.grad(slopes[:, 1].sum(), X, create_graph=True)
        return slopes[:, :1] - curvature[:, 1:]


def pinn(kind):
    return kind(), rand(64, 2)


class LoRA(nn.Module):
    """A frozen layer and a trained product of two small matrices."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / 10)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank) / 10)

    def forward(self, X):
        return self.layer(X) + X @ self.down.mT @ self.up.mT


def lora():
    first, second = LoRA(nn.Linear(256, 512)), LoRA(nn.Linear(512, 512))
    layers = first, nn.GELU(), second, nn.GELU(), LoRA(nn.Linear(512, 10))
    return nn.Sequential(*layers), rand(64, 256)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = mlp(20, 64, 7)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, X):
        return self.scores(X) / self.temperature


def temperature():
    return Temperature(), rand(32, 20)


def norm_mlp():
    first = nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU()
    second = nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Linear(128, 10)), rand(64, 64)


def far_inputs():
    model, X = norm_mlp()
    return nn.Sequential(nn.LayerNorm(64), model), 1000 + torch.randn(len(X), 64)


def near_inputs():
    model = nn.Sequential(nn.BatchNorm1d(20), mlp(20, 48, 7))
    return trained(model, 3 + 1e-3 * torch.randn(32, 20))


def sigmoids():
    return mlp(20, *[24] * 8, 10, activation=nn.Sigmoid), rand(32, 20)


FIELD = {
    "CNN": cnn,
    "CNN, pooled": pooled_cnn,
    "CNN, 7 layers": deep_cnn,
    "ResNet, eval": resnet,
    "MobileNet, eval": mobilenet,
    "U-Net": unet,
    "vision transformer": vision_transformer,
    "language model": language_model,
    "LSTM": partial(recurrent, nn.LSTM),
    "GRU": partial(recurrent, nn.GRU),
    "normalizing flow": flow,
    "mixture of experts": experts,
    "graphs": graphs,
    "nodes of a graph": nodes,
    "DeepSets": deep_sets,
    "PINN, torch.func": partial(pinn, FuncResiduals),
    "PINN, autograd.grad": partial(pinn, GradResiduals),
    "LoRA": lora,
    "temperature": temperature,
    "MLP, LayerNorm": norm_mlp,
    "LayerNorm, mean 1000": far_inputs,
    "batch norm, near": near_inputs,
    "eight sigmoids": sigmoids,
    "MLP 784-256-256-10": lambda: (mlp(784, 256, 256, 10), rand(64, 784)),
}


def vmap_jacrev(model, X):
    """Return ``{name: Jacobian [N, C, *p.shape]}`` from one pass for each sample."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def f(params, x):  # of one sample
        return functional_call(model, params, x[None])[0]

    return vmap(jacrev(f), (None, 0))(params, X)
