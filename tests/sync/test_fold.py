"""Weights brought from version to version: proven, or unchanged; folds and anchors lead to the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from slime.sync.chain import plan
from slime.sync.fold import Made, NotTheseWeights, Weights, anchor, difference, fold
from slime.sync.manifest import ANCHOR, FOLD, MODEL_DIRECTORY, NO_ROOT, Manifest, ManifestError, PartRef
from slime.sync.records import BLOCK, ModelSpec, TensorSpec
from slime.sync.wire import WireError, describe_part, encode_part

MODEL = ModelSpec(
    (
        TensorSpec("embed", (60, 50), "bfloat16"),
        TensorSpec("norm", (7,), "float32"),
        TensorSpec("experts", (3, 20, 10), "float8_e4m3fn"),
        TensorSpec("head", (40, 30), "bfloat16"),
        TensorSpec("scale", (), "bfloat16"),
    )
)
PART_BYTES = 4000


@dataclass
class Run:
    """A trainer: versions with their parts, as it would publish them."""

    seed: int = 0
    codec: str = "steps"
    made: list[Made] = field(default_factory=list)
    bits: list[list[np.ndarray]] = field(default_factory=list)  # of the model directory, then of every version

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        start = [self.random.integers(0, 1 << 8 * t.type.width, t.size, dtype=np.uint64).astype(t.type.bits) for t in MODEL.tensors]
        self.bits.append(start)

    def step(self, share: float = 0.02, now: list[np.ndarray] | None = None) -> Made:
        """The next version: `share` of the elements, or what `now` says."""
        if now is None:
            now = [bits.copy() for bits in self.bits[-1]]
            for bits in now:
                at = self.random.random(len(bits)) < share
                bits[at] ^= np.asarray(1 + self.random.integers(0, 3), bits.dtype)
        before, after = (Weights(MODEL, "run", bits) for bits in (self.bits[-1], now))
        number = len(self.made)
        listed = [difference(i, old, new) for i, (old, new) in enumerate(zip(before.bits, after.bits, strict=True))]
        payloads = [
            encode_part(MODEL, tensors, [listed[i][0] for i in tensors if len(listed[i][0])], self.codec, before.old_of)
            for tensors in MODEL.parts(PART_BYTES)
        ]
        manifest = Manifest(
            run_id="run",
            epoch=0,
            number=number,
            parent_epoch=0 if number else -1,
            parent_number=number - 1,
            kind="delta",
            signature=MODEL.signature,
            codec=self.codec,
            part_bytes=PART_BYTES,
            parts=tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads)),
            fingerprints=tuple(after.fingerprints),
            parent_root=before.root,
            changed=tuple(count for _, count in listed),
        )
        self.made.append(Made(manifest, tuple(payloads)))
        self.bits.append(now)
        return self.made[-1]

    def weights(self, number: int = -1) -> Weights:
        """Those of a version; -1: of the model directory."""
        weights = Weights(MODEL, "run", self.bits[0])
        for made in self.made[: number + 1]:
            weights.apply(made.manifest, made.parts)
        return weights

    def steps(self, first: int, last: int) -> list[tuple[Manifest, Sequence[bytes]]]:
        return [(made.manifest, made.parts) for made in self.made[first : last + 1]]


def equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["steps", "exponent"])
def run(request: pytest.FixtureRequest) -> Run:
    made = Run(codec=request.param)
    for share in (0.02, 0.0, 0.05, 0.6, 0.01, 1.0):
        made.step(share)
    return made


def test_from_version_to_version(run: Run) -> None:
    weights = run.weights()
    assert weights.node == (MODEL_DIRECTORY, run.made[0].manifest.parent_root)
    for made, bits in zip(run.made, run.bits[1:], strict=True):
        weights.apply(made.manifest, made.parts)
        assert equal(weights.bits, bits) and weights.node == (made.manifest.order, made.manifest.root)


def test_a_fold_leads_to_the_same_bits(run: Run) -> None:
    for first, last in ((0, 5), (1, 3), (2, 2), (0, 1)):
        base = run.weights(first - 1)
        folded = fold(base, run.steps(first, last), run.codec)
        assert equal(base.bits, run.bits[last + 1]), "its base is at the end then"
        weights = run.weights(first - 1)
        weights.apply(folded.manifest, folded.parts)
        assert equal(weights.bits, run.bits[last + 1])
        manifest = folded.manifest
        assert (manifest.kind, manifest.order, manifest.parent) == (FOLD, (0, last), run.made[first].manifest.parent)
        assert Manifest.from_json(manifest.to_json()) == manifest and manifest.root == run.made[last].manifest.root
        differ = [int((old != new).sum()) for old, new in zip(run.bits[first], run.bits[last + 1], strict=True)]
        assert list(manifest.changed) == differ


def test_there_and_back_is_in_no_fold() -> None:
    """A -> B -> A."""
    run = Run()
    run.step(0.05)
    back = [bits.copy() for bits in run.bits[0]]
    back[0][5] ^= 1
    run.step(now=back)
    folded = fold(run.weights(), run.steps(0, 1), "steps")
    assert folded.manifest.changed == (1, 0, 0, 0, 0)
    found = [
        block for tensors, part in zip(MODEL.parts(PART_BYTES), folded.parts, strict=True) for block in describe_part(MODEL, tensors, part)
    ]
    assert [(block.tensor, block.changed) for block in found] == [("embed", 1)]
    assert sum(made.manifest.nbytes for made in run.made) > 2 * folded.manifest.nbytes


def test_a_fold_of_nothing() -> None:
    run = Run()
    run.step(0.05)
    run.step(now=run.bits[0])
    folded = fold(run.weights(), run.steps(0, 1), "steps")
    assert folded.manifest.changed == (0,) * 5 and folded.manifest.root == folded.manifest.parent_root
    weights = run.weights()
    assert weights.apply(folded.manifest, folded.parts) == [] and weights.order == (0, 1)


def test_folds_do_not_depend_on_how_they_were_made() -> None:
    run = Run()
    for _ in range(4):
        run.step(0.03)
    whole = fold(run.weights(), run.steps(0, 3), "steps")
    halves = [fold(run.weights(first - 1), run.steps(first, first + 1), "steps") for first in (0, 2)]
    again = fold(run.weights(), [(half.manifest, half.parts) for half in halves], "steps")
    assert again == whole


def test_an_anchor_stands_alone(run: Run) -> None:
    for number in (0, 5):
        made = anchor(run.weights(number), run.made[number].manifest)
        assert (made.manifest.kind, made.manifest.parent, made.manifest.parent_root) == (ANCHOR, MODEL_DIRECTORY, NO_ROOT)
        assert Manifest.from_json(made.manifest.to_json()) == made.manifest and made.manifest.root == run.made[number].manifest.root
        for weights in (Weights(MODEL, "run"), run.weights(2)):
            weights.apply(made.manifest, made.parts)
            assert equal(weights.bits, run.bits[number + 1]) and weights.order == (0, number)
    weights = Weights(MODEL, "run")
    made = anchor(run.weights(3), run.made[3].manifest)
    for manifest, parts in [(made.manifest, made.parts), *run.steps(4, 5)]:
        weights.apply(manifest, parts)
    assert equal(weights.bits, run.bits[-1])


def test_a_plan_of_all_kinds() -> None:
    run = Run()
    for _ in range(9):
        run.step(0.02)
    whole = anchor(run.weights(3), run.made[3].manifest)
    folded = fold(run.weights(3), run.steps(4, 7), "steps")
    every = {made.manifest: made.parts for made in (*run.made[3:], whole, folded)}
    found = plan(every, (0, 8), None)
    assert [step.kind for step in found.steps] == ["anchor", "fold", "delta"]
    weights = Weights(MODEL, "run")
    for step in found.steps:
        weights.apply(step, every[step])
    assert equal(weights.bits, run.bits[-1])


def test_bits_of_every_kind() -> None:
    """NaN payloads, -0.0, infinities, subnormals."""
    run = Run()
    now = [bits.copy() for bits in run.bits[0]]
    now[0][:6] = [0x7FC1, 0xFFFF, 0x8000, 0x7F80, 0x0001, 0x0000]
    now[1][:6] = [0x7FC00001, 0xFFFFFFFF, 0x80000000, 0x7F800000, 1, 0]
    run.step(now=now)
    run.step(0.5)
    weights = run.weights(0)
    assert equal(weights.bits, now)
    folded, whole = fold(run.weights(), run.steps(0, 1), "steps"), anchor(run.weights(0), run.made[0].manifest)
    for made, expected in ((folded, run.bits[2]), (whole, now)):
        weights = Weights(MODEL, "run", run.bits[0])
        weights.apply(made.manifest, made.parts)
        assert equal(weights.bits, expected)


def test_a_complete_block_is_listed_whole() -> None:
    old, new = np.zeros(BLOCK + 10, "<u2"), np.zeros(BLOCK + 10, "<u2")
    new[BLOCK : BLOCK + 3] = 1
    assert len(difference(0, old, new)[0]) == 3, "3 of 10 are not more than DENSE_AT"
    new[BLOCK + 3] = 1
    new[5] = 1
    changes, count = difference(0, old, new)
    assert count == 5 and changes.positions.tolist() == [5, *range(BLOCK, BLOCK + 10)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def unchanged_after(weights: Weights, manifest: Manifest, parts: Sequence[bytes], error: type[Exception], says: str) -> None:
    before, node = [bits.copy() for bits in weights.bits], weights.node
    with pytest.raises(error, match=says):
        weights.apply(manifest, parts)
    assert equal(weights.bits, before) and weights.node == node


def test_steps_out_of_order_are_refused() -> None:
    run = Run()
    for _ in range(3):
        run.step()
    for at, number in ((-1, 1), (0, 2), (1, 1), (2, 0)):
        manifest, parts = run.steps(number, number)[0]
        unchanged_after(run.weights(at), manifest, parts, ManifestError, rf"run/0/{number} begins from .*, here is run/")
    other = Weights(MODEL, "run", [np.zeros_like(bits) for bits in run.bits[0]])
    unchanged_after(other, run.made[0].manifest, run.made[0].parts, ManifestError, "from the right model directory")
    with pytest.raises(ValueError, match="run/0/2 begins from run/0/1"):
        fold(run.weights(), [*run.steps(0, 0), *run.steps(2, 2)], "steps")


def test_another_model_is_refused() -> None:
    run = Run()
    made = run.step()
    tensors = (*MODEL.tensors[:-1], TensorSpec("scale", (1,), "bfloat16"))
    other = Weights(ModelSpec(tensors), "run", run.bits[0])
    unchanged_after(other, made.manifest, made.parts, ManifestError, "another model's")


def test_wrong_bits_are_named_and_undone() -> None:
    run = Run()
    made = run.step(0.3)
    prints = list(made.manifest.fingerprints)
    prints[3] ^= 1
    wrong = replace(made.manifest, fingerprints=tuple(prints))
    unchanged_after(run.weights(), wrong, made.parts, NotTheseWeights, "run/0/0: head differ from what the manifest proves")
    unchanged_after(run.weights(), made.manifest, [*made.parts[:-1], made.parts[-1][:-1]], WireError, "")
    with pytest.raises(NotTheseWeights):
        anchor(run.weights(), made.manifest)


def test_a_fold_begins_with_a_delta() -> None:
    run = Run()
    run.step()
    whole = anchor(run.weights(0), run.made[0].manifest)
    with pytest.raises(ManifestError, match="an anchor leads there from anywhere"):
        fold(run.weights(), [(whole.manifest, whole.parts)], "steps")


def test_parts_of_other_sizes_in_one_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run may have another sync.bucket_mb."""
    run = Run()
    run.step()
    monkeypatch.setattr(f"{__name__}.PART_BYTES", 1 << 20)
    made: Any = run.step()
    assert len(made.parts) == 1 and len(run.made[0].parts) > 1
    folded = fold(run.weights(), run.steps(0, 1), "steps")
    weights = run.weights()
    weights.apply(folded.manifest, folded.parts)
    assert equal(weights.bits, run.bits[-1])
