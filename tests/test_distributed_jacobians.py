"""``distributed_jacobians.py`` as torchrun starts it, and where a rank fails."""

import copy
import os
import subprocess
import sys
import tempfile

import psutil
import pytest
import torch
from conftest import EXAMPLES
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def rows(cases):
    """On a rank: return its rows of the NTK and of the Jacobian for each case."""
    import __main__ as page

    results = []
    for N, widths in cases:
        model, X = page.problem(N, widths)
        X = X[page.shards(N, dist.get_world_size())[dist.get_rank()]]
        K = page.ntk_rows(page.linear_factors(model, X), N)
        results.append((K, page.flat_rows(model, X)))
    return results


def stop(how):
    """On a rank: rank 1 ends or hangs, and the others wait for it."""
    import signal

    import __main__ as page

    if dist.get_rank() == 1:
        if how == "raise":
            page.linear_factors(nn.Conv1d(2, 3, 4), torch.rand(5, 2, 6))
        elif how == "kill":
            os.kill(os.getpid(), 9)
        signal.pause()
    dist.barrier()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, X):
        return self.layer(self.layer(X))


class Center(nn.Module):
    def forward(self, X):
        return X - X.mean(0)


class Pair(nn.Module):
    def forward(self, X):
        return X, X


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def batch_norm():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 4))
    model[1].requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def names(taught):
    return taught("scale/distributed_jacobians")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Make temporary files here, and find neither a file nor a process afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []
    folders = [process.info["cwd"] or "" for process in psutil.process_iter(["cwd"])]
    assert not [folder for folder in folders if folder.startswith(str(tmp_path))]


def test_torchrun_runs_of_the_file_do_not_collide(tmp_path):
    script = tmp_path / "script.py"
    script.write_bytes((EXAMPLES / "scale" / "distributed_jacobians.py").read_bytes())
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {}
    for ranks in 2, 3:
        logs = tmp_path.with_name(f"{tmp_path.name}-{ranks}")
        command = [f"--nproc-per-node={ranks}", f"--log-dir={logs}", script.name]
        runs[ranks] = subprocess.Popen(TORCHRUN + command, cwd=tmp_path, **options)
    for ranks, run in runs.items():
        out, errors = run.communicate(timeout=100)
        assert run.returncode == 0, errors
        assert errors == ""
        sizes = {2: [4, 3], 3: [3, 3, 1]}[ranks]
        assert out.count("One process:") == 2
        assert out.count(f"{ranks} ranks, ") == out.count(f"samples {sizes}:") == 1
        assert "DTensor equal those of one process." in out.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [script]


def test_uneven_and_empty_shards_equal_one_process(names, empty, capsys):
    cases = [(5, (4, 7, 2)), (4, (4, 7, 2)), (2, (3, 2)), (1, (3, 5, 1))]
    results = names["launch"](rows, 3, cases)
    assert capsys.readouterr() == ("", "")
    for i, case in enumerate(cases):
        J = names["loop"](*names["problem"](*case))
        kernels, jacobians = zip(*[result[i] for result in results])
        assert_close(torch.cat(jacobians), J)
        assert_close(torch.cat(kernels), torch.einsum("ncp,mdp->ncmd", J, J))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", r"\[rank1\]: ValueError: only parameters of Linear layers .* bias,"),
        ("kill", r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL"),
    ],
)
def test_failed_rank_ends_the_run_with_its_error(how, text, names, empty):
    with pytest.raises(RuntimeError, match=text):
        names["launch"](stop, 2, how)


def test_hanging_rank_ends_with_the_timeout(names, empty):
    with pytest.raises(subprocess.TimeoutExpired, match="timed out after 6 seconds"):
        names["launch"](stop, 2, "hang", timeout=6)


@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        (
            nn.Sequential(nn.Linear(3, 2), nn.PReLU()),
            (5, 3),
            "Linear layers .* 1.weight",
        ),
        (nn.Linear(3, 2).requires_grad_(False), (5, 3), "got no parameter"),
        (nn.Linear(3, 2), (5, 4, 3), r"one call with \[N, I\] needed, got \[6, 4, 3\]"),
        (Twice(), (5, 3), r"layer: one call with \[N, I\] needed, got \[6, 3\]"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)),
            (5, 3),
            r"be \[6, C\].* \[12\]",
        ),
        (nn.Sequential(nn.Linear(3, 2), Pair()), (5, 3), "is tuple"),
        (tied(), (5, 3), "0.weight: samples mix, or another layer shares it"),
        (batch_norm(), (5, 3), "0.weight: samples mix"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Softmax(0)),
            (1, 3),
            "0.weight: samples mix",
        ),
        (nn.Sequential(nn.Linear(3, 2), Center()), (1, 3), "0.weight: samples mix"),
    ],
)
def test_bad_models_raise_and_stay_as_they_are(model, shape, text, names):
    model, before = model.double(), copy.deepcopy(model.double().state_dict())
    with pytest.raises(ValueError, match=text):
        names["linear_factors"](model, torch.rand(shape, dtype=torch.float64))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_good_models_equal_the_loop_and_stay_as_they_are(names):
    unused = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Linear(2, 4))
    frozen = batch_norm().eval()
    for model in nn.Linear(3, 2), nn.Linear(3, 2, bias=False), unused, frozen:
        model.double()
        before = copy.deepcopy(model.state_dict())
        X = torch.rand(5, 3, dtype=torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = [
            [torch.autograd.grad(f, trained, retain_graph=True) for f in fs.unbind()]
            for fs in model(X).unbind()
        ]
        J = names["jacobian_rows"](model, X)
        shapes = {k: p.shape for k, p in model.named_parameters() if p.requires_grad}
        assert {name: block.shape[2:] for name, block in J.items()} == shapes
        for i, block in enumerate(J.values()):
            expected = [torch.stack([grad[i] for grad in row]) for row in grads]
            assert_close(block, torch.stack(expected))
            assert not block.requires_grad
        assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())


def test_frozen_weight_leaves_the_bias(names):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].weight.requires_grad_(False)
    J = names["jacobian_rows"](model, torch.rand(5, 3, dtype=torch.float64))
    assert list(J) == ["0.bias", "2.weight", "2.bias"]
    assert_close(J["2.bias"], torch.eye(2, dtype=torch.float64).expand(5, 2, 2))


def test_shard_of_another_size_raises(names):
    factors = names["linear_factors"](*names["problem"](4, (3, 2)))
    with pytest.raises(ValueError, match="rank 0 has 4 samples, not 5"):
        names["ntk_rows"](factors, 5)
