"""Routing replay between a real server and a trainer: a mixture of experts agrees with its engine as well as a dense model does."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slime.engine.client import EngineClient
from slime.engine.server import Server
from slime.models.map import Routing
from slime.models.registry import load_map
from slime.rollout.generate import append_answer
from slime.types import Batch, Group, Sample, VersionSpan
from tests.engine import servers
from tests.tiny import make_tiny
from tests.trainer.ranks import make_cfg

pytestmark = pytest.mark.e2e
MODELS = {"dense": ("qwen3", {}), "experts": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4})}


def sampled(server: Server, routing: Routing | None, samples: int = 32) -> Batch:
    """Answers of 50 tokens."""
    numbers = np.random.default_rng(0)

    async def one(client: EngineClient, number: int) -> Group:
        sample = Sample("", numbers.integers(1, servers.VOCAB, 10).tolist(), number, reward=0.0)
        append_answer(sample, await client.generate(sample.prompt_ids, servers.Endless(max_new_tokens=50), routing=routing))
        sample.weight_versions = [VersionSpan("run/0/0", 0, 50)]  # the server's own label is no version of a run
        return Group(number, [sample])

    async def together() -> list[Group]:
        async with EngineClient([server.spec.endpoint], vocab_size=servers.VOCAB, timeout_s=60, max_in_flight=100) as client:
            await client.expect(servers.LOADED)
            return list(await asyncio.gather(*(one(client, number) for number in range(samples))))

    return Batch.from_groups(asyncio.run(together()))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Batch]]]:
    """By kind of model: its directory, and what its engine drew in bf16."""
    found = {}
    for kind, (family, config) in MODELS.items():
        root = tmp_path_factory.mktemp(kind)
        model = make_tiny(root / "model", family, dtype="bf16", seed=1, **config)
        cfg = servers.recipe(model)
        cfg.model.dtype = "bf16"
        server = servers.start(cfg, root / "server.log")
        try:
            found[kind] = (model, sampled(server, load_map(model).routing))
        finally:
            server.stop()
    return found


def train(place, cfg, batch):
    from slime.trainer import step

    return step.train_batch(place.trainer(cfg), batch)


def mismatch(ranks, model: Path, batch: Batch, dtype: str = "bf16", **trainer) -> dict[str, float]:
    """The metrics of one update."""
    world = 2 if trainer else 1
    return ranks.run(train, world, make_cfg(model, dtype, **trainer), batch)[0]


def test_replay_brings_experts_to_the_mismatch_of_a_dense_model(ranks, drawn, record_property) -> None:
    dense = mismatch(ranks, *drawn["dense"])
    assert "mismatch/experts_changed_frac" not in dense and "mismatch/logprob_abs_diff_without_replay" not in dense
    model, batch = drawn["experts"]
    replayed = mismatch(ranks, model, batch)
    own = mismatch(ranks, model, replace(batch, experts=None))
    for name, found in (("dense", dense), ("replayed", replayed), ("own", own)):
        record_property(name, (found["mismatch/logprob_abs_diff"], found["mismatch/logprob_abs_diff_max"]))
    assert replayed["mismatch/logprob_abs_diff"] <= 1.2 * dense["mismatch/logprob_abs_diff"]
    assert replayed["mismatch/logprob_abs_diff_max"] <= 2 * dense["mismatch/logprob_abs_diff_max"]
    assert own["mismatch/logprob_abs_diff_max"] > 5 * replayed["mismatch/logprob_abs_diff_max"]
    assert replayed["mismatch/logprob_abs_diff_without_replay"] == own["mismatch/logprob_abs_diff"] > replayed["mismatch/logprob_abs_diff"]
    assert 0 < replayed["mismatch/experts_changed_frac"] < 0.05 and "mismatch/experts_changed_frac" not in own


@pytest.mark.slow
def test_layouts_count_the_same_changes(ranks, drawn) -> None:
    model, batch = drawn["experts"]
    alone = mismatch(ranks, model, batch, "fp32")["mismatch/experts_changed_frac"]
    assert alone > 0
    for layout in ({"expert_parallel": 2}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}):
        assert mismatch(ranks, model, batch, "fp32", **layout)["mismatch/experts_changed_frac"] == pytest.approx(alone, abs=6e-4), layout


def test_recorded_experts_of_another_model_are_refused(ranks, drawn) -> None:
    model, batch = drawn["experts"]
    wrong = np.where(batch.experts == 15, 16, batch.experts).astype(np.int16)
    with pytest.raises(AssertionError, match=r"experts up to 16 of \(2, 4\) layers and choices, the model has \(2, 4\) of 16: replay"):
        mismatch(ranks, model, replace(batch, experts=wrong))
