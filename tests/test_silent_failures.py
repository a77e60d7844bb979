"""The catalog of ``silent_failures.py``, and what it does if a release mends one."""

import pytest
import torch


@pytest.fixture(scope="module")
def page(taught):
    return taught("trust/silent_failures")


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def test_check_jacobian_catches_each_failure(taught, page):
    """The check of the other page agrees: ``record_failure`` compares with the loop."""
    check = taught("trust/check_a_jacobian")["check_jacobian"]
    failures = page["failures"]
    assert len(failures) == 8
    assert sum(map(len, failures.values())) > 30
    for kind in failures.values():
        for name, (model, X, wrong, _) in kind.items():
            with pytest.raises((AssertionError, ValueError)):
                pytest.fail(f"{name} passes: {check(model, X, wrong)}")


def test_each_failure_has_its_error(page):
    for kind, recorded in page["failures"].items():
        for name, (_, _, jacobian, off) in recorded.items():
            shapes = name in ("Gradient of a sum", "eye(C) for all samples")
            assert (off is None) == shapes, name
            assert shapes or off > (0.015 if kind != "Precision" else 0.001), name
            assert jacobian


@pytest.mark.parametrize("change", [0, 1e-6, 1e-3])
def test_what_is_right_is_no_failure(change, page):
    """An error of a thousandth is recorded, and one below a ten thousandth is none."""
    torch.manual_seed(5)
    model, X = page["dense"]()
    vmap_jacrev = page["vmap_jacrev"]

    def wrong(model, X):
        return {k: (1 + change) * J for k, J in vmap_jacrev(model, X).items()}

    arguments = "kind", "name", (model, X), wrong, vmap_jacrev
    if change < 1e-4:
        with pytest.raises(AssertionError, match="name is right now: move it out"):
            page["record_failure"](*arguments)
    else:
        page["record_failure"](*arguments)
        off = page["failures"].pop("kind")["name"][-1]
        assert off == pytest.approx(change)


@pytest.mark.parametrize("error", [RuntimeError, UserWarning])
def test_what_raises_or_warns_is_no_failure(error, page):
    def raises(model, X):
        raise error("not supported")

    case, right = page["dense"](), page["vmap_jacrev"]
    with pytest.raises(AssertionError, match="name raises now: move it out"):
        page["record_failure"]("kind", "name", case, raises, right)


def test_the_alternative_has_to_be_right(page):
    def wrong(model, X):
        return {k: 2 * J for k, J in page["vmap_jacrev"](model, X).items()}

    with pytest.raises(AssertionError, match="not close"):
        page["record_failure"]("kind", "name", page["dense"](), wrong, wrong)
