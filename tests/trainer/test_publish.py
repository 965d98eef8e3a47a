"""What the ranks publish: the same bytes, counts and fingerprints for every layout, and exactly the new weights."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file, save_file

from slime.cluster.placement import RolePlacement
from slime.layout import Layout, to_hf
from slime.models.registry import load_map
from slime.sync import diff, fingerprint, own_blocks, records, wire
from slime.sync.diff import Grid, Summary
from slime.sync.manifest import root_of
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.trainer import publish_slices
from slime.trainer.group import TrainerGroup
from slime.types import WeightVersion
from tests.test_layout import layouts
from tests.tiny import make_tiny
from tests.trainer.ranks import KIND, make_batch, make_cfg, weights
from tests.trainer.test_layouts import LAYOUTS

PART_BYTES = 30_000
RUN_ID = "published"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3 bf16": {"family": "qwen3", "tied": True, "vocab": 20_000, "layers": 4, "dtype": "bf16"},  # the embedding has two blocks
    "qwen3 fp32": {"family": "qwen3", "vocab": 77},
    "qwen3_moe bf16": {"family": "qwen3_moe", "vocab": 77, "tied": True, "dtype": "bf16"},
    "qwen3_moe fp32": {"family": "qwen3_moe", "vocab": 77},
    "deepseek_v3 bf16": {"family": "deepseek_v3", "vocab": 77, "dtype": "bf16"},  # routers hold their biases in fp32
}
CASES = [
    ("qwen3 bf16", "TP2"),
    ("qwen3 bf16", "DP2"),
    ("qwen3 bf16", "PP2"),
    ("qwen3 fp32", "TP2"),
    ("qwen3_moe bf16", "EP2"),
    ("deepseek_v3 bf16", "TP2 x EP2 x ETP1"),
]
FURTHER = [
    ("qwen3 fp32", "PP2"),
    ("qwen3_moe bf16", "DP2"),
    ("qwen3_moe fp32", "EP2"),
    ("deepseek_v3 bf16", "EP2"),
    ("deepseek_v3 bf16", "PP2"),
    ("qwen3 bf16", "PP2 x VPP2"),
    ("qwen3 bf16", "CP2"),
    ("qwen3 bf16", "TP2 x PP2"),
    ("qwen3_moe bf16", "PP2"),
    ("qwen3_moe fp32", "ETP2"),
    ("qwen3_moe bf16", "TP2 x EP2 x ETP1"),
    ("deepseek_v3 bf16", "ETP2"),
    ("deepseek_v3 bf16", "DP2"),
]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three model directories a model: one, the same with 1 % other elements, and one with many others, some blocks of it whole."""
    root = tmp_path_factory.mktemp("versions")
    found = {}
    for seed, (name, values) in enumerate(MODELS.items()):
        first = make_tiny(root / name / "0", seed=seed, **values)
        found[name] = [first, altered(first, root / name / "1", [0.01]), altered(first, root / name / "2", [0.01, 0.29, 0.4, 1.0])]
    return found


def altered(model: Path, directory: Path, shares: list[float]) -> Path:
    """A copy in which some elements have other bits: of the n-th tensor's first block, shares[n % len(shares)] of them."""
    shutil.copytree(model, directory)
    g = np.random.default_rng(len(shares))
    tensors = load_file(directory / "model.safetensors")
    for n, tensor in enumerate(tensors.values()):
        bits = tensor.view(-1).view(BITS[tensor.element_size()]).numpy()
        for start in range(0, bits.size, records.BLOCK):
            block = bits[start : start + records.BLOCK]
            changed = g.random(block.size) < shares[(n + start // records.BLOCK) % len(shares)]
            block[changed] ^= g.integers(1, 200, changed.sum()).astype(bits.dtype)  # among them NaNs, subnormals and zeros of both signs
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load_version(trainer: Any, directory: Path) -> None:
    """Other weights through the model's own door."""
    from slime.trainer.model import load_hf

    load_hf([stage.module for stage in trainer.model.stages], trainer.model.map, directory, trainer.parallel)


Publication = tuple[list[tuple[int, bytes]], Summary]


def published(snapshot: Any, trainer: Any, codec: str = "steps") -> Publication:
    """What a rank publishes, without its times."""
    from slime.trainer import publish

    encoded, summary = publish.encode(snapshot, trainer, codec, PART_BYTES, threads=2)
    return encoded, replace(summary, diff_s=0.0, exchange_s=0.0, encode_s=0.0)


def publish_versions(place: Any, cfg: Any, others: list[Path], on_host: bool) -> dict[str, Any]:
    """A history of publications on one rank."""
    from slime.trainer import publish

    trainer = place.trainer(cfg)
    snapshot = publish.take_base(trainer.model, trainer.parallel, RUN_ID, on_host)
    found: dict[str, Any] = {"spec": snapshot.spec, "base": snapshot.fingerprints.tolist(), "nbytes": snapshot.nbytes}
    found["even"] = evenly(trainer, snapshot.spec)
    found["nothing"] = published(snapshot, trainer)
    load_version(trainer, others[0])
    found["few"] = published(snapshot, trainer)
    found["few by exponent"] = published(snapshot, trainer, "exponent")
    found["few, dense"] = published(snapshot, trainer, "dense")
    divided, parts = [], ModelSpec.parts
    with mock.patch.object(ModelSpec, "parts", lambda spec, size: divided.append(size) or parts(spec, size)):
        assert published(snapshot, trainer) == found["few"], "what is not acknowledged is published again"
    assert divided == [PART_BYTES], "the model is divided once, however many parts there are"
    load_version(trainer, others[1])
    found["many"] = published(snapshot, trainer)
    load_version(trainer, others[0])
    assert published(snapshot, trainer) == found["few"]
    publish.acknowledge(snapshot, trainer)
    found["acknowledged"] = published(snapshot, trainer)
    load_version(trainer, others[1])
    found["more"] = published(snapshot, trainer)
    load_version(trainer, others[0])
    assert published(snapshot, trainer) == found["acknowledged"], "there and back is no change"
    found["weights"] = weights(trainer)
    return found


def evenly(trainer: Any, spec: ModelSpec) -> tuple[float, int]:
    """Bytes of this rank's shards, each divided by the ranks that hold the same; and the number of shards."""
    model, parallel = trainer.model, trainer.parallel
    total, shards = 0.0, 0
    for name, tensor in model.tensors():
        expert, layout = model.map.is_expert(name), model.map.layout(name)
        group, copies = (parallel.etp, parallel.expert_dp) if expert else (parallel.tp, parallel.dp_cp)
        if name in model.map.layouts and not (layout.replicated and group.rank()):
            width = spec.tensors[spec.index[layout.sources[0].name]].type.width
            total += (tensor.numel() - layout.padding(group.rank(), group.size())) * width / copies.size()
            shards += 1
    return total, shards


def joined(found: list[dict[str, Any]], name: str) -> tuple[list[bytes], Summary]:
    """A publication's parts in order, from all ranks."""
    parts = sorted(part for of_rank in found for part in of_rank[name][0])
    assert [number for number, _ in parts] == list(range(len(parts)))
    assert len({of_rank[name][1] for of_rank in found}) == 1, "ranks report different summaries"
    return [payload for _, payload in parts], found[0][name][1]


def bits_of(spec: ModelSpec, directory: Path) -> list[np.ndarray]:
    """All tensors of a model directory, flat, in the dtypes of `spec`."""
    tensors = load_file(directory / "model.safetensors")
    return [bits(tensors[t.name].to(getattr(torch, t.dtype))) for t in spec.tensors]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(BITS[tensor.element_size()]).numpy().view(f"<u{tensor.element_size()}")


def decoded(spec: ModelSpec, parts: list[bytes], old: list[np.ndarray]) -> tuple[list[np.ndarray], list[Changes]]:
    """(the new tensors, what changed) of a publication."""
    new, found = [tensor.copy() for tensor in old], []
    for tensors, payload in zip(spec.parts(PART_BYTES), parts, strict=True):
        for changes in wire.decode_part(spec, tensors, payload, lambda tensor: old[tensor]):
            new[changes.tensor][changes.positions] = changes.new
            found.append(changes)
    return new, found


def fingerprints_of(spec: ModelSpec, tensors: list[np.ndarray]) -> list[int]:
    key = fingerprint.run_key(RUN_ID)
    table = fingerprint.table(key)
    return [fingerprint.full(b, fingerprint.tensor_key(key, t.name), table) for t, b in zip(spec.tensors, tensors, strict=True)]


@pytest.fixture(scope="module")
def alone(ranks, versions) -> dict[str, dict[str, Any]]:
    """The publications of one process, by model."""
    found: dict[str, dict[str, Any]] = {}

    def of(model: str) -> dict[str, Any]:
        if model not in found:
            cfg = make_cfg(versions[model][0], MODELS[model].get("dtype", "fp32"))
            found[model] = ranks.run(publish_versions, 1, cfg, versions[model][1:], False)[0]
        return found[model]

    return of


@pytest.mark.e2e
@pytest.mark.parametrize("model", MODELS)
def test_what_is_published_are_the_new_weights(alone, versions, model: str) -> None:
    found, spec = alone(model), alone(model)["spec"]
    first, few, many = (bits_of(spec, directory) for directory in versions[model])
    assert found["base"] == fingerprints_of(spec, first) and found["nbytes"] == spec.nbytes
    for name, old, new in (
        ("nothing", first, first),
        ("few", first, few),
        ("few by exponent", first, few),
        ("few, dense", first, few),
        ("many", first, many),
        ("acknowledged", few, few),
        ("more", few, many),
    ):
        parts, summary = joined([found], name)
        assert len(parts) > 4
        after, changes = decoded(spec, parts, [np.zeros_like(tensor) for tensor in old] if name == "few, dense" else old)
        assert all(np.array_equal(a, b) for a, b in zip(after, new, strict=True)), name
        changed = [int((a != b).sum()) for a, b in zip(old, new, strict=True)]
        assert list(summary.changed) == changed
        assert sum(changed) <= sum(map(len, changes))
        assert summary.complete_blocks or sum(changed) == sum(map(len, changes)), "complete blocks alone list what did not change"
        assert list(summary.fingerprints) == fingerprints_of(spec, new)
        assert summary.parent_root == root_of(fingerprints_of(spec, old))
        assert (summary.complete_blocks > 0) == (name in ("few, dense", "many", "more"))
    assert all(np.array_equal(bits(found["weights"][t.name]), b) for t, b in zip(spec.tensors, few, strict=True))


@pytest.mark.e2e
@pytest.mark.parametrize(("model", "layout"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)])
def test_a_layout_publishes_what_one_process_does(ranks, alone, versions, model: str, layout: str) -> None:
    world, knobs = LAYOUTS[layout]
    cfg = make_cfg(versions[model][0], MODELS[model].get("dtype", "fp32"), **knobs)
    found, expected = ranks.run(publish_versions, world, cfg, versions[model][1:], layout == "DP2"), alone(model)
    assert all(of_rank["spec"] == expected["spec"] and of_rank["base"] == expected["base"] for of_rank in found)
    for name in ("nothing", "few", "few by exponent", "few, dense", "many", "acknowledged", "more"):
        assert joined(found, name) == joined([expected], name), name
    assert all(len(of_rank["few"][0]) >= len(expected["few"][0]) // world for of_rank in found), "every rank encodes its share"
    assert sum(of_rank["nbytes"] for of_rank in found) == expected["spec"].nbytes, "every element is kept once"
    for of_rank in found:
        even, shards = of_rank["even"]
        assert abs(of_rank["nbytes"] - even) <= shards * 4, "a snapshot is as large as the shards divided by the ranks that hold the same"
    assert found[0]["weights"].keys() == expected["weights"].keys()


def publish_steps(place: Any, cfg: Any, batches: list[Any]) -> list[tuple[ModelSpec, Publication, dict[str, torch.Tensor]]]:
    """Train, publish, train twice, publish: publications with the weights after them."""
    from slime.trainer import publish, step

    trainer = place.trainer(cfg)
    snapshot = publish.take_base(trainer.model, trainer.parallel, RUN_ID)
    found = []
    for those in (batches[:1], batches[1:]):
        for batch in those:
            step.train_batch(trainer, batch)
        found.append((snapshot.spec, published(snapshot, trainer), weights(trainer)))
        publish.acknowledge(snapshot, trainer)
    published(snapshot, trainer)
    step.train_batch(trainer, batches[0])
    with pytest.raises(AssertionError, match=r"trained on before they were acknowledged"):
        publish.acknowledge(snapshot, trainer)
    return found


@pytest.mark.e2e
@pytest.mark.parametrize(("layout", "model"), [("TP2", "qwen3 bf16"), ("EP2", "deepseek_v3 bf16")])
def test_optimizer_steps_are_published(ranks, versions, model: str, layout: str) -> None:
    world, knobs = LAYOUTS[layout]
    cfg = make_cfg(versions[model][0], "bf16", lr=1e-5, **knobs)
    found = ranks.run(publish_steps, world, cfg, [make_batch(vocab=77, seed=seed) for seed in range(3)])
    held = bits_of(found[0][0][0], versions[model][0])
    for number in range(2):
        spec, _, expected = found[0][number]
        parts, summary = joined([{"step": of_rank[number][1]} for of_rank in found], "step")
        assert summary.parent_root == root_of(fingerprints_of(spec, held))
        held, _ = decoded(spec, parts, held)
        assert all(np.array_equal(bits(expected[t.name]), b) for t, b in zip(spec.tensors, held, strict=True))
        assert 0 < sum(summary.changed) < sum(t.size for t in spec.tensors)
        assert list(summary.fingerprints) == fingerprints_of(spec, held)


@pytest.fixture(scope="module")
def group(versions) -> Iterator[TrainerGroup]:
    """Two ranks under Ray that share every matrix."""
    ray.init(num_cpus=3, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    bundles = placement_group([{"CPU": 1.0}] * 2)
    assert bundles.wait(30)
    cfg = make_cfg(versions["qwen3 fp32"][0], tensor_parallel=2)
    cfg.sync.snapshot = "host"
    started = TrainerGroup.start(cfg, RolePlacement("actor", bundles, [0, 1], "cpu", 1.0))
    yield started
    started.stop()
    remove_placement_group(bundles)
    ray.shutdown()


@pytest.mark.e2e
@pytest.mark.skipif(KIND == "cuda", reason="its ranks are on the CPU")
def test_the_driver_gets_references_and_digests(group: TrainerGroup, versions, tmp_path: Path) -> None:
    """And a checkpoint that is loaded is a change against the model directory."""
    spec, version = group.spec(), WeightVersion(0, 1, RUN_ID)
    held = bits_of(spec, versions["qwen3 fp32"][0])
    assert group.take_base(RUN_ID) == fingerprints_of(spec, held)
    batch = make_batch(vocab=77)
    saving = group.save(tmp_path / "shards")
    group.update(batch)
    delta = group.delta(version, "steps", PART_BYTES)
    parts = ray.get(delta.parts)
    assert len(parts) == len(spec.parts(PART_BYTES))
    for ref, payload in zip(delta.refs, parts, strict=True):
        ref.check(payload, version.label)
    held, _ = decoded(spec, parts, held)
    trained = dict(tensor for ref in group.weights(version, 1 << 20) for tensor in ray.get(ref))
    assert all(np.array_equal(bits(trained[t.name]), b) for t, b in zip(spec.tensors, held, strict=True))
    group.acknowledge(version)
    assert not any(group.delta(version, "steps", PART_BYTES).summary.changed)
    saving.result(60)
    group.load(tmp_path / "shards")
    back = group.delta(version, "steps", PART_BYTES)
    held, _ = decoded(spec, ray.get(back.parts), held)
    assert all(np.array_equal(a, b) for a, b in zip(held, bits_of(spec, versions["qwen3 fp32"][0]), strict=True))
    assert back.summary.parent_root == root_of(delta.summary.fingerprints)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=layouts())
def test_runs_are_the_moves(monkeypatch: pytest.MonkeyPatch, case: tuple[Layout, int]) -> None:
    """Every element of every piece, against the index algebra."""
    layout, tp = case
    for module in (records, diff, own_blocks, publish_slices):
        monkeypatch.setattr(module, "BLOCK", 7)
    spec = ModelSpec(tuple(TensorSpec(t.name, t.shape, "int16") for t in layout.sources))
    grid = Grid.of(spec)
    for rank in range(tp):
        moves = layout.moves(rank, tp)
        runs = publish_slices.runs_of(moves, spec, grid)
        total = int(np.prod(layout.local_shape(tp))) - layout.padding(rank, tp)
        assert runs.length.sum() == total
        pieces = []
        for start in range(0, total, 5):
            stop = min(start + 5, total)
            clipped = runs.clip(start, stop)
            pieces.append(publish_slices.Piece("x", start, stop, torch.int16, clipped, tuple(np.unique(clipped.tensor).tolist())))
            assert clipped.block.tolist() == [grid.first[t] + s // 7 for t, s in zip(clipped.tensor, clipped.source, strict=True)]
        own = own_blocks.OwnBlocks.of(spec, publish_slices.runs_of_pieces(pieces), "cpu")
        shard = torch.arange(1, total + 1, dtype=torch.int16)
        live = [shard[piece.start : piece.stop] for piece in pieces]
        held = [torch.zeros_like(part) for part in live]
        counts = own.diff.count(live, held)
        assert counts.tolist() == own.held.tolist() and own.whole.tolist() == (own.held == grid.sizes[own.number]).tolist()
        which, where = to_hf(moves, np.arange(total))
        expected = sorted((spec.index[moves[i].hf], w, p + 1) for p, (i, w) in enumerate(zip(which.tolist(), where.tolist(), strict=True)))
        for everything in (False, True):
            found = own.changes(np.arange(len(own.number)), np.full(len(own.number), everything))
            shares = [c for of_tensor in found.values() for c in of_tensor]
            listed = [(c.tensor, w, p) for c in shares for w, p in zip(c.positions.tolist(), c.new.tolist(), strict=True)]
            assert sorted(listed) == expected


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_the_map_names_every_tensor_once(tmp_path: Path, family: str) -> None:
    model_map = load_map(make_tiny(tmp_path, family), "auto", 1)
    names = [t.name for layout in model_map.parameters().values() for t in layout.sources]
    assert len(set(names)) == len(names) and names == list(model_map.hf_shapes)
