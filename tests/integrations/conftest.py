"""The libraries of the extra `integrations`; tests are skipped where one is missing."""

import sys

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    # A torchvision that was built for another torch. None of these libraries needs it, but all of
    # them import it if they find it.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None
