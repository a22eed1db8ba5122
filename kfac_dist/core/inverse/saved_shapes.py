"""Does a saved state of the curvature fit the blocks of a model, matrix by matrix?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.factors import Link
from kfac_dist.errors import InvalidSpecError

_Shape = tuple[int, ...]
# Tensors of the inverse of a linked layer, whose axes are those of the layer and of the next.
_CHAINED = ("K1", "K2", "denominators", "psi_A", "psi_G")


def check_shapes(
    state: Mapping[str, Mapping[str, Tensor]], blocks: Sequence[LayerBlock], links: Sequence[Link]
) -> None:
    """Check the shapes of the `factors` and the `inverses` in a state of a `Curvature`.

    Raises:
        InvalidSpecError: a layer has another shape in the state; the message has both.
    """
    by_name = {block.name: block for block in blocks}
    following = {link.name: by_name[link.next_name] for link in links}
    for part, depth in (("factors", 1), ("inverses", 3)):
        for key, value in state[part].items():
            name, *middle = key.rsplit("/", depth)
            if value.dim() == 0 or name not in by_name:
                continue
            block = by_name[name]
            wanted = tuple(_legal_shapes(block, following.get(name), middle[-1], value.dim()))
            if tuple(value.shape) not in wanted:
                raise InvalidSpecError(
                    f"the state is of another model: in its {part}, {middle[-1]} of layer {name!r} "
                    f"has the shape {list(value.shape)}, but the matrix of this layer is "
                    f"[{block.dim_G}, {block.dim_A}], outputs by inputs and bias"
                )


def _legal_shapes(
    block: LayerBlock, following: LayerBlock | None, key: str, num_axes: int
) -> Iterator[_Shape]:
    inputs, outputs = block.dim_A, block.dim_G
    if block.kind in ("unit-wise", "diagonal"):
        yield from [(outputs, inputs, inputs)] if key == "M" else []
        return
    exact: dict[str, _Shape] = {
        "A": (inputs,) if block.kind == "kronecker, diagonal A" else (inputs, inputs),
        "G": (outputs, outputs),
        "Q_A": (inputs, inputs),
        "Q_G": (outputs, outputs),
        "moments": (outputs, inputs),
    }
    if following is not None:
        exact["cross_A"] = (inputs, following.dim_A)
        exact["cross_G"] = (outputs, following.dim_G)
    if key in exact:
        yield exact[key]
    elif key in _CHAINED and following is not None:
        sizes = {inputs, outputs, following.dim_A, following.dim_G}
        yield from product(sizes, repeat=num_axes)
