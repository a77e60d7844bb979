"""The programs of ``distributed_jacobians.py``, on several ranks and on one."""

import copy
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from conftest import SITE
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

torch.manual_seed(0)  # for the models that pytest collects

SAVE = '\ntorch.save(K, f"{rank}.pt")\ndist.destroy_process_group()\n'
# Rank 1 hangs or is killed, and the others do not wait for it without an end.
HANG = "import os, signal\nif os.environ['RANK'] == '1': signal.pause()\n"
KILL = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n"
WAIT = HANG.replace("signal\n", "signal, torch.distributed as dist, datetime\n") + (
    "dist.init_process_group(timeout=datetime.timedelta(seconds=2))\n"
)


def net(*widths):
    layers = [(nn.Linear(*sizes), nn.Tanh()) for sizes in zip(widths, widths[1:])]
    return nn.Sequential(*sum(layers, ())[:-1]).double()


def inputs(N, width):
    return torch.rand(N, width, dtype=torch.float64)


def reference(model, X):
    """Return all rows of the Jacobian, ``[N, C, P]``, from ``autograd.functional``."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    blocks = torch.autograd.functional.jacobian(
        lambda *values: torch.func.functional_call(
            model, dict(zip(params, values)), (X,)
        ),
        tuple(params.values()),
    )
    return torch.cat([block.flatten(2) for block in blocks], 2)


def kernel(model, X):
    rows = reference(model, X)
    return torch.einsum("ncp,mdp->ncmd", rows, rows)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, X):
        return self.layer(self.layer(X))


class Center(nn.Module):
    def forward(self, X):
        return X - X.mean(0)


class Logit(nn.Module):
    """Not defined at 1."""

    def forward(self, X):
        return torch.logit(X)


def tied():
    model = net(3, 3, 3)
    model[2].weight = model[0].weight
    return model


def frozen(*names):
    model = net(3, 4, 5, 2)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def names(taught):
    return taught("scale/distributed_jacobians")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Make temporary files here, and find neither a file nor a process afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    # vmap makes PyTorch create an empty folder for its compiler.
    left = [path.name for path in tmp_path.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []
    folders = [process.info["cwd"] or "" for process in psutil.process_iter(["cwd"])]
    assert not [folder for folder in folders if folder.startswith(str(tmp_path))]


@pytest.fixture
def alone(names, tmp_path, monkeypatch):
    """Return a function that runs the program of the kernel as the only rank."""
    program = names["FACTORS"] + names["KERNEL"] + names["CHECK"]
    monkeypatch.chdir(tmp_path)
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in (rank | {"MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)

    def run(model, X):
        torch.save((model, X), "inputs.pt")
        namespace = {}
        try:
            exec(program, namespace)
        finally:
            dist.destroy_process_group()
        return namespace

    return run


def test_uneven_and_empty_shards_equal_one_process_in_runs_side_by_side(names, empty):
    launch, model = names["launch"], net(4, 7, 2)
    program = names["FACTORS"] + names["KERNEL"] + names["CHECK"] + SAVE
    many, few = inputs(5, 4), inputs(2, 4)
    take = f"import sys\nsys.path.append({str(SITE / 'take')!r})\nfrom ntk import ntk\n"
    by_ntk = names["ROWS"] + take + "K = ntk(model, X_own, X)" + SAVE
    of_any_model = names["ROWS"] + names["ROWS_OF_KERNEL"]
    with ThreadPoolExecutor() as pool:
        parts = pool.submit(launch, of_any_model, 3, model, many)
        kernels = pool.submit(launch, program, 3, model, few)
    by_ntk = launch(by_ntk, 2, model, many)
    parts, any_kernels = zip(*parts.result())
    rows = [torch.cat([b.flatten(2) for b in J.values()], 2) for J in parts]
    assert [len(part) for part in rows] == [2, 2, 1]
    assert_close(torch.cat(rows), reference(model, many))
    assert_close(torch.cat(any_kernels), kernel(model, many))
    assert_close(torch.cat(by_ntk), kernel(model, many))
    assert [len(part) for part in kernels.result()] == [1, 1, 0]
    assert_close(torch.cat(kernels.result()), kernel(model, few))


def test_killed_rank_ends_the_run(names, empty):
    with pytest.raises(RuntimeError, match=r"rank +: 1\b[^$]*exitcode +: -9\b"):
        names["launch"](KILL + "time.sleep(3600)", 2)


def test_hanging_rank_ends_with_the_timeout_of_the_group(names, empty):
    with pytest.raises(RuntimeError, match=r"(?i)time(d )?out"):
        names["launch"](WAIT + "dist.barrier()", 2)


def test_ranks_that_all_hang_end_with_the_timeout(names, empty):
    with pytest.raises(subprocess.TimeoutExpired, match="timed out after 4 seconds"):
        names["launch"](HANG + "signal.pause()", 2, timeout=4)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        nn.Sequential(Logit(), nn.Linear(3, 4), nn.Softmax(1)),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).eval(),
        frozen("0.weight", "0.bias"),
        frozen("2.weight", "2.bias", "4.weight", "4.bias"),
    ],
)
def test_kernel_of_other_models_equals_the_reference(model, alone):
    model, X = model.double(), inputs(6, 3)
    before = copy.deepcopy(model.state_dict())
    found = alone(model, X)
    assert_close(found["K"], kernel(model, X))
    assert_close(found["model"].state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in found["model"].modules())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()),
        nn.Sequential(nn.Linear(3, 2), Center()),
        nn.Sequential(nn.Linear(3, 2), nn.Softmax(0)),
        Twice(),
        tied(),
        frozen("2.weight"),
    ],
)
def test_models_that_are_more_than_their_factors_raise(model, alone):
    with pytest.raises(ValueError, match=r"u\^T K u is .*, but \|J\^T u\|\^2 is"):
        alone(model.double(), inputs(6, 3))


def test_check_compares_samples_of_different_ranks(alone):
    model, X = net(3, 4, 2), inputs(6, 3)
    found = alone(model, X)
    K = found["K"].clone()
    K[0, :, 1] *= 1.01
    dist.init_process_group()
    try:
        found["check_kernel"](found["K"], model, X, 0, [6])
        with pytest.raises(ValueError, match="u"):
            found["check_kernel"](K, model, X, 0, [6])
    finally:
        dist.destroy_process_group()
