"""By the real command: one teacher on a server that slime starts, one on the actor's ranks, each for its own prompts; and PPO's critic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from slime.observe.trace import read_trace
from slime.rollout.dump import read_rollout
from slime.types import Batch
from tests.launch import Launched, launch
from tests.tiny import load_hf_model, make_tiny

pytestmark = pytest.mark.e2e
SERVED, HELD = 0, 1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and two teachers with other weights, and prompts of two sources."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny(folder / "model")
    make_tiny(folder / "served", layers=3, seed=1)
    make_tiny(folder / "held", seed=2)
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1), "source": "odd" if i % 2 else "even"} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(inputs: Path) -> Launched:
    """Samples of up to 20 tokens, so that the served teacher reads some in two chunks, and its cache holds prompts. The critic warms up for
    one update; two optimizer steps a batch."""
    return launched(inputs, "teachers")


def launched(inputs: Path, name: str, *overrides: str) -> Launched:
    return launch(
        inputs,
        name,
        *("run.steps=3", "rollout.sglang.chunked_prefill_size=16", "rollout.dump=true", "algorithm.name=ppo", "algorithm.distill=sampled"),
        *("algorithm.lam=0.95", "critic.lr=1e-2", "critic.warmup_steps=1", "trainer.updates_per_batch=2"),
        *("rollout.prompts_per_step=8", "rollout.max_in_flight=4"),  # one group after the other
        *(f"algorithm.teachers.even.path={inputs}/served", "algorithm.teachers.even.sources=[even]"),
        *(f"algorithm.teachers.odd.path={inputs}/held", "algorithm.teachers.odd.sources=[odd]"),
        *("cluster.roles.teacher/even.devices=1", "cluster.cpus_per_rank=0.5", "cluster.cpus_per_engine=0.5"),
        *overrides,
    )


def logprobs(batch: Batch, model: Path) -> np.ndarray:
    """float64 [T] of every token in its sequence, by transformers; 0 for first tokens."""
    reference, found = load_hf_model(model), np.zeros(len(batch.tokens))
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = torch.tensor(batch.tokens[begin:end], dtype=torch.long)
        with torch.no_grad():
            said = reference(ids[None]).logits[0].double().log_softmax(-1)
        found[begin + 1 : end] = said[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found


def test_a_served_and_a_held_teacher_say_what_their_models_think(run: Launched, inputs: Path) -> None:
    assert run.code == 0, run.out + run.err
    assert run.err == "" and run.offspring.left() == []
    assert (run.run_dir / "logs" / "teacher_even_0.log").stat().st_size > 0
    for step in range(3):
        batch, _ = read_rollout(run.run_dir, step)
        line = run.metrics[step + 1]
        assert batch.teacher is not None and batch.teacher_logprobs is not None
        for position, name, model in ((SERVED, "even", "served"), (HELD, "odd", "held")):
            mine = batch.loss_mask & (batch.teacher == position)[batch.sample_of_token]
            expected = logprobs(batch, inputs / model)
            if position == SERVED:
                np.testing.assert_allclose(batch.teacher_logprobs[mine], expected[mine], atol=1e-4)
            else:
                assert not batch.teacher_logprobs[mine].any(), "its ranks have not spoken yet"
            ahead = (batch.rollout_logprobs - expected)[mine].mean()
            assert mine.any() and line[f"distill/{name}/reverse_kl"] == pytest.approx(ahead, abs=1e-3)
        assert line["rollout/teacher_s"] > 0


def test_a_critic_learns_values_and_warms_up(run: Launched, inputs: Path) -> None:
    _, first, *later = run.metrics
    assert first["value/mean"] == 0 and first["value/explained_variance"] == pytest.approx(0, abs=1e-9)
    assert "train/loss" not in first and first["mismatch/logprob_abs_diff"] < 1e-4 and first["sync/version"] == 1
    for line in later:
        assert line["train/grad_norm"] > 0 and line["critic/grad_norm"] > 0 and line["value/mean"] != 0
        assert line["mismatch/logprob_abs_diff"] < 1e-4 and line["time/critic_s"] > 0
    before, after = load_file(inputs / "model" / "model.safetensors"), load_file(run.run_dir / "hf" / "model.safetensors")
    assert set(before) == set(after), "a critic's head is none of the model's"
    assert any((before[name] != after[name]).any() for name in before)


def groups_read(run: Launched) -> list[int]:
    """How many groups the held teacher has read: while engines generated, and with an update."""
    events = [event for event in read_trace(run.run_dir / "trace.json.gz") if event["ph"] == "X"]
    updates = [event for event in events if event["name"] == "train"]
    counts = [0, 0]
    for event in (event for event in events if event["name"] == "held_teacher"):
        counts[any(update["ts"] <= event["ts"] < update["ts"] + update["dur"] for update in updates)] += event["args"]["groups"]
    return counts


def hf_weights(run: Launched) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.run_dir / "hf").glob("*.safetensors"))}


def groups_of_the_held(run: Launched) -> int:
    batches = [read_rollout(run.run_dir, step)[0] for step in range(3)]
    return sum(np.unique(batch.group[batch.teacher == HELD]).size for batch in batches)


def test_a_held_teacher_reads_while_engines_generate(run: Launched) -> None:
    ahead, with_update = groups_read(run)
    assert ahead + with_update == groups_of_the_held(run) and ahead > with_update


@pytest.mark.slow
def test_a_teacher_that_reads_ahead_gives_the_bits_of_one_that_reads_afterwards(run: Launched, inputs: Path) -> None:
    """With the same rollouts again, from files: there is nothing to be read ahead."""
    afterwards = launched(inputs, "afterwards", "run.only=train", f"run.replay={run.run_dir}", "rollout.dump=false")
    assert afterwards.code == 0, afterwards.out + afterwards.err
    assert groups_read(afterwards) == [0, groups_of_the_held(run)]
    assert hf_weights(afterwards) == hf_weights(run) and hf_weights(run)
    for ours, theirs in zip(afterwards.metrics[1:], run.metrics[1:], strict=True):
        assert [ours.get(name) == theirs.get(name) for name in ("distill/odd/reverse_kl", "advantage/std", "train/grad_norm")] == [True] * 3
