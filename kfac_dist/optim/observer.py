"""What K-FAC sees of a user's training loop: the inputs of passes that gave the gradients."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kfac_dist.coordination.steps.sampling import SubsetRule
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.model_calls import ModelCall, ModelCalls, tensors_in

# More backward passes than this belong to no step of a usual loop. The statistics are an estimate,
# which the first thousand of equal passes serve as well as all of them.
_MOST_PASSES = 1000
_OWN = threading.local()
_BY_INPUTS = (
    "KFACPreconditioner: the inputs require gradients, and a backward pass with create_graph makes "
    "derivatives by them, but K-FAC's curvature knows nothing of such derivatives in your loss. "
    "Let the model return the derivatives, with diagonal blocks for its layers; if the pass is not "
    "part of the loss, run it in evaluation mode; otherwise detach the inputs"
)


@contextmanager
def unobserved() -> Iterator[None]:
    """Let no observer see the passes of this thread inside: they are K-FAC's own."""
    _OWN.depth = getattr(_OWN, "depth", 0) + 1
    try:
        yield
    finally:
        _OWN.depth -= 1


class ObservedPass:
    """One forward pass: what is kept of its call, None once a step has taken it.

    The graph of the pass owns this object until a backward pass reaches it. So a pass without a
    backward pass is forgotten with its graph.
    """

    def __init__(self, inputs: ModelCall) -> None:
        self.inputs: ModelCall | None = inputs


Keep = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], ModelCall]


class _Begun(NamedTuple):
    """A pass that has begun: its arguments, and the versions of the tensors among them."""

    kept: ObservedPass
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]

    def given(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))


class ForwardObserver:
    """Keeps inputs of the passes whose gradients are in `.grad`.

    These are the passes in training mode, with gradients enabled, that a backward pass has reached
    since the last call of `pop_inputs`, and since the gradients were last cleared. The model holds
    no reference to this object: its hooks go with it. Copies of the model, pickled or not, have
    hooks that do nothing and remove themselves.

    Args:
        model: the model to observe.
        parameters: its trainable parameters, whose `.grad` tells when gradients were cleared.
        keep: returns what is kept of a call of the plain model, as a copy: the loop may overwrite
            its tensors.
        outputs: returns the outputs of the model of this name from its result.

    Attributes:
        wanted: whether passes are observed, as in the steps that need statistics.
        num_forward: forward passes observed since the last `pop_inputs`, with or without a
            backward pass.

    Raises:
        InvalidSpecError: in an observed pass, the call cannot be divided into cases, its result
            has no outputs, or the model changed its input in place; or derivatives by its input
            are part of a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        keep: Keep,
        outputs: Callable[[str, Any], Tensor],
    ) -> None:
        self.wanted = True
        self.num_forward = 0
        self._parameters = list(parameters)
        self._keep = keep
        self._outputs = outputs
        self._begun: dict[int, _Begun] = {}  # by thread
        self._passes: list[ObservedPass] = []
        self._backward = -1  # the last backward pass that reached an observed pass
        for hook in [h for h in model._forward_pre_hooks.values() if isinstance(h, ObserverHook)]:
            hook.remove_if_idle(model)
        # First of all hooks: K-FAC's own passes run the user's hooks again.
        before = ObserverHook("before", self)
        after = ObserverHook("after", self)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove).atexit = False

    def remove(self) -> None:
        """Observe nothing from now on, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._begun.clear()
        self._passes.clear()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the input of a pass that begins."""
        self._begun.pop(threading.get_ident(), None)
        own = getattr(_OWN, "depth", 0) > 0
        if own or torch._C._functorch.maybe_current_level() is not None:  # a function transform
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.wanted:
            given = (args, dict(kwargs))
            kept = ObservedPass(self._keep(plain_module(module), *given))
            versions = [version_of(tensor) for tensor in tensors_in(given)]
            self._begun[threading.get_ident()] = _Begun(kept, *given, versions)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give the kept call of the pass to its graph, for a backward pass to hand over."""
        begun = self._begun.pop(threading.get_ident(), None)
        if begun is None:
            return
        model = plain_module(module)
        outputs = self._outputs(type(model).__name__, output)
        if self._is_changed(begun, model):
            raise InvalidSpecError(f"KFACPreconditioner: {in_place_message(type(model).__name__)}")
        self.num_forward += 1
        observer, kept = weakref.ref(self), begun.kept
        by_inputs = any(
            tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, nn.Parameter)
            for tensor in begun.given()
        )

        def reached(_gradients: tuple[Tensor | None, ...]) -> None:
            alive = observer()
            if alive is None:
                return
            # With create_graph, the derivatives themselves are to be differentiated.
            if by_inputs and torch.is_grad_enabled():
                raise InvalidSpecError(_BY_INPUTS)
            alive._take(kept)

        for node in _nodes([outputs, *tensors_in(output)]):
            node.register_prehook(reached)

    def _is_changed(self, begun: _Begun, model: nn.Module) -> bool:
        if [version_of(tensor) for tensor in begun.given()] == begun.versions:
            return False
        if begun.kept.inputs is None:
            return True
        # Views of one tensor have one version: another thread may have filled another part.
        again = self._keep(model, begun.args, begun.kwargs)
        pairs = zip(begun.kept.inputs.tensors(), again.tensors(), strict=True)
        return not all(torch.equal(one, other) for one, other in pairs)

    def _take(self, reached: ObservedPass) -> None:
        """Note that a backward pass has reached an observed pass, before it gives gradients."""
        if reached.inputs is None or reached in self._passes:
            return
        # All passes that one backward pass reaches belong together.
        backward = torch._C._current_graph_task_id()
        if self._passes and backward != self._backward and self._gradients_cleared():
            self._passes.clear()
        self._backward = backward
        if len(self._passes) < _MOST_PASSES:
            self._passes.append(reached)
            if len(self._passes) == _MOST_PASSES:
                warnings.warn(
                    f"KFACPreconditioner: {_MOST_PASSES} backward passes since the last step. "
                    "The statistics of the next step come from these alone. If no step is to "
                    "come, call remove()",
                    stacklevel=2,
                )

    def _gradients_cleared(self) -> bool:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return not any(g.layout != torch.strided or bool(g.any()) for g in gradients)

    @property
    def num_passes(self) -> int:
        """Observed passes that a backward pass has reached, whose inputs are kept."""
        return len(self._passes)

    def pop_inputs(self) -> list[ModelCall]:
        """Return what was kept of the calls since the last call, in order, and forget it."""
        taken, self._passes, self.num_forward = self._passes, [], 0
        kept = [one.inputs for one in taken if one.inputs is not None]
        for one in taken:
            one.inputs = None  # the user may keep the graph
        return kept


def _nodes(tensors: Iterable[Tensor]) -> list[Node]:
    """Return the operations whose derivatives the tensors' graphs begin with, each once.

    A view that is overwritten later is left out of the graph, its base is not; and outputs that
    are a slice of a result are not in the graph of a loss of the whole result.
    """
    both = [one for tensor in tensors for one in (tensor, tensor._base) if one is not None]
    return list(dict.fromkeys(one.grad_fn for one in both if one.grad_fn is not None))


def unseen_message(step: int, num_forward: int) -> str:
    """Return what is wrong if no pass was taken, after this many forward passes were observed."""
    needs = f"KFACPreconditioner.step: step {step} needs statistics, and "
    if num_forward:
        return (
            f"{needs}no backward pass since the last step went through the outputs of the "
            f"{num_forward} forward passes that were observed. Call backward before step, and "
            "zero_grad before backward or after step"
        )
    return (
        f"{needs}the model made no forward pass in training mode since the last step. If the "
        "model was compiled and called before KFACPreconditioner was made, pass it the compiled "
        "model"
    )


class ObserverHook:
    """Calls the method `name` of an observer that is still there; of a copy, nothing."""

    def __init__(self, name: str, observer: ForwardObserver | None = None) -> None:
        self._name = name
        self._observer = None if observer is None else weakref.ref(observer)

    def __reduce__(self) -> tuple[type[ObserverHook], tuple[str]]:
        """Copies and pickles of a model are not observed."""
        return ObserverHook, (self._name,)

    # The decorator has no types. Compiled models must run the hook as plain Python.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *call: Any) -> None:
        """Hand over the call of a module."""
        observer = self._observer and self._observer()
        if observer is None:
            self.remove_if_idle(module)
        else:
            getattr(observer, self._name)(module, *call)

    def remove_if_idle(self, module: nn.Module) -> None:
        """Remove the hooks of copied observers from a module."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            idle = [
                key
                for key, hook in hooks.items()
                if isinstance(hook, ObserverHook) and not (hook._observer and hook._observer())
            ]
            for key in idle:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def statistics_part(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    calls: ModelCalls,
    subset: SubsetRule,
    fraction: float,
    dtype: torch.dtype,
    case_axis: int,
) -> ModelCall:
    """Return the cases of a call that the statistics are computed on, as copies.

    Raises:
        InvalidSpecError: the call cannot be divided into cases.
    """
    call = calls.read(model, args, kwargs, case_axis)
    positions = subset.positions(call.num_cases, fraction)
    part = call if len(positions) == call.num_cases else call.take(torch.tensor(positions))

    def copied(tensor: Tensor) -> Tensor:
        kept = in_type_of_parameters(tensor, dtype)
        return kept.clone() if kept is tensor else kept

    return part.changed(copied)


def in_type_of_parameters(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return inputs of half precision, which autocast accepts, in the type `dtype`; others as are.

    K-FAC's own passes run without autocast.
    """
    return values.to(dtype) if values.dtype in (torch.bfloat16, torch.float16) else values


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 if torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def in_place_message(name: str) -> str:
    """Return what is wrong if a model changes its input, and what would be right."""
    return (
        f"{name} changed its input in place. K-FAC runs a model several times on the same input, "
        "so the later passes would see another one. Use the operation that makes a new tensor "
        "(x = x / 255 instead of x.div_(255), inplace=False), or begin forward with x = x.clone()"
    )


def plain_module(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group that most likely reduces the gradients of a model.

    It is the group of DistributedDataParallel, or else the default group of torch.distributed;
    None if that is not initialised.
    """
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
