"""The whole room with its real neighbours: Ray, a real SGLang server, reward workers."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from slime.cluster.session import connect
from slime.config import DataFile, EvalSet, SlimeConfig
from slime.engine.server import Server
from slime.observe.mismatch import PROBED
from slime.rollout.dump import read_rollout
from slime.rollout.handle import Rollout, RolloutResult
from slime.rollout.replay import Replay
from slime.types import Batch, WeightVersion
from tests.engine import servers
from tests.tiny import load_hf_model, make_tiny

pytestmark = pytest.mark.e2e
LOADED = WeightVersion(0, 0, "run")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollout")


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return make_tiny(root / "model")


@pytest.fixture(scope="module")
def cfg(root: Path, model: Path) -> SlimeConfig:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+{i}="}], "label": str(2 * i), "source": "even" if i % 2 == 0 else "odd"}
        for i in range(24)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = servers.recipe(model)
    cfg.run.deterministic = True
    cfg.data.train = [DataFile(str(root / "prompts.jsonl"))]
    cfg.data.eval = {
        "greedy": EvalSet(str(root / "prompts.jsonl"), limit=6),
        "sampled": EvalSet(
            str(root / "prompts.jsonl"), limit=4, samples=4, temperature=1.0, max_response_tokens=5, reward=f"{__name__}:length"
        ),
    }
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.max_response_tokens = 6, 4, 12
    cfg.rollout.dump = True
    cfg.rollout.start_timeout_s = cfg.sync.timeout_s = 3.0  # how long a request waits for an engine
    cfg.reward.fn = f"{__name__}:is_even"
    cfg.cluster.object_store_mb = 100
    return cfg


async def is_even(sample) -> dict:
    """Something that random weights get right sometimes."""
    return {"score": float(sum(sample.response_ids) % 2 == 0), "characters": len(sample.text)}


def length(sample) -> float:
    return len(sample.response_ids)


@pytest.fixture(scope="module")
def server(cfg: SlimeConfig, root: Path) -> Iterator[Server]:
    """Begins to start; `rollout` waits for it."""
    started = Server(replace(servers.spec(cfg, root / "logs" / "engine_0.log"), label=LOADED.label))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def rollout(cfg: SlimeConfig, root: Path, server: Server) -> Iterator[Rollout]:
    with connect(cfg, root):
        started = Rollout.launch(cfg, root)
        asyncio.run(servers.ready(server, 120))
        started.connect([server.spec.endpoint], servers.VOCAB)
        started.expect(LOADED)
        yield started
        started.stop()


@pytest.fixture(scope="module")
def result(rollout: Rollout) -> RolloutResult:
    return rollout.start(0, 0).result()


@pytest.fixture(scope="module")
def batch(result: RolloutResult) -> Batch:
    return ray.get(result.ref)


def test_a_batch_accounts_for_its_prompts(result: RolloutResult, batch: Batch):
    summary = result.summary
    assert (summary.drawn, summary.trained, summary.dropped) == (6, list(range(6)), {})
    assert batch.group.tolist() == [o for o in range(6) for _ in range(4)]
    assert set(batch.rewards) <= {0.0, 1.0}
    assert batch.version.tolist() == [LOADED.number] * 24
    assert batch.lengths.sum() == len(batch.tokens) == len(batch.loss_mask)


def test_metrics_have_the_names_of_the_design(result: RolloutResult, batch: Batch):
    metrics = result.summary.metrics
    assert metrics["reward/mean"] == pytest.approx(batch.rewards.mean())
    assert metrics["response_len/mean"] == pytest.approx(batch.trained_lengths.mean())
    for name in (
        "reward/std",
        "reward/even/mean",
        "reward/odd/mean",
        "reward/characters",
        "group/zero_std_frac",
        "response_len/truncated_frac",
    ):
        assert name in metrics
    assert metrics["engine/tokens_per_s"] > 0 and 0 <= metrics["engine/cache_hit"] < 1 and metrics["reward/error_frac"] == 0
    assert {(s.process, s.name) for s in result.spans} == {("engine 0", "engine"), ("rollout", "reward")}


def test_rollout_logprobs_are_those_of_the_model(batch: Batch, model: Path):
    """Ids and log-probs of prompt and answer lie where the batch says they do."""
    reference = load_hf_model(model)
    worst = 0.0
    for i in range(len(batch)):
        span = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        tokens, mask = torch.tensor(batch.tokens[span], dtype=torch.long), batch.loss_mask[span]
        with torch.no_grad():
            logprobs = reference(tokens[None]).logits[0].float().log_softmax(-1)
        expected = logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
        worst = max(worst, np.abs(expected - batch.rollout_logprobs[span][1:])[mask[1:]].max())
    assert worst < 1e-4


def test_a_probe_asks_engines_of_given_tokens_what_they_said_when_they_drew_them(rollout: Rollout, result: RolloutResult, batch: Batch):
    """As it compares engines with the trainer one step off; beside a rollout. A shift of the trainer's is seen to the digit."""
    mine = batch.first(PROBED).rollout_logprobs
    pending = rollout.start(3, 6)
    found = rollout.probe(0, result.ref, mine).result()
    assert 0 < found["mismatch/logprob_abs_diff_max"] < 1e-4 and found["mismatch/kl"] < 1e-8
    off = rollout.probe(0, result.ref, mine + np.float32(0.25)).result()
    assert off["mismatch/logprob_abs_diff"] == pytest.approx(0.25, abs=1e-4)
    assert rollout.probe(0, result.ref, mine).result() == found, "the same tokens, the same bits"
    pending.result()


def test_the_same_ordinals_give_the_same_bits(rollout: Rollout, batch: Batch):
    again = ray.get(rollout.start(1, 0).result().ref)
    for name, column in batch.columns().items():
        assert again.columns()[name].tobytes() == column.tobytes(), name


def test_evaluation_beside_a_rollout(rollout: Rollout):
    """In sync mode a rollout begins before the evaluation of the same weights."""
    pending = rollout.start(2, 12)
    (greedy, sampled), spans = rollout.evaluate(0).result()
    assert {s.process for s in spans} == {"engine 0", "rollout"}
    assert greedy.name == "greedy" and 0 <= greedy.metrics["accuracy"] <= 1
    assert "pass_at_k" not in greedy.metrics
    assert 1 <= sampled.metrics["avg_at_k"] <= 5 and sampled.metrics["pass_at_k"] == 1.0 and sampled.metrics["response_len/max"] <= 5
    assert len(greedy.examples) == 6 and {"prompt", "response", "reward", "label", "source"} <= set(greedy.examples[0])
    assert pending.result().summary.trained == list(range(12, 18))
    assert pending.progress() == 6


def test_a_dump_replays(rollout: Rollout, root: Path, batch: Batch):
    dumped, summary = read_rollout(root, 0)
    assert dumped.tokens.tobytes() == batch.tokens.tobytes() and summary.trained == list(range(6))
    replayed = Replay(root).start(0, 100).result()
    assert replayed.summary.trained == list(range(100, 106))
    assert ray.get(replayed.ref).rewards.tobytes() == batch.rewards.tobytes()


def test_an_engine_with_other_weights_is_refused(rollout: Rollout):
    with pytest.raises(RuntimeError, match="engine 0 holds weights run/0/0; expected run/0/7"):
        rollout.expect(WeightVersion(0, 7, "run"))
    rollout.expect(LOADED)


def test_an_engine_that_dies_is_named(rollout: Rollout, server: Server):
    pending = rollout.start(3, 0)
    server.stop()
    with pytest.raises(RuntimeError, match=r"engine 0"):
        pending.result()
