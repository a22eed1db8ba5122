import warnings

import torch
from torch.autograd import forward_ad

# torch's forward mode compiles its decompositions on first use and warns about its own
# deprecated function; once, here, so that warnings can stay errors in the tests themselves.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))
