"""A torchvision that does not import is hidden.

One that was built for another torch fails with a RuntimeError. No library of the extra needs it,
but all of them import it if they find it.
"""

import importlib.metadata
import sys


def hide_torchvision_if_broken():
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        pass
    else:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None
    find = importlib.metadata.distribution

    def distribution(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    importlib.metadata.distribution = distribution
