"""Plain kernels, for passes that need derivatives which fused kernels do not have."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# The settings below and the level of forward mode are one for the process.
_ONE_THREAD = threading.RLock()


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Compute attention and recurrent layers of `model` from plain operations.

    Their fused kernels support neither vmap nor forward mode. One thread at a time is inside.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with _ONE_THREAD, _no_fast_path(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # vmap warns when it loops over an operation that it has no rule for. That is slower, but
        # there is nothing a user could do about it.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if not recurrent:
            yield
            return
        with _no_mkldnn(), torch.backends.cudnn.flags(enabled=False):
            yield


@contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _no_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags would also set options of Intel GPUs, and warn about them.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
