"""Which calls of the observed modules the outputs of a model depend on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_dist.core.passes.capture import Call, Captures


def used_calls(outputs: Tensor, captures: Captures) -> Captures:
    """Return the calls that contribute to the derivatives of `outputs`.

    A call without rows has nothing to contribute. Neither has one under `no_grad`, or one whose
    output is detached, but only its inputs would be counted with those of the module's other calls.
    """
    with_rows = {module: [c for c in calls if _has_rows(c)] for module, calls in captures.items()}
    if all(len(calls) <= 1 for calls in with_rows.values()):
        return with_rows  # no other calls to be counted with
    reached = _nodes_behind(outputs)
    return {
        module: [c for c in calls if c.edge is not None and c.edge.node in reached]
        for module, calls in with_rows.items()
    }


def _has_rows(call: Call) -> bool:
    return call.inputs.numel() > 0 or call.shape.numel() > 0


def _nodes_behind(outputs: Tensor) -> set[Any]:
    """Return the nodes of the autograd graph that derivatives of `outputs` pass through."""
    reached: set[Any] = set()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached:
            reached.add(node)
            waiting += [following for following, _ in node.next_functions]
    return reached
