"""Built-in task `char_transformer`: predict the next character at each position of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.data import MapDataset, TextSource
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks.arguments import true_or_false, whole_number
from kfac_dist.tasks.transformer import CharTransformer


@dataclass(frozen=True, kw_only=True)
class CharTransformerTask:
    """A case is a window of `context` characters; each target is the character after it.

    The loss of a case is the sum over its characters, so suitable damping grows with `context`.
    Training windows begin `stride` characters apart; test windows do not overlap.
    """

    source: TextSource
    context: int
    stride: int
    width: int
    num_heads: int
    num_blocks: int
    tie_weights: bool

    @property
    def distribution(self) -> Literal["categorical"]:
        """One character at each position."""
        return "categorical"

    def model(self) -> nn.Module:
        """Return a new network for the characters of the text."""
        return CharTransformer(
            len(self.source.vocabulary()),
            context=self.context,
            width=self.width,
            num_heads=self.num_heads,
            num_blocks=self.num_blocks,
            tie_weights=self.tie_weights,
        )

    def train_data(self) -> MapDataset:
        """Return the windows in the first nine tenths of the text."""
        return self.source.windows("train", context=self.context, stride=self.stride)

    def test_data(self) -> MapDataset:
        """Return the windows in the last tenth of the text."""
        return self.source.windows("test", context=self.context, stride=self.context)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `nats_per_character` and `accuracy`, means over a case's characters, `[N]`."""
        nats = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        correct = (outputs.argmax(dim=-1) == targets).to(outputs.dtype)
        return {
            "nats_per_character": nats.view(targets.shape).mean(dim=1),
            "accuracy": correct.mean(dim=1),
        }


def char_transformer(
    source: TextSource,
    *,
    context: object = 64,
    stride: object = None,
    width: object = 64,
    num_heads: object = 4,
    num_blocks: object = 2,
    tie_weights: object = False,
) -> CharTransformerTask:
    """Build the task from its `task_args`; raise InvalidSpecError for a value that is not allowed.

    Args:
        source: the text.
        context: characters in a window.
        stride: characters from the start of a training window to the next; by default `context`.
        width: features at each position.
        num_heads: attention heads, among which `width` is divided.
        num_blocks: blocks of attention and MLP.
        tie_weights: whether the output layer shares the matrix of the token embedding.
    """
    length = whole_number("context", context)
    size, heads = whole_number("width", width), whole_number("num_heads", num_heads)
    if size % heads:
        raise InvalidSpecError(f"task_args.width: {size} cannot be divided by num_heads, {heads}")
    return CharTransformerTask(
        source=source,
        context=length,
        stride=length if stride is None else whole_number("stride", stride),
        width=size,
        num_heads=heads,
        num_blocks=whole_number("num_blocks", num_blocks),
        tie_weights=true_or_false("tie_weights", tie_weights),
    )
