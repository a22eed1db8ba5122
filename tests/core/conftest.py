from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A shared machine is no reason for a property to fail, and CI tries the same examples each time.
settings.register_profile("core", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("core")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Matrices of order 10 gain nothing from threads and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
