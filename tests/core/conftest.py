import warnings

import torch
from hypothesis import settings
from torch.autograd import forward_ad

# A shared machine is no reason for a property to fail, and CI tries the same examples each time.
settings.register_profile("core", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("core")

# torch's forward mode compiles its decompositions on first use and warns about its own
# deprecated function; once, here, so that warnings can stay errors in the tests themselves.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))
