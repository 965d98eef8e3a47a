import json
from pathlib import Path

import numpy as np
import pytest

from slime.rollout.dump import read_rollout, write_rollout
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
