"""Which directory a run takes and what it goes on from, before anything is started."""

import copy
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from slime.checkpoint import save
from slime.checkpoint.origin import KnownFile, Origin
from slime.checkpoint.restore import Restored
from slime.checkpoint.state import DriverState, write_state
from slime.config import DataConfig, DataFile, RunConfig, SlimeConfig, TrainerConfig
from slime.config.exits import ConfigError, NothingToDo
from slime.observe.account import AccountLog, Settled, read
from slime.observe.summary import Summary, read_summary, write_summary
from slime.resume import (
    EPOCH,
    check_origin,
    check_recipe,
    claim,
    next_version,
    prepare_files,
    take_epoch,
    write_recipe,
)
from slime.types import WeightVersion

RECIPE = asdict(SlimeConfig(run=RunConfig(steps=10), data=DataConfig(train=[DataFile("old/a.jsonl")]), trainer=TrainerConfig(lr=0.1)))
ORIGIN = Origin({"torch": "2.6"}, [KnownFile("old/a.jsonl", 3, "aa")])


def config(steps: int = 10, resume: str = "auto", only: str = "all") -> SlimeConfig:
    return SlimeConfig(run=RunConfig(name="r", steps=steps, resume=resume, only=only))


def commit(run_dir: Path, step: int, epoch: int = 0) -> Path:
    folder = save.begin(run_dir, step)
    write_state(folder, DriverState(step, WeightVersion(epoch, step, "abc"), {}, {}, RECIPE, 1.0, ORIGIN))
    return save.commit(run_dir, step)


def resume_point(cfg: SlimeConfig, run_dir: Path) -> Restored | None:
    with ExitStack() as stack:
        return claim(cfg, run_dir, stack)


def test_a_fresh_directory_starts_anew(tmp_path: Path):
    assert resume_point(config(), tmp_path / "r") is None
    first, second = next_version(None, tmp_path), next_version(None, tmp_path)
    assert first.number == 0 and first.run_id != second.run_id


def test_auto_resumes_the_newest_whole_iteration_under_a_higher_epoch(tmp_path: Path):
    commit(tmp_path, 3)
    (commit(tmp_path, 6, epoch=2) / "state.json").write_text("torn")
    restored = resume_point(config(), tmp_path)
    assert restored is not None and restored.step == 3
    assert [refused.path.name for refused in restored.refused] == ["iter_0000006"]
    assert next_version(restored, tmp_path) == WeightVersion(1, 3, "abc")


def test_no_epoch_is_used_twice(tmp_path: Path):
    """A start that ends before it saves has published all the same; a store may have given it a later epoch."""
    commit(tmp_path, 3, epoch=1)
    restored = resume_point(config(), tmp_path)
    assert [next_version(restored, tmp_path).epoch for _ in range(3)] == [2, 3, 4]
    take_epoch(tmp_path, WeightVersion(7, 3, "abc"))
    assert next_version(restored, tmp_path) == WeightVersion(8, 3, "abc")
    commit(tmp_path, 5, epoch=20)  # saved by a slime that kept no record
    assert next_version(resume_point(config(), tmp_path), tmp_path).epoch == 21


def test_another_run_s_epochs_count_for_nothing(tmp_path: Path):
    take_epoch(tmp_path, WeightVersion(7, 3, "other"))
    commit(tmp_path, 3, epoch=1)
    assert next_version(resume_point(config(), tmp_path), tmp_path) == WeightVersion(2, 3, "abc")
    assert next_version(None, tmp_path).epoch == 0


@pytest.mark.parametrize("text", ["", "7", '{"run_id": "abc"}', '{"run_id": "abc", "epoch": "x"}'])
def test_a_damaged_record_of_epochs_is_named(tmp_path: Path, text: str):
    commit(tmp_path, 3)
    (tmp_path / EPOCH).write_text(text)
    with pytest.raises(ConfigError, match=r"epoch is damaged .* Write \{\"run_id\": \"abc\", \"epoch\": N\} into it"):
        next_version(resume_point(config(), tmp_path), tmp_path)


@pytest.mark.parametrize("named", ["old", "old/iter_0000003"])
def test_a_path_is_where_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str):
    """Relative, of another run that may be going on: it is only read, and left alone once there is a commit of the run's own."""
    path = commit(tmp_path / "old", 3)
    saving = save.begin(tmp_path / "old", 4)
    monkeypatch.chdir(tmp_path)
    restored = resume_point(config(resume=named), tmp_path / "new")
    assert restored is not None and restored.path == path and saving.is_dir()
    begun = next_version(restored, tmp_path / "new")
    assert not (tmp_path / "old" / EPOCH).exists()
    assert (begun.epoch, begun.number) == (0, 3) and begun.run_id != "abc"
    own = commit(tmp_path / "new", 5)
    restored = resume_point(config(resume=named), tmp_path / "new")
    assert restored is not None and restored.path == own


def test_an_older_checkpoint_of_the_run_itself_is_refused(tmp_path: Path):
    older, newest = commit(tmp_path, 3), commit(tmp_path, 6)
    with pytest.raises(ConfigError, match=r"is not the newest checkpoint of this run; begin from it under another run\.name"):
        resume_point(config(resume=str(older)), tmp_path)
    restored = resume_point(config(resume=str(newest)), tmp_path)
    assert restored is not None and restored.step == 6


def test_generating_cannot_go_on_from_a_checkpoint(tmp_path: Path):
    commit(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"run\.only=rollout generates with the weights of model\.path and cannot go on from .*/hf"):
        resume_point(config(only="rollout"), tmp_path)


@pytest.mark.parametrize("held", ["metrics.jsonl", "iter_0000003"])
def test_never_refuses_a_directory_that_holds_a_run(tmp_path: Path, held: str):
    (tmp_path / held).mkdir()
    with pytest.raises(ConfigError, match=r"run\.resume=never and .* holds a run already; choose another run\.name"):
        resume_point(config(resume="never"), tmp_path)


def test_must_refuses_a_directory_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.resume=must: there is no checkpoint in .*; use run\.resume=auto"):
        resume_point(config(resume="must"), tmp_path)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path):
    commit(tmp_path, 10)
    write_summary(tmp_path, Summary("done", 10, 1.0))
    with pytest.raises(NothingToDo, match=r"has completed 10 updates and run\.steps=10; raise run\.steps"):
        resume_point(config(), tmp_path)
    restored = resume_point(config(steps=11), tmp_path)
    assert restored is not None and restored.step == 10


@pytest.mark.parametrize("ended", [None, "failed", "saved"])
def test_a_run_that_was_killed_before_its_export_goes_on_to_it(tmp_path: Path, ended: str | None):
    commit(tmp_path, 10)
    if ended is not None:
        write_summary(tmp_path, Summary(ended, 10, 1.0))
    restored = resume_point(config(), tmp_path)
    assert restored is not None and restored.step == 10


def recipe(**changes: Any) -> dict[str, Any]:
    """RECIPE with other values: group__knob=value."""
    values = copy.deepcopy(RECIPE)
    for name, value in changes.items():
        group, _, knob = name.partition("__")
        values[group][knob] = value
    return values


def resumed(run_dir: Path, **changes: Any) -> None:
    """Go on from a checkpoint of RECIPE with another recipe."""
    commit(run_dir, 3)
    restored = resume_point(config(), run_dir)
    assert restored is not None
    check_recipe(restored, run_dir, recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"run__seed": 1},
            r"iter_0000003 was made with another recipe: run\.seed: 0 -> 1\nPrompts would be repeated and skipped\. Set it back",
        ),
        ({"data__shuffle": False}, r"data\.shuffle: true -> false\nPrompts"),
        ({"data__train": [{"path": "old/a.jsonl", "weight": 2.0, "source": None}]}, r"data\.train: .*\nPrompts"),
        ({"data__train": [RECIPE["data"]["train"][0]] * 2}, r"data\.train: .*\nPrompts"),
        (
            {"trainer__lr": 0.2},
            r"trainer\.lr: 0\.1 -> 0\.2\nSet it back, add run\.accept_changes='\[trainer\.lr\]' to go on all the same, or start .*/hf",
        ),
        (
            {"rollout__temperature": 0.7, "algorithm__clip_low": 0.1},
            r"\n    algorithm\.clip_low: .*\n    rollout\.temperature: .*\nSet them back, .*'\["
            r"algorithm\.clip_low,rollout\.temperature\]'",
        ),
        (
            {"trainer__lr": 0.2, "reward__fn": "math", "run__accept_changes": ["trainer.lr"]},
            r"recipe: reward\.fn: exact -> math\n.*'\[trainer\.lr,reward\.fn\]'",
        ),
        ({"run__steps": 20, "trainer__schedule": "wsd"}, r"run\.steps: 10 -> 20\n    trainer\.schedule"),
        ({"rollout__sglang": {"attention_backend": "x"}}, r"rollout\.sglang\.attention_backend: null -> x"),
        ({"trainer__megatron": {"moe_router_fusion": True}}, r"trainer\.megatron\.moe_router_fusion"),
    ],
)
def test_a_recipe_that_trains_something_else_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        resumed(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"run__steps": 20},
        {
            "run__steps": 20,
            "trainer__schedule": "cosine",
            "trainer__decay_steps": 5,
            "run__accept_changes": ["trainer.schedule", "trainer.decay_steps"],
        },
        {"rollout__engines": 2, "trainer__tensor_parallel": 2, "cluster__device": "cpu", "sync__transport": "host", "run__save_every": 5},
        {"rollout__sglang": {"mem_fraction_static": 0.7}, "trainer__megatron": {"recompute_granularity": "full"}},
        {"data__eval": {"heldout": {"path": "e.jsonl"}}},
        {"trainer__lr": 0.2, "run__accept_changes": ["trainer.lr"]},
        {"rollout__sglang": {"attention_backend": "x"}, "run__accept_changes": ["rollout.sglang"]},
        {"rollout__sglang": {"attention_backend": "x"}, "run__accept_changes": ["rollout.sglang.attention_backend"]},
        {"run__seed": 1, "run__accept_changes": ["run.seed"]},
    ],
)
def test_other_changes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]):
    resumed(tmp_path, **changes)
    told = [name.replace("__", ".") for name in changes if name != "run__accept_changes"]
    assert all(name in caplog.text for name in told) and "run.accept_changes" not in caplog.text


def test_the_same_command_starts_again_and_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A change that was accepted once is in the next checkpoint; files that moved, names and modes of resuming are no changes."""
    moved = [{**RECIPE["data"]["train"][0], "path": "new/b.jsonl"}]
    resumed(tmp_path, data__train=moved, run__name="n", run__resume="must", run__accept_changes=["trainer.lr"])
    assert caplog.text == ""


def test_a_new_run_that_begins_from_another_takes_another_course_but_no_other_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    commit(tmp_path / "old", 3)
    restored = resume_point(config(resume=str(tmp_path / "old")), tmp_path / "new")
    assert restored is not None
    check_recipe(restored, tmp_path / "new", recipe(trainer__lr=0.2))
    assert "iter_0000003 with another recipe: trainer.lr: 0.1 -> 0.2" in caplog.text
    with pytest.raises(ConfigError, match="Prompts would be repeated"):
        check_recipe(restored, tmp_path / "new", recipe(trainer__lr=0.2, run__seed=1))


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (
            KnownFile("new.jsonl", 4, "bb"),
            r"data\.train\.0\.path=new\.jsonl: its content is not that of old/a\.jsonl when .*iter_0000003 was made \(3 bytes then, 4 now",
        ),
        (
            KnownFile("new.jsonl", 3, "bb"),
            r"\(as many bytes, but others\): prompts would be repeated and skipped\. .*run\.accept_changes='\[data\.train\]'",
        ),
    ],
)
def test_a_data_file_of_another_content_is_refused_by_name(tmp_path: Path, now: KnownFile, says: str):
    commit(tmp_path, 3)
    restored, origin = resume_point(config(), tmp_path), replace(ORIGIN, data=[now])
    assert restored is not None
    with pytest.raises(ConfigError, match=says):
        check_origin(restored, config(), origin)
    accepting = config()
    accepting.run.accept_changes = ["data.train"]
    check_origin(restored, accepting, origin)


def test_other_code_is_told_and_data_may_move(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    commit(tmp_path, 3)
    restored = resume_point(config(), tmp_path)
    assert restored is not None
    check_origin(restored, config(), replace(ORIGIN, data=[replace(ORIGIN.data[0], path="moved.jsonl")]))
    check_origin(restored, config(), replace(ORIGIN, data=[]))  # batches are replayed
    assert caplog.text == ""
    check_origin(restored, config(), replace(ORIGIN, code={"torch": "2.7"}))
    assert "iter_0000003 was made with other code: torch 2.6 -> 2.7" in caplog.text


def test_records_are_cut_at_the_resume_point(tmp_path: Path):
    commit(tmp_path, 3)
    write_summary(tmp_path, Summary("saved", 5, 1.0))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "ledger.jsonl").write_text("")
    (tmp_path / "examples.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 3, 4, 5)) + '{"step": 6, "resp')
    prepare_files(tmp_path, resume_point(config(), tmp_path))
    assert (tmp_path / "examples.jsonl").read_text() == '{"step": 0}\n{"step": 3}\n'
    assert read_summary(tmp_path) is None


def test_a_recipe_that_was_followed_so_far_is_kept(tmp_path: Path):
    commit(tmp_path, 3)
    restored = resume_point(config(), tmp_path)
    for text in ("a: 1\n", "a: 1\n", "a: 2\n"):
        write_recipe(tmp_path, text, restored)
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"
    assert (tmp_path / "config_to_0000003.yaml").read_text() == "a: 1\n"


def test_a_run_that_begins_anew_says_what_it_replaces(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    prepare_files(tmp_path, resume_point(config(), tmp_path))
    assert "holds no checkpoint: the run begins anew" in caplog.text and not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_without_the_record_of_its_run_is_refused(tmp_path: Path):
    path = commit(tmp_path / "old", 3)
    restored = resume_point(config(resume=str(path)), tmp_path / "new")
    with pytest.raises(ConfigError, match=r"old/metrics\.jsonl is missing: .* needs the record of its run beside it"):
        prepare_files(tmp_path / "new", restored)


def test_the_account_of_a_run_goes_to_one_that_begins_from_it(tmp_path: Path):
    path = commit(tmp_path / "old", 3)
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    AccountLog(tmp_path / "old" / "ledger.jsonl").append(line := Settled(1, [0, 1], {2: "filter"}))
    prepare_files(tmp_path / "new", resume_point(config(resume=str(path)), tmp_path / "new"))
    assert read(tmp_path / "new" / "ledger.jsonl") == [line]


def test_two_drivers_cannot_share_a_directory(tmp_path: Path):
    with ExitStack() as stack:
        claim(config(), tmp_path, stack)
        with pytest.raises(ConfigError, match="belongs to a run that is going on; stop it or choose another"):
            resume_point(config(), tmp_path)
    assert resume_point(config(), tmp_path) is None
