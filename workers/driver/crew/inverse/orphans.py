"""The layers whose inverse worker has died and that its successor has not refreshed yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from workers.actor import Handle, Ref


class Orphans:
    """Orphaned layers, with the rank of the worker that owns each; the shards know them.

    `owners` are the members that have the shard of each layer.
    """

    def __init__(self, owners: Mapping[str, Handle]) -> None:
        self.owners = owners
        self._ranks: dict[str, int] = {}
        self._awaited: set[str] = set()  # those that the shards wait for again

    @property
    def names(self) -> tuple[str, ...]:
        """The orphaned layers."""
        return tuple(self._ranks)

    def add(self, layers: Collection[str], rank: int) -> None:
        """Note that the worker of this rank has died, which owned these layers."""
        self._ranks |= dict.fromkeys(layers, rank)
        self._awaited -= set(layers)
        self.send()

    def send(self) -> list[Ref]:
        """Tell the shards; the calls that are returned end when they know."""
        left = tuple(layer for layer in self._ranks if layer not in self._awaited)
        return [owner.set_orphaned.remote(left) for owner in dict.fromkeys(self.owners.values())]

    def wait_again(self, layers: Collection[str]) -> list[Ref]:
        """Have the shards wait for new inverses of orphaned layers, which successors now make.

        Returns calls that end when the shards know.
        """
        self._awaited |= set(layers)
        return self.send()

    def note_versions(
        self,
        versions: Mapping[str, int],
        oldest_admissible: Mapping[str, int],
        connected_step: Callable[[int], int | None],
        *,
        is_exact: bool,
    ) -> list[str]:
        """Return the layers that cease to be orphaned, given the versions now in use.

        A layer is orphaned until the version in use was made by the successor and is within the
        staleness bound. In an exact step both workers make the same version.

        Args:
            versions: by layer.
            oldest_admissible: by layer.
            connected_step: returns the first step of the successor with a rank, None before that.
            is_exact: whether the step uses exact versions.
        """
        recovered = [
            layer
            for layer, rank in self._ranks.items()
            # Only the successor can make versions from its first step on.
            if (connected := connected_step(rank)) is not None
            and versions.get(layer, 0)
            >= max(0 if is_exact else connected, oldest_admissible.get(layer, 1))
        ]
        for layer in recovered:
            del self._ranks[layer]
            self._awaited.discard(layer)
        if recovered:
            self.send()
        return recovered
