"""Where a run resumes, before anything is started."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from slime.checkpoint import save
from slime.checkpoint.restore import Restored
from slime.checkpoint.state import DriverState, write_state
from slime.config import DataConfig, DataFile, EvalSet, ModelConfig, RunConfig, SlimeConfig
from slime.config.exits import ConfigError, NothingToDo
from slime.start import claim, next_version, on_disk
from slime.types import WeightVersion


def config(steps: int = 10, resume: str = "auto") -> SlimeConfig:
    return SlimeConfig(run=RunConfig(name="r", steps=steps, resume=resume))


def commit(run_dir: Path, step: int, epoch: int = 0) -> Path:
    folder = save.begin(run_dir, step)
    write_state(folder, DriverState(step, WeightVersion(epoch, step, "abc"), {}, {}, {}, 1.0))
    return save.commit(run_dir, step)


def resume_point(cfg: SlimeConfig, run_dir: Path) -> Restored | None:
    with ExitStack() as stack:
        return claim(cfg, run_dir, stack)


def test_a_fresh_directory_starts_anew(tmp_path: Path):
    assert resume_point(config(), tmp_path / "r") is None
    assert next_version(None).number == 0 and next_version(None).run_id != next_version(None).run_id


def test_auto_resumes_the_newest_whole_iteration_under_a_higher_epoch(tmp_path: Path):
    commit(tmp_path, 3)
    (commit(tmp_path, 6, epoch=2) / "state.json").write_text("torn")
    restored = resume_point(config(), tmp_path)
    assert restored is not None and restored.step == 3
    assert [refused.path.name for refused in restored.refused] == ["iter_0000006"]
    assert next_version(restored) == WeightVersion(1, 3, "abc")


def test_a_path_names_an_iteration_or_a_run(tmp_path: Path):
    path = commit(tmp_path / "old", 3)
    for resume in (path, tmp_path / "old"):
        restored = resume_point(config(resume=str(resume)), tmp_path / "new")
        assert restored is not None and restored.path == path


def test_never_refuses_a_directory_that_holds_a_run(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"run\.resume=never and .* holds a run already; choose another run\.name"):
        resume_point(config(resume="never"), tmp_path)


def test_must_refuses_a_directory_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.resume=must: there is no checkpoint in .*; use run\.resume=auto"):
        resume_point(config(resume="must"), tmp_path)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path):
    commit(tmp_path, 10)
    with pytest.raises(NothingToDo, match=r"has completed 10 updates and run\.steps=10; raise run\.steps"):
        resume_point(config(), tmp_path)


def test_two_drivers_cannot_share_a_directory(tmp_path: Path):
    with ExitStack() as stack:
        claim(config(), tmp_path, stack)
        with pytest.raises(ConfigError, match="belongs to a run that is going on; stop it or choose another"):
            resume_point(config(), tmp_path)
    assert resume_point(config(), tmp_path) is None


def test_paths_become_absolute_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "warm").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    data = DataConfig(train=[DataFile("a.jsonl", 2.0)], eval={"e": EvalSet("e.jsonl", samples=3)})
    found = on_disk(SlimeConfig(model=ModelConfig("warm"), data=data))
    assert found.model.path == str(tmp_path / "model")
    assert found.data.train == [DataFile(str(tmp_path / "a.jsonl"), 2.0)]
    assert found.data.eval == {"e": EvalSet(str(tmp_path / "e.jsonl"), samples=3)}


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match=r"model\.path=no/where/at/all: no such directory, and not a hub id"):
        on_disk(SlimeConfig(model=ModelConfig("no/where/at/all")))
