"""Where a model uses its parameters, and which of these uses K-FAC can observe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from kfac_dist.core.blocks.layer_rules import kind_of
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True)
class Use:
    """A parameter as attribute `role` of a module.

    `kind` is the class whose rule covers it, None if there is none: `why` tells the reason.
    """

    owner: str
    module: nn.Module
    role: str
    kind: type[nn.Module] | None
    why: str


def find_uses(model: nn.Module, diagonal: Sequence[str]) -> dict[nn.Parameter, list[Use]]:
    """Return the uses of each parameter in the order of the modules.

    Raises:
        InvalidSpecError: a pattern of `diagonal` fits no module and no parameter.
    """
    uses: dict[nn.Parameter, list[Use]] = {}
    unmatched = set(diagonal)
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for owner, module in model.named_modules():
        inside = any(_is_within(owner, attention) for attention in attentions)
        for role, parameter in module.named_parameters(recurse=False):
            names = owner, f"{owner}.{role}" if owner else role
            asked = {p for p in diagonal if any(fnmatchcase(name, p) for name in names)}
            unmatched -= asked
            why = _reason(module, role, inside=inside, asked=bool(asked))
            kind = None if why else kind_of(module)
            uses.setdefault(parameter, []).append(Use(owner, module, role, kind, why))
    if unmatched:
        raise InvalidSpecError(
            f"diagonal: {', '.join(sorted(unmatched))} fits no module and no parameter of the model"
        )
    return uses


def _is_within(name: str, ancestor: str) -> bool:
    return not ancestor or name == ancestor or name.startswith(f"{ancestor}.")


def _reason(module: nn.Module, role: str, *, inside: bool, asked: bool) -> str:
    """Return why a parameter has a diagonal block, "" where a rule covers it."""
    if asked:
        return "asked for"
    if inside:
        return "MultiheadAttention does not call its parts"
    if kind_of(module) is None or role not in ("weight", "bias"):
        return f"no rule for {role} of {type(module).__name__}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes the weight"
    return ""


def common_use(uses: Sequence[Use]) -> Use | str:
    """Return the first of uses that are all alike, or why they are covered by no rule."""
    first = uses[0]
    for use in uses:
        if use.kind is None:
            return use.why
        if (use.kind, use.role) != (first.kind, first.role):
            return f"{first.owner} and {use.owner} use it differently"
        if getattr(use.module, "groups", 1) != getattr(first.module, "groups", 1):
            return f"{first.owner} and {use.owner} have other groups"
    return first
