"""What FP8 engines hold follows the trainer's tensors change by change, and is always what quantising them anew would give."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.engine.host_copy import HostCopy, bits_of, tensor_of
from slime.engine.served import Quantised, Served, served
from slime.sync.fingerprint import run_key
from slime.sync.inserver_weights import Weights
from slime.sync.proof import Proof
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.staging import Stage

RUN = "run"
SPEC = ModelSpec(
    (
        TensorSpec("model.embed_tokens.weight", (50, 200), "bfloat16"),
        TensorSpec("model.layers.0.self_attn.q_proj.weight", (300, 200), "bfloat16"),
        TensorSpec("model.layers.0.mlp.down_proj.weight", (256, 128), "bfloat16"),
        TensorSpec("model.norm.weight", (200,), "bfloat16"),
    )
)


def random_bits(seed: int) -> list[np.ndarray]:
    g = torch.Generator().manual_seed(seed)
    return [bits_of(torch.randn(t.shape, generator=g).bfloat16()).copy() for t in SPEC.tensors]


def fresh(bits: list[np.ndarray]) -> Quantised:
    return Quantised(HostCopy(SPEC, RUN, "fresh", [b.copy() for b in bits]), RUN)


def changes_of(number: int, old: np.ndarray, new: np.ndarray, listed: np.ndarray) -> Changes:
    return Changes(number, listed, old[listed], new[listed])


def assert_same(found: Quantised, meant: Quantised) -> None:
    for number in range(len(found.engine.spec.tensors)):
        assert np.array_equal(found.engine.bits(number), meant.engine.bits(number)), found.engine.spec.tensors[number].name
    assert found.engine.fingerprints == meant.engine.fingerprints


def step(g: np.random.Generator, bits: np.ndarray, density: float, kind: str) -> np.ndarray:
    """The next version of a tensor."""
    made = bits.copy()
    at = np.flatnonzero(g.random(bits.size) < density)
    if kind == "ulp":
        made[at] ^= 1
    elif kind == "any":  # NaN and infinities among them
        made[at] = g.integers(0, 1 << 16, len(at))
    elif kind == "shrink":  # the largest go, so that peaks fall
        largest = np.argsort(bits & 0x7FFF)[-20:]
        made[largest] = 0x3C00
    else:
        made[at] = 0
    return made


@pytest.mark.parametrize(("kind", "density"), [("ulp", 0.01), ("ulp", 1.0), ("any", 0.02), ("shrink", 0.0), ("zero", 0.9), ("zero", 1.0)])
def test_codes_follow_changes_as_if_they_were_made_anew(kind: str, density: float) -> None:
    g = np.random.default_rng(0)
    now = random_bits(1)
    held = fresh(now)
    for number in range(1, 6):
        after = [step(g, bits, density, kind) for bits in now]
        found = [changes_of(i, old, new, np.flatnonzero(old != new)) for i, (old, new) in enumerate(zip(now, after, strict=True))]
        meant = fresh(after)
        reached = list(held.engine.fingerprints)
        for changes, sums in held.trainer.ahead(found):
            for there, sum_there in held.ahead(changes, sums):
                assert (np.diff(there.positions) > 0).all()
                assert (there.old == held.engine.bits(there.tensor)[there.positions]).all()
                reached[there.tensor] = sum_there
        assert reached == meant.engine.fingerprints
        held.apply([partial(iter, found)], str(number), meant.trainer.fingerprints, reached)
        assert_same(held, meant)
        assert held.engine.label == held.trainer.label == str(number)
        now = after


def test_unchanged_elements_that_are_listed_change_no_code() -> None:
    bits = random_bits(2)
    held = fresh(bits)
    everything = np.arange(SPEC.tensors[1].size)
    [(codes, _), (scales, _)] = held.ahead(Changes(1, everything, bits[1], bits[1]), held.trainer.fingerprints[1])
    assert len(codes) == len(scales) == 0


def test_whole_tensors_are_quantised_as_the_held_ones_are() -> None:
    before, after = random_bits(3), random_bits(4)
    held, meant = fresh(before), fresh(after)
    bucket = [(t.name, tensor_of(SPEC, i, after[i])) for i, t in enumerate(SPEC.tensors)]
    as_loaded = dict(held.bucket(bucket))
    for found in meant.buckets(1 << 30):
        for name, tensor in found:
            assert torch.equal(as_loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name
    halves = [bucket[:2], bucket[2:]]
    held.replace(halves, [held.bucket(half) for half in halves], "2", meant.trainer.fingerprints, meant.engine.fingerprints)
    assert_same(held, meant)
    later = [step(np.random.default_rng(5), b, 0.05, "any") for b in after]
    found = [changes_of(i, old, new, np.flatnonzero(old != new)) for i, (old, new) in enumerate(zip(after, later, strict=True))]
    meant = fresh(later)
    held.apply([partial(iter, found)], "3", meant.trainer.fingerprints, meant.engine.fingerprints)
    assert_same(held, meant)


def test_what_is_not_quantised_is_held_once() -> None:
    held = fresh(random_bits(6))
    assert held.engine.bits(0) is held.trainer.bits(0)


def test_engines_without_quantisation_hold_what_travels() -> None:
    copy = HostCopy(SPEC, RUN, "x", random_bits(7))
    found = served(copy, "none", RUN)
    assert type(found) is Served
    assert found.engine is copy


class Fused(torch.nn.Module):
    """As SGLang holds two quantised projections: codes of both in one parameter, scales of both in another."""

    NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(50, 256, dtype=torch.bfloat16), requires_grad=False)
        self.codes = torch.nn.Parameter(torch.zeros(384, 256, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.scales = torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        q, k = self.NAMES
        places = {
            "model.embed_tokens.weight": self.embedding.data,
            q: self.codes.data[:256],
            k: self.codes.data[256:],
            f"{q}_scale_inv": self.scales.data[:2],
            f"{k}_scale_inv": self.scales.data[2:],
        }
        for name, tensor in tensors:
            places[name].copy_(tensor)


def test_what_is_carried_over_lands_in_a_model_of_codes_and_scales(tmp_path: Path) -> None:
    q, k = Fused.NAMES
    shapes = {"model.embed_tokens.weight": (50, 256), q: (256, 256), k: (128, 256)}
    spec = ModelSpec(tuple(TensorSpec(name, shape, "bfloat16") for name, shape in shapes.items()))
    g = np.random.default_rng(0)
    now = [bits_of(torch.randn(t.shape).bfloat16()).copy() for t in spec.tensors]
    held = Quantised(HostCopy(spec, RUN, "run/0/0", [bits.copy() for bits in now]), RUN)
    model = Fused()
    for bucket in held.buckets(1 << 20):
        model.load_weights(bucket)
    weights = Weights(model, held.engine.spec, RUN, "run/0/0")
    assert not weights.map.opaque
    proof = Proof(held.engine.spec, [weights.map], "engine 0")
    assert proof.wrong([weights.audit()[0].tolist()], held.engine.fingerprints) == []
    for number in range(1, 6):
        after = [step(g, bits, 0.05, "any" if number % 2 else "ulp") for bits in now]
        found = [changes_of(i, old, new, np.flatnonzero(old != new)) for i, (old, new) in enumerate(zip(now, after, strict=True))]
        stage, reached = Stage(weights.map, run_key(RUN)), list(held.engine.fingerprints)
        for changes, sums in held.trainer.ahead(found):
            for there, sum_there in held.ahead(changes, sums):
                stage.add(stage.pieces(there))
                reached[there.tensor] = sum_there
        labels = f"run/0/{number}", f"run/0/{number - 1}"
        stage.write(tmp_path / "staged", *labels)
        weights.stage(str(tmp_path / "staged"), *labels)
        weights.commit(*labels)
        assert proof.wrong([weights.audit()[0].tolist()], reached) == []
        meant = Quantised(HostCopy(spec, RUN, labels[0], [bits.copy() for bits in after]), RUN)
        fresh = Fused()
        for bucket in meant.buckets(1 << 20):
            fresh.load_weights(bucket)
        for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        held.apply([partial(iter, found)], labels[0], meant.trainer.fingerprints, reached)
        now = after
