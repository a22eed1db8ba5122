"""Statistics that are refused several times in a row: the curvature in use gets old, or is missing.

One refusal may be bad luck and is only counted. Several have a cause that the user has to know of.
"""

from __future__ import annotations

from collections.abc import Sequence

REFUSALS_TO_WARN_OF = 3
_NAMED = 5  # layers


def refusal_warning(step: int, layers: Sequence[str] = ()) -> str:
    """Return the warning that statistics were refused `REFUSALS_TO_WARN_OF` times in a row.

    `layers` are those whose factors were not finite in the last of them, the step `step`.
    """
    named = ", ".join(layers[:_NAMED]) + (" and others" if len(layers) > _NAMED else "")
    where = f" (layers {named})" if layers else ""
    return (
        f"step {step}: the statistics of {REFUSALS_TO_WARN_OF} updates in a row were refused, "
        f"because factors were not finite{where}; directions come from older factors, or are the "
        "gradient. With batch normalisation, take more cases: raise statistics_fraction"
    )
