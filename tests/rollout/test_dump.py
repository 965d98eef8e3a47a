import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from slime.rollout.dump import read_batch, read_rollout, replay_command, write_failed_rewards, write_rollout, write_stopped
from slime.rollout.replay import Replay
from slime.types import Batch, Group, RolloutSummary, Sample, VersionSpan


def groups() -> list[Group]:
    made = []
    for ordinal in (3, 5):
        samples = [
            Sample(
                "p",
                [1, 2],
                ordinal,
                i,
                response_ids=[7] * (i + 1),
                loss_mask=[1] * (i + 1),
                rollout_logprobs=[-0.1 - i] * (i + 1),
                reward=i / 3,
                text="ü",
                weight_versions=[VersionSpan(f"r/0/{ordinal}", 0, i + 1)],
                experts=np.full((2 + i, 3, 2), i, np.int16),
            )
            for i in range(2)
        ]
        made.append(Group(ordinal, samples))
    return made


def test_a_rollout_comes_back_bit_for_bit(tmp_path: Path):
    batch = Batch.from_groups(groups())
    summary = RolloutSummary(2, 3, 3, [3, 5], {4: "filter"}, {"reward/mean": 0.5}, [{"prompt": "p"}])
    write_rollout(tmp_path, batch, summary, groups())
    for folder in (tmp_path, tmp_path / "rollouts"):
        got, account = read_rollout(folder, 2)
        assert account == summary
        assert got.columns().keys() == batch.columns().keys() and "experts" in got.columns()
        for name, before in batch.columns().items():
            after = got.columns()[name]
            assert before.dtype == after.dtype and before.tobytes() == after.tobytes()
            assert np.array_equal(before, after)


def test_samples_can_be_read_by_people(tmp_path: Path):
    write_rollout(tmp_path, Batch.from_groups(groups()), RolloutSummary(0, 2, 3, [3, 5], {}, {}, []), groups())
    lines = (tmp_path / "rollouts" / "step_0000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["group"] for line in lines[1:]] == [3, 3, 5, 5]
    assert "experts" not in json.loads(lines[1])


def test_a_dump_of_another_form(tmp_path: Path):
    """Such as one of before a batch had the column `version`."""
    batch = Batch.from_groups(groups())
    write_rollout(tmp_path, batch, RolloutSummary(0, 2, 3, [3, 5], {}, {}, []), groups())
    columns = {name: column for name, column in batch.columns().items() if name != "version"}
    np.savez(tmp_path / "rollouts" / "step_0000000.npz", **columns)
    with pytest.raises(
        ValueError, match=r"run\.replay=.*the rollout of step 0 is broken or another slime's \(.*version.*\); dump it again"
    ):
        read_rollout(tmp_path, 0)


def test_a_step_that_was_not_dumped(tmp_path: Path):
    with pytest.raises(ValueError, match=r"run\.replay=.*no rollout of step 4 there"):
        read_rollout(tmp_path, 4)


SUMMARY = RolloutSummary(11, 3, 3, [3, 5], {4: "filter"}, {"reward/mean": 0.5}, [])


def test_a_batch_that_stopped_a_run_comes_back_bit_for_bit(tmp_path: Path):
    batch = Batch.from_groups(groups())
    path = write_stopped(tmp_path, 12, batch, SUMMARY, "the loss is nan")
    assert path == tmp_path / "stopped" / "step_0000012.npz"
    assert json.loads(path.with_suffix(".jsonl").read_text())["reason"] == "the loss is nan"
    got, account = read_batch(path, "run.replay")
    assert account == SUMMARY
    assert {n: (c.dtype, c.tobytes()) for n, c in got.columns().items()} == {n: (c.dtype, c.tobytes()) for n, c in batch.columns().items()}


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What is put into the object store."""
    held: list[Batch] = []
    monkeypatch.setattr("slime.rollout.replay.ray.put", held.append)
    return held


def test_a_file_is_the_next_update_wherever_the_run_is(tmp_path: Path, put: list[Batch]):
    """Its prompts take the ordinals that come next, and there is no second batch."""
    replay = Replay(write_stopped(tmp_path, 11, Batch.from_groups(groups()), SUMMARY, "why"))
    assert replay.is_file
    for _ in range(2):
        summary = replay.start(7, first_ordinal=100).result().summary
        assert (summary.step, summary.first_ordinal, summary.trained, summary.dropped) == (7, 100, [100, 102], {101: "filter"})
    assert put[0].tokens.tobytes() == Batch.from_groups(groups()).tokens.tobytes()
    with pytest.raises(ValueError, match=r"run\.replay=.*step_0000011\.npz is one batch, which is update 8; set run\.steps=8"):
        replay.start(8, first_ordinal=103)


def test_a_folder_is_its_batches_step_by_step(tmp_path: Path, put: list[Batch]):
    write_rollout(tmp_path, Batch.from_groups(groups()), SUMMARY, groups())
    replay = Replay(tmp_path)
    assert not replay.is_file and replay.start(11, first_ordinal=3).result().summary == SUMMARY and len(put) == 1
    with pytest.raises(ValueError, match="no rollout of step 12 there"):
        replay.start(12, first_ordinal=6)


def test_a_file_without_its_account_is_named(tmp_path: Path):
    path = write_stopped(tmp_path, 0, Batch.from_groups(groups()), SUMMARY, "why")
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(ValueError, match=r"run\.replay=.*step_0000000\.npz is broken or another slime's"):
        Replay(path).start(0, 0)


def test_the_command_of_a_replay_begins_from_the_last_checkpoint_and_leaves_the_run_alone(tmp_path: Path):
    batch, run_dir = Path("/runs/my run/stopped/step_0000012.npz"), Path("/runs/my run")
    command = replay_command(batch, run_dir, 10)
    assert command.startswith("slime train <the recipe and overrides of this run> ")
    assert shlex.split(command.partition("> ")[2]) == [
        *("run.name=my run-replay", "run.only=train", f"run.replay={batch}", f"run.resume={run_dir}", "run.steps=11")
    ]
    assert "run.resume" not in replay_command(batch, run_dir, None) and "run.steps=1" in replay_command(batch, run_dir, None)


def test_samples_whose_rewards_failed_come_first(tmp_path: Path):
    samples = [s for g in groups() for s in g.samples]
    samples[2].reward, samples[2].reward_error = None, "KeyError: 'x'"
    path = write_failed_rewards(tmp_path, 12, samples)
    assert path == tmp_path / "stopped" / "step_0000012_rewards.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reward_error"] for line in lines] == ["KeyError: 'x'", None, None, None]
    assert [(line["group"], line["index"]) for line in lines] == [(5, 0), (3, 0), (3, 1), (5, 1)]
