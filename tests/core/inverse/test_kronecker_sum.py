"""What a GPU's routines cannot do, the CPU does; errors of the GPU itself are not hidden."""

import pytest
import torch

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse import damped, kronecker_sum
from kfac_dist.core.inverse.damped import InversionFailedError, invert_pair
from kfac_dist.core.inverse.kronecker_sum import eigendecompose

real_eigh = torch.linalg.eigh


class OnGPU(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU; its copy on the CPU does not."""

    is_cuda = True

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def on_gpu(tensor):
    return tensor.as_subclass(OnGPU)


def factor(order=6):
    rows = torch.randn(3 * order, order, generator=torch.Generator().manual_seed(1))
    return rows.T @ rows / len(rows)


def failing_on_a_gpu(outcome):
    def eigh(matrix):
        if not matrix.is_cuda:
            return real_eigh(matrix)
        if isinstance(outcome, Exception):
            raise outcome
        values, vectors = real_eigh(matrix)
        return values * outcome, vectors

    return eigh


@pytest.mark.parametrize(
    "outcome",
    [
        RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
        torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"),
        float("nan"),
    ],
    ids=["library", "no convergence", "nan"],
)
def test_a_failed_eigendecomposition_is_made_on_the_cpu_with_a_warning(
    outcome, monkeypatch, caplog
):
    expected = eigendecompose(factor())
    monkeypatch.setattr(torch.linalg, "eigh", failing_on_a_gpu(outcome))
    found = eigendecompose(on_gpu(factor()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert "a GPU could not decompose a matrix of order 6" in caplog.text


@pytest.mark.parametrize("error", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_an_error_of_the_gpu_itself_is_not_hidden(error, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", failing_on_a_gpu(error("CUDA error")))
    with pytest.raises(error):
        eigendecompose(on_gpu(factor()))


def test_on_the_cpu_there_is_no_second_attempt(monkeypatch):
    def eigh(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(kronecker_sum.torch.linalg, "eigh", eigh)
    with pytest.raises(InversionFailedError, match="order 6: no convergence"):
        eigendecompose(factor())


def test_the_inverse_from_a_root_on_a_gpu_is_that_of_the_cpu():
    A, G = factor(6), factor(3)
    expected = invert_pair(KroneckerPair(A=A, G=G), 0.3)
    found = invert_pair(KroneckerPair(A=on_gpu(A), G=on_gpu(G)), 0.3)
    torch.testing.assert_close(found.inverse.A.cpu(), expected.inverse.A, rtol=1e-5, atol=1e-6)
    assert found.inverse.A.is_contiguous()
    assert found.rungs == ()


def test_a_root_that_only_the_gpu_does_not_find_needs_no_rung(monkeypatch):
    real_attempt = damped._try_to_invert

    def failing(matrix, damping):
        tried = real_attempt(matrix, damping)
        return tried._replace(passed=tried.passed & (not matrix.is_cuda))

    monkeypatch.setattr(damped, "_try_to_invert", failing)
    A, G = factor(6), factor(3)
    found = invert_pair(KroneckerPair(A=on_gpu(A), G=on_gpu(G)), 0.3)
    assert found.rungs == ()
    assert torch.equal(found.inverse.A.cpu(), invert_pair(KroneckerPair(A=A, G=G), 0.3).inverse.A)
