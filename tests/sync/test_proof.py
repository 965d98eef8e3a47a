"""An engine's fingerprints against the trainer's."""

from typing import Any

import numpy as np
import pytest

from slime.layout import Block
from slime.sync.livemap import Live, LiveMap, LiveMove
from slime.sync.proof import Proof
from slime.sync.records import ModelSpec, TensorSpec

SPEC = ModelSpec((TensorSpec("w", (8,), "bfloat16"), TensorSpec("norm", (4,), "bfloat16")))


def run(offset: int, size: int) -> Block:
    return Block(offset, (size,), (1,))


def rank(*moves: tuple[int, Block], opaque: dict[str, str] | None = None) -> LiveMap:
    lives = (Live("a", "bfloat16", 100),)
    return LiveMap(SPEC.signature, lives, tuple(LiveMove(t, b, 0, run(0, b.size)) for t, b in moves), opaque or {}, (), {}, {})


TWO = [rank((0, run(0, 4)), (1, run(0, 4))), rank((0, run(4, 4)), (1, run(0, 4)))]


def test_shards_add_up_and_replicas_agree() -> None:
    proof = Proof(SPEC, TWO, "engine 0")
    top = (1 << 64) - 1
    assert proof.wrong([[top, 7], [3, 7]], [2, 7]) == []
    assert proof.wrong([[5, 7], [3, 7]], [2, 7]) == ["w"]
    assert proof.wrong([[top, 7], [3, 8]], [2, 7]) == ["norm"], "replicas differ"
    assert proof.wrong([[5, 7], [3, 8]], [2, 7]) == ["w", "norm"]


def test_many_tensors_of_many_ranks() -> None:
    """Each against its own blocks, whatever its neighbours hold; a tensor without elements is proven by nothing."""
    random = np.random.default_rng(0)
    spec = ModelSpec(tuple(TensorSpec(f"t{n}", (0 if n % 7 == 3 else 6,), "bfloat16") for n in range(50)))
    moves: list[list[LiveMove]] = [[], [], []]
    for n, tensor in enumerate(spec.tensors):
        for r in range(3 if tensor.size else 0):
            source = run(2 * r, 2) if n % 2 else run(0, 6)  # divided among the ranks, or held by all
            moves[r].append(LiveMove(n, source, 0, run(0, source.size)))
            if n % 5 == 0:
                moves[r].append(LiveMove(n, source, 0, run(50, source.size)))
    maps = [LiveMap(spec.signature, (Live("a", "bfloat16", 100),), tuple(own), {}, (), {}, {}) for own in moves]
    of_block = {(n, b): int(random.integers(0, 1 << 64, dtype=np.uint64)) for n in range(50) for b in range(3)}
    found = [[of_block[move.tensor, move.source.offset // 2] for move in own] for own in moves]
    expected = [sum(of_block[n, b] for b in range(3 if n % 2 else 1)) % (1 << 64) if t.size else 0 for n, t in enumerate(spec.tensors)]
    proof = Proof(spec, maps, "engine 0")
    assert proof.wrong(found, expected) == []
    for r, own in enumerate(moves):
        for m, move in enumerate(own):
            found[r][m] ^= 1 << 63
            assert proof.wrong(found, expected) == [f"t{move.tensor}"]
            found[r][m] ^= 1 << 63
    assert proof.wrong(found, [value ^ (n in (0, 3, 49)) for n, value in enumerate(expected)]) == ["t0", "t3", "t49"]


def test_a_proof_is_quick() -> None:
    """Engines are paused meanwhile. Fingerprints are not looked at one by one in Python."""

    class Counted(list[int]):
        looked = 0

        def __getitem__(self, key: Any) -> Any:
            Counted.looked += 1
            return super().__getitem__(key)

    found = [Counted([1, 7]), Counted([1, 7])]
    assert Proof(SPEC, TWO, "engine 0").wrong(found, [2, 7]) == [] and Counted.looked <= 2 * len(found)


def test_tied_places_count_once() -> None:
    tied = rank((0, run(0, 8)), (0, run(0, 8)), (1, run(0, 4)))
    proof = Proof(SPEC, [tied], "engine 0")
    assert proof.wrong([[9, 9, 1]], [9, 1]) == []
    assert proof.wrong([[9, 10, 1]], [9, 1]) == ["w"]


def test_what_an_engine_does_not_hold_is_named() -> None:
    with pytest.raises(ValueError, match=r"engine 3 holds 4 of the 8 elements of w: it serves another model than model.path"):
        Proof(SPEC, [TWO[0]], "engine 3")
    with pytest.raises(ValueError, match="engine 3 holds 0 of the 4 elements of norm"):
        Proof(SPEC, [rank((0, run(0, 8)))], "engine 3")


def test_opaque_tensors_are_left_out_and_named() -> None:
    proof = Proof(SPEC, [rank((1, run(0, 4)), opaque={"w": "a cast to float32"})], "engine 0")
    assert proof.opaque == {"w": "a cast to float32"}
    assert proof.wrong([[4]], [123, 4]) == []
