"""Plan, chunks, streams and products, on models that the page lacks, and bad input."""

import copy
import warnings

import pytest
import torch
from torch import autograd, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

N, C = 5, 3


@pytest.fixture(scope="module")
def names(taught):
    return taught("scale/jacobians_without_memory")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(before)


class Own(nn.Module):
    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, X):
        return self.function(self, X)


def with_trunk(m, X):
    with torch.no_grad():
        trunk = m.a(X)
    return m.b(X) + trunk


def keep(m, X):
    m.seen.append(m.a(X))
    return m.seen[-1].tanh()


def recurrent():
    return Own(lambda m, X: m.a(X)[0][:, -1], a=nn.GRU(4, C, batch_first=True))


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, C))


def keeping():
    model = Own(keep, a=nn.Linear(4, C))
    model.seen = []
    return model


def complex_power(m, X):
    return (torch.exp(1j * X) @ m.w).abs() ** 2 + m.b(X)


def solve(m, X):
    """A function whose derivative is wrong inside ``torch.no_grad`` and ``vmap``."""
    matrices = 5 * torch.eye(4) + m.a.weight + X[:, :, None] * X[:, None]
    return m.b(torch.linalg.solve(matrices, X))


def residual(m, X):
    """A residual as of a PINN, with a gradient inside."""
    u = m.b(torch.tanh(m.a(X)))
    (slope,) = autograd.grad(u.sum(), X, create_graph=True)
    return u + slope[:, :1]


def half_frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, C))
    model[0].bias.requires_grad_(False)
    return model


MODELS = {
    "half frozen": (half_frozen, (4,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()).append(
            nn.Linear(4 * 6, C)
        ),
        (2, 4, 5),
    ),
    "one layer under two names": (tied, (4,)),
    "recurrent": (recurrent, (7, 4)),
    "trunk without gradient": (
        lambda: Own(with_trunk, a=nn.Linear(4, C), b=nn.Linear(4, C)),
        (4,),
    ),
    "keeps its outputs": (keeping, (4,)),
    "scalar": (
        lambda: Own(
            lambda m, X: m.a(X) * m.t, a=nn.Linear(4, C), t=nn.Parameter(torch.rand(()))
        ),
        (4,),
    ),
    "complex": (
        lambda: Own(
            complex_power,
            w=nn.Parameter(torch.randn(4, C, dtype=torch.cdouble)),
            b=nn.Linear(4, C),
        ),
        (4,),
    ),
    "solve": (lambda: Own(solve, a=nn.Linear(4, 4), b=nn.Linear(4, C)), (4,)),
    "gradient inside": (
        lambda: Own(residual, a=nn.Linear(4, 7), b=nn.Linear(7, C)),
        (4,),
    ),
}


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    make, shape = MODELS[request.param]
    return make(), torch.rand(N, *shape)


def state(model, X):
    tensors = [X.clone(), *(t.clone() for t in model.state_dict().values())]
    return (
        tensors,
        len(getattr(model, "seen", ())),
        [p.grad for p in model.parameters()],
    )


def test_chunks_sums_and_products_are_right(model_and_inputs, names):
    model, X = model_and_inputs
    J = names["autograd_loop"](copy.deepcopy(model), X.clone().requires_grad_())
    before = state(model, X)
    for n, c, chunk in names["jacobian_chunks"](model, X, (2, 2)):
        assert_close(chunk, {name: block[n, c] for name, block in J.items()})
    out = {name: torch.full_like(block, torch.nan) for name, block in J.items()}
    names["write_jacobian"](model, X, out, (3, C))
    assert_close(out, J)
    squares = {name: block.square().sum((0, 1)) for name, block in J.items()}
    assert_close(names["gram_diagonal"](model, X, (2, 1)), squares)
    u, v = torch.rand(N, C), {k: torch.rand_like(b[0, 0]) for k, b in J.items()}
    J_v = sum((J[k] * v[k].conj()).real.reshape(N, C, -1).sum(2) for k in J)
    assert_close(names["jacobian_product"](model, X, v), J_v)
    J_J_v = {k: torch.tensordot(J_v.to(b.dtype), b, 2) for k, b in J.items()}
    assert_close(names["gram_operator"](model, X, 2)(v), J_J_v)
    J_u = {k: torch.tensordot(u.to(block.dtype), block, 2) for k, block in J.items()}
    assert_close(names["transposed_product"](model, X, u), J_u)
    after = state(model, X)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_all_of_it_works_where_gradients_are_off(mode, names):
    model, X = MODELS["solve"][0](), torch.rand(N, 4)
    J = names["autograd_loop"](model, X)
    v = {name: torch.rand_like(block[0, 0]) for name, block in J.items()}
    out = {name: torch.full_like(block, torch.nan) for name, block in J.items()}
    J_v = names["jacobian_product"](model, X, v)
    J_u = names["transposed_product"](model, X, J_v)
    with mode():
        names["write_jacobian"](model, X.clone(), out, (2, 2))
        assert_close(out, J)
        copies = {name: tensor.clone() for name, tensor in v.items()}
        assert_close(names["jacobian_product"](model, X.clone(), copies), J_v)
        assert_close(names["transposed_product"](model, X.clone(), J_v.clone()), J_u)
        assert names["memory_plan"](model, X.clone(), 1e9)["samples"] == N


def test_models_that_have_run_and_keep_tensors_of_the_graph(names):
    with warnings.catch_warnings(action="ignore"):
        normed = nn.utils.weight_norm(nn.Linear(4, C))
    for model in keeping(), normed:
        X = torch.rand(N, 4)
        fs = model(X)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
        J = {k: torch.zeros(N, C, *p.shape) for k, p in model.named_parameters()}
        names["write_jacobian"](model, X, J, (2, C))
        J_u = names["transposed_product"](model, X, torch.ones(N, C))
        names["jacobian_product"](model, X, J_u)
        names["memory_plan"](model, X, 1e9)
        params = list(model.parameters())
        grads = autograd.grad(fs.sum(), params)  # its graph is as it was
        assert_close(J_u, dict(zip(J, grads)))
        assert_close({k: block.sum((0, 1)) for k, block in J.items()}, J_u)


class InPlace(nn.Linear):
    def forward(self, X):
        return super().forward(X.mul_(0.5))


def test_plan_leaves_the_inputs(names):
    model, X = InPlace(4, C), torch.rand(N, 4)
    before = X.clone()
    names["memory_plan"](model, X, 1e9)
    assert_close(X, before, rtol=0, atol=0)


def test_plan_of_many_outputs_counts_what_they_need(names):
    """A few parameters before a thousand outputs: the peak is many times J."""
    shift = nn.Parameter(torch.rand(4))
    last = nn.Linear(4, 1000).requires_grad_(False)
    model = Own(lambda m, X: m.last(torch.tanh(X + m.shift)), shift=shift, last=last)
    plan = names["memory_plan"](model, torch.rand(N, 4), 1e9)
    peak = names["peak_bytes"](names["vmap_jacrev"], model, torch.rand(N, 4))
    assert plan["peak"] == pytest.approx(peak, rel=0.1)
    assert peak > 50 * plan["bytes"]


class Recurrent(nn.LSTM):
    def forward(self, X):
        return super().forward(X)[0][:, -1]


def test_product_of_layers_without_a_rule_for_forward_mode(names):
    torch.set_default_dtype(torch.float32)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    encoder = nn.Sequential(layer, nn.Flatten(), nn.Linear(28, C)).eval()
    for model in Recurrent(4, C, batch_first=True), encoder:
        X = torch.rand(N, 7, 4)
        J = names["autograd_loop"](model, X)
        v = {name: torch.rand_like(block[0, 0]) for name, block in J.items()}
        J_v = sum((J[name] * v[name]).flatten(2).sum(2) for name in J)
        assert_close(names["jacobian_product"](model, X, v), J_v)
    bag, words = nn.EmbeddingBag(9, C), torch.randint(9, (N, 2))
    with pytest.raises(NotImplementedError, match="_embedding_bag_backward"):
        names["jacobian_product"](bag, words, {"weight": torch.rand(9, C)})


def test_sparse_gradients(names):
    embed = nn.Embedding(9, 4)
    model, X = (
        nn.Sequential(embed, nn.Flatten(), nn.Linear(8, C)),
        torch.randint(9, [N, 2]),
    )
    J = names["autograd_loop"](model, X)
    embed.sparse = True
    for n, c, chunk in names["jacobian_chunks"](model, X, (2, 2)):
        assert_close(chunk, {name: block[n, c] for name, block in J.items()})
    J_u = names["transposed_product"](model, X, torch.ones(N, C))
    assert_close(J_u, {name: block.sum((0, 1)) for name, block in J.items()})
    size = sum(block.nbytes for block in J.values())
    assert names["memory_plan"](model, X, 1e9)["bytes"] == size


def test_plan_counts_bytes_and_says_how_many_samples_fit(names):
    model, X = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, C)), None
    X = torch.rand(16, 30)
    P = sum(p.numel() for p in model.parameters())
    plan = names["memory_plan"](model, X, 1e12)
    assert plan["bytes"] == 16 * C * P * 8
    assert plan["bytes"] <= plan["peak"] < 8 * plan["bytes"]
    assert plan["samples"] == 16
    fewer = names["memory_plan"](model, X, plan["peak"] / 4)
    assert 1 <= fewer["samples"] <= 8


def test_real_size_in_float32_is_no_false_alarm(names):
    torch.set_default_dtype(torch.float32)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    last = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    model, X = nn.Sequential(*convs, *last), torch.rand(12, 3, 32, 32)
    rows = 0
    for n, _, _ in names["jacobian_chunks"](model, X, (4, 10)):
        rows += len(X[n])
    assert rows == len(X)


def act_norm(m, X):
    if not m.ready:
        m.shift.data, m.ready = X.detach().mean(0), True
    return m.a(X - m.shift)


MIXING = {
    "softmax over samples": lambda: nn.Sequential(nn.Linear(4, C), nn.Softmax(0)),
    "batch norm, training": lambda: nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C)),
    "weak": lambda: Own(
        lambda m, X: m.a(X - 1e-3 * X.mean(0)).tanh(), a=nn.Linear(4, C)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(), nn.Linear(9, C)),
    "set by the first batch": lambda: Own(
        act_norm, a=nn.Linear(4, C), shift=nn.Parameter(torch.zeros(4)), ready=False
    ),
}


@pytest.mark.parametrize("mixing", MIXING)
def test_samples_that_mix_raise_before_the_first_chunk(mixing, names):
    model, X = MIXING[mixing](), torch.rand(N, 4)
    out = {k: torch.zeros(N, C, *p.shape) for k, p in model.named_parameters()}
    with pytest.raises(ValueError, match="samples influence each other"):
        next(names["jacobian_chunks"](model, X, (3, C)))
    with pytest.raises(ValueError, match="samples influence each other"):
        names["write_jacobian"](model, X, out, (3, C))
    assert not any(block.any() for block in out.values())
    with pytest.raises(ValueError, match="samples influence each other"):
        names["gram_operator"](model, X, 3)


def test_samples_are_never_all_there_at_once(names):
    conv = nn.Conv2d(2, 9, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*conv, nn.Linear(9, C))
    small, large = (
        names["peak_bytes"](names["samples_apart"], model, torch.rand(n, 2, 20, 20), 2)
        for n in (8, 32)
    )
    assert large < 1.5 * small  # it is X that grows
    v = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    operator, X = names["gram_operator"], torch.rand(32, 2, 20, 20)
    products = [operator(model, X, n) for n in (2, 32)]
    parts, all_at_once = (names["peak_bytes"](product, v) for product in products)
    assert parts < 0.3 * all_at_once


@pytest.mark.parametrize("wrong", ["from_rows", "jacrev"])
def test_a_wrong_chunk_raises(wrong, names):
    checked = names["checked_rows"]
    model, X = (
        (recurrent(), torch.rand(N, 7, 4))
        if wrong == "from_rows"
        else (
            half_frozen(),
            torch.rand(N, 4),
        )
    )
    module = names["trainable"].__globals__  # where all functions look for names
    right = module[wrong]

    def broken(*args, **options):
        result = right(*args, **options)
        if wrong == "from_rows":
            return {name: 1.01 * block for name, block in result.items()}
        return lambda *inputs: {k: 1.01 * b for k, b in result(*inputs).items()}

    module[wrong] = broken
    try:
        with pytest.raises(ValueError, match="wrong Jacobian of"):
            checked(model, X, slice(0, 2))
    finally:
        module[wrong] = right


BAD = {
    "is not finite": (half_frozen, torch.tensor([[1, 2, torch.nan, 4]])),
    "must be a tensor \\[N, ...\\]": (half_frozen, torch.rand(0, 4)),
    "must be a tensor \\[N=4, C\\]": (  # of two chunks
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
        torch.rand(5, 4),
    ),
    "no parameter of the model": (
        lambda: nn.Linear(4, C).requires_grad_(False),
        torch.rand(5, 4),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises(message, names):
    make, X = BAD[message]
    with pytest.raises(ValueError, match=message):
        next(names["jacobian_chunks"](make(), X.double(), (2, C)))


@pytest.mark.parametrize("size", [(-1, 2), (2, -1), (0, 2), (2, 0), (2,), 64])
def test_bad_sizes_raise(size, names):
    model, X = nn.Linear(4, C), torch.rand(N, 4)
    out = {k: torch.zeros(N, C, *p.shape) for k, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"size must be two positive numbers"):
        names["write_jacobian"](model, X, out, size)


def test_product_names_what_is_not_finite(names):
    model, X = nn.Linear(4, C), torch.full((N, 4), torch.nan)
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model\(X\) is not finite"):
        names["jacobian_product"](model, X, v)


def test_bad_shapes_raise_and_name_them(names):
    model, X = nn.Linear(4, C), torch.rand(N, 4)
    v = {"weight": torch.rand(C, 4), "bias": torch.rand(4)}
    with pytest.raises(ValueError, match=r"v has the shapes .*'bias': \[4\]"):
        names["jacobian_product"](model, X, v)
    with pytest.raises(ValueError, match="v must be a dictionary .* but is Tensor"):
        names["jacobian_product"](model, X, torch.rand(C * 5))
    with pytest.raises(ValueError, match=r"u has the shapes .*\[3, 5\]"):
        names["transposed_product"](model, X, torch.rand(C, N))
    with pytest.raises(ValueError, match=r"out has the shapes \{\}"):
        names["write_jacobian"](model, X, {}, (2, C))


def test_reentrant_checkpoint_raises(names):
    model = Own(lambda m, X: checkpoint(m.a, X, use_reentrant=True), a=nn.Linear(4, C))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        next(names["jacobian_chunks"](model, torch.rand(N, 4), (2, C)))


class Switches(nn.Linear):
    """In float32 another function of many samples, as if ReLUs near zero switched."""

    def __init__(self, many, dtype=torch.float32):
        super().__init__(4, 3)
        self.many, self.off = many, dtype

    def forward(self, X):
        fs = super().forward(X)
        return 1.5 * fs if X.dtype == self.off and len(X) > self.many else fs


@pytest.mark.parametrize("many", [1, 4])  # another chunk than sample, two than one
def test_what_fails_in_float32_is_checked_in_float64(many, names):
    torch.manual_seed(0)
    model, X = Switches(many).float(), torch.rand(8, 4)
    model.kept = model(X.float())  # as after a step of training
    rows = [chunk for *_, chunk in names["jacobian_chunks"](model, X.float(), (4, 3))]
    del model.kept
    wide = copy.deepcopy(model).double()
    J = autograd.functional.jacobian(
        lambda w: torch.func.functional_call(wide, {"weight": w}, (X.double(),)),
        wide.weight.detach(),
    )
    found = torch.cat([chunk["weight"] for chunk in rows])
    assert found.dtype == torch.float32
    assert_close(found.double(), J, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("many", [1, 4])
def test_what_fails_in_float64_too_raises(many, names):
    model = Switches(many, torch.float64).double()
    with pytest.raises(ValueError, match="wrong|influence"):
        list(names["jacobian_chunks"](model, torch.rand(8, 4).double(), (4, 3)))


def test_what_float64_cannot_compute_raises(names):
    model = Switches(1).float()
    model.register_forward_hook(lambda module, args, fs: fs.mm(torch.eye(3).float()))
    with pytest.raises(ValueError, match="wrong, and not computable in float64"):
        list(names["jacobian_chunks"](model, torch.rand(8, 4).float(), (4, 3)))
