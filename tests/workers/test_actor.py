"""Which errors of a role's work end the job, and which end only its process."""

from __future__ import annotations

import pytest
import torch
from structlog.testing import CapturingLogger

from kfac_dist.errors import JobFailedError
from workers.actor import gpu_options, logged
from workers.device import is_device_lost


def failing(error: Exception) -> None:
    raise error


def test_a_full_gpu_is_an_error_of_the_job_with_advice():
    log = CapturingLogger()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
    with pytest.raises(JobFailedError) as caught:
        logged(log, "step 7", lambda: failing(error))
    assert caught.value.reason == "gpu_memory"
    assert caught.value.message.startswith(
        "step 7: the memory of the GPU is full: CUDA out of memory. Tried to allocate 20.00 GiB. "
        "Use a smaller batch_size"
    )
    assert [call.method_name for call in log.calls] == ["exception"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `...`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (torch.linalg.LinAlgError("linalg.eigh: failed to converge"), False),
        (RuntimeError("The size of tensor a must match"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_which_errors_mean_that_the_gpu_is_lost_to_the_process(error, lost):
    assert is_device_lost(error) == lost


def test_only_actors_with_a_gpu_see_all_of_them():
    assert gpu_options(0.0, EXTRA="1") == {}
    assert gpu_options(0.5, EXTRA="1") == {
        "num_gpus": 0.5,
        "runtime_env": {
            "env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "EXTRA": "1"}
        },
    }
