"""Do the live weights of an engine have the fingerprints that the trainer's have?

Each rank says the fingerprint of every move of its live map. Fingerprints add up: those of a tensor's different source blocks, whichever
ranks hold them, make the tensor's. A block that several ranks or several places hold (norms, key/value heads with more ranks than heads,
tied embeddings) is counted once and must be the same everywhere.
"""

from collections.abc import Sequence

from slime.layout import Block
from slime.sync.livemap import LiveMap
from slime.sync.records import ModelSpec

Place = tuple[int, int]  # (rank, number of the move in its map)


class Proof:
    """What has to hold for one engine. `opaque` are the tensors of which nothing can be said by bits, with the engine's reason."""

    def __init__(self, spec: ModelSpec, maps: Sequence[LiveMap], engine: str) -> None:
        """`maps` of all ranks. Raises ValueError naming a tensor that the engine does not hold, or not all of."""
        self._spec = spec
        self.opaque = {name: why for found in maps for name, why in found.opaque.items()}
        self._blocks: dict[int, list[list[Place]]] = {}
        for tensor, described in enumerate(spec.tensors):
            if described.name in self.opaque:
                continue
            places: dict[Block, list[Place]] = {}
            for rank, found in enumerate(maps):
                for move in found.of_tensor.get(tensor, ()):
                    places.setdefault(found.moves[move].source, []).append((rank, move))
            held = sum(block.size for block in places)
            if held != described.size:
                raise ValueError(
                    f"{engine} holds {held} of the {described.size} elements of {described.name}: it serves another model than model.path, "
                    "or its SGLang loads this family in a way that slime does not follow; set sync.mode=full"
                )
            self._blocks[tensor] = list(places.values())

    def wrong(self, found: Sequence[Sequence[int]], expected: Sequence[int]) -> list[str]:
        """Names of the tensors whose live bits are not those of `expected` (a fingerprint a tensor). `found[rank][move]`."""
        return [self._spec.tensors[tensor].name for tensor, blocks in self._blocks.items() if not _is(blocks, found, expected[tensor])]


def _is(blocks: list[list[Place]], found: Sequence[Sequence[int]], expected: int) -> bool:
    total = 0
    for places in blocks:
        values = {found[rank][move] for rank, move in places}
        if len(values) > 1:
            return False
        total += values.pop()
    return total % (1 << 64) == expected
