"""Where a model uses its parameters, and which of these uses a layer rule covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kfac_dist.core.blocks.layer_rules import LayerRule, bypasses_parts, rule_for
from kfac_dist.errors import InvalidSpecError


@dataclass(frozen=True)
class Use:
    """A parameter as the attribute `role` of a module, whose name is `owner`.

    `rule` covers this use. It is None where no rule does, and `why` tells the reason.
    """

    owner: str
    module: nn.Module
    role: str
    rule: LayerRule[Any] | None
    why: str


def find_uses(model: nn.Module, diagonal: Sequence[str]) -> dict[nn.Parameter, list[Use]]:
    """Return the uses of each parameter in the order of the modules.

    Modules and parameters that match a pattern of `diagonal` are covered by no rule.

    Raises:
        InvalidSpecError: a pattern of `diagonal` matches no module and no parameter.
    """
    uses: dict[nn.Parameter, list[Use]] = {}
    unmatched = set(diagonal)
    bypassing = [name for name, module in model.named_modules() if bypasses_parts(module)]
    for owner, module in model.named_modules():
        inside = any(_is_within(owner, ancestor) for ancestor in bypassing)
        for role, parameter in module.named_parameters(recurse=False):
            names = owner, f"{owner}.{role}" if owner else role
            asked = {p for p in diagonal if any(fnmatchcase(name, p) for name in names)}
            unmatched -= asked
            why = _reason(module, role, inside=inside, asked=bool(asked))
            rule = None if why else rule_for(module)
            uses.setdefault(parameter, []).append(Use(owner, module, role, rule, why))
    if unmatched:
        raise InvalidSpecError(
            f"diagonal: {', '.join(sorted(unmatched))} matches no module and no parameter of "
            "the model"
        )
    return uses


def _is_within(name: str, ancestor: str) -> bool:
    return not ancestor or name == ancestor or name.startswith(f"{ancestor}.")


def _reason(module: nn.Module, role: str, *, inside: bool, asked: bool) -> str:
    """Return why a parameter gets a diagonal block, "" if a rule covers it."""
    if asked:
        return "asked for"
    if inside:
        return "MultiheadAttention does not call its parts"
    rule = rule_for(module)
    if rule is None or role not in ("weight", "bias"):
        return f"no rule for {role} of {type(module).__name__}"
    return rule.why_not(module)


def common_use(uses: Sequence[Use]) -> Use | str:
    """Return the first use if all are alike, otherwise why no rule covers them."""
    first = uses[0]
    for use in uses:
        if use.rule is None:
            return use.why
        if (use.rule, use.role) != (first.rule, first.role):
            return f"{first.owner} and {use.owner} use it differently"
        if use.rule.num_groups(use.module) != use.rule.num_groups(first.module):
            return f"{first.owner} and {use.owner} have different numbers of groups"
    return first
