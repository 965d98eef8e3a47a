"""An engine's fingerprints against the trainer's."""

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
