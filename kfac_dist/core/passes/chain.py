"""Models that are a chain of known modules, and what a pass over such a model leaves behind.

Statistics and Fisher products that are derived from the trace of the gradient's pass need no
forward pass of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kfac_dist.core.passes.capture import Captures
from kfac_dist.core.passes.chain_rules import CHAIN_RULES
from kfac_dist.core.vector import rows_at


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The inputs of the modules of a chain, in order, and its outputs, each [N, ...].

    A trace is only valid for the parameters that its pass was run with.
    """

    inputs: tuple[Tensor, ...]
    outputs: Tensor

    @classmethod
    def from_captures(
        cls, modules: Sequence[nn.Module], captures: Captures, outputs: Tensor
    ) -> Trace:
        """Return the trace of a pass in which the modules of the chain were observed."""
        calls = [captures[module] for module in modules]
        return cls(inputs=tuple(call.inputs for (call,) in calls), outputs=outputs.detach())

    def rows_at(self, positions: Sequence[int]) -> Trace:
        """Return the trace of the cases at these positions, the trace itself if that is all."""
        if len(positions) == len(self.outputs):
            return self
        inputs = tuple(rows_at(values, positions) for values in self.inputs)
        return Trace(inputs=inputs, outputs=rows_at(self.outputs, positions))

    def calls(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and the outputs of each module, in order."""
        yield from zip(self.inputs, (*self.inputs[1:], self.outputs), strict=True)


def find_chain(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the modules that a model applies one after another, None if it is no such chain.

    All of them have a rule in `CHAIN_RULES` and occur once. Random modules have none, because
    the trace would belong to other draws.
    """
    modules = tuple(_leaves(model))
    known = all(_is_known(module) for module in modules)
    return modules if known and modules and len(set(modules)) == len(modules) else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential and not _has_hooks(module):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _is_known(module: nn.Module) -> bool:
    # A subclass may compute something else, and an in-place module overwrites the trace.
    inplace = getattr(module, "inplace", False)
    return type(module) in CHAIN_RULES and not (_has_hooks(module) or inplace)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
