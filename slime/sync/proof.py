"""Do the live weights of an engine have the fingerprints that the trainer's have?

Each rank says the fingerprint of every move of its live map. Fingerprints add up: those of a tensor's different source blocks, whichever
ranks hold them, make the tensor's. A block that several ranks or several places hold (norms, key/value heads with more ranks than heads,
tied embeddings) is counted once and must be the same everywhere.
"""

from collections.abc import Sequence

import numpy as np

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
        self._counts = [len(found.moves) for found in maps]  # fingerprints that each rank says
        starts = np.cumsum([0, *self._counts]).tolist()
        tensors: list[int] = []
        ends: list[int] = []  # blocks of these tensors and of those before
        first: list[int] = []  # of every block a place, as its number among all ranks' fingerprints
        further: list[int] = []  # all other places of it
        of: list[int] = []  # the block of each further place
        for tensor, described in enumerate(spec.tensors):
            if described.name in self.opaque:
                continue
            blocks: dict[Block, int] = {}
            for start, found in zip(starts, maps, strict=False):
                for move in found.of_tensor.get(tensor, ()):
                    block = blocks.setdefault(found.moves[move].source, len(first))
                    if block == len(first):
                        first.append(start + move)
                    else:
                        further.append(start + move)
                        of.append(block)
            held = sum(block.size for block in blocks)
            if held != described.size or any(block.end > described.size for block in blocks):
                raise ValueError(
                    f"{engine} holds {held} of the {described.size} elements of {described.name}: it serves another model than model.path, "
                    "or its SGLang loads this family in a way that slime does not follow; set sync.mode=full"
                )
            tensors.append(tensor)
            ends.append(len(first))
        self._tensors, self._ends, self._first, self._further, self._of = (
            np.array(column, np.int64) for column in (tensors, ends, first, further, of)
        )

    def wrong(self, found: Sequence[Sequence[int]], expected: Sequence[int]) -> list[str]:
        """Names of the tensors whose live bits are not those of `expected` (a fingerprint a tensor). `found[rank][move]`."""
        assert [len(said) for said in found] == self._counts, "a rank says a fingerprint for every move"
        # Engines are paused meanwhile: a few operations on arrays, however many tensors there are.
        every = np.concatenate([np.array(said, np.uint64) for said in found])
        blocks = every[self._first]
        sums = np.append(np.uint64(0), np.cumsum(blocks, dtype=np.uint64))[np.append(0, self._ends)]
        bad = sums[1:] - sums[:-1] != np.array(expected, np.uint64)[self._tensors]
        differ = self._of[every[self._further] != blocks[self._of]]
        bad[np.searchsorted(self._ends, differ, "right")] = True
        return [self._spec.tensors[tensor].name for tensor in self._tensors[bad].tolist()]
