import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from slime.checkpoint.origin import PACKAGE, Origin, code_versions, git_commit, origin_of
from slime.config import DataConfig, DataFile, SlimeConfig


def test_what_computes_is_named():
    found = code_versions()
    assert {"slime-rl", "torch", "megatron-core", "ray", "transformers"} <= found.keys() and (PACKAGE / "train.py").is_file()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_what_git_says(tmp_path: Path):
    """On a branch, packed, detached, and in a worktree."""
    folder = tmp_path / "a"
    folder.mkdir()
    assert git_commit(folder) is None
    git(folder, "init", "-q", "-b", "main")
    assert git_commit(folder) is None
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    commit = git(folder, "rev-parse", "HEAD")
    assert git_commit(folder) == commit
    git(folder, "pack-refs", "--all")
    assert not (folder / ".git" / "refs" / "heads" / "main").exists() and git_commit(folder) == commit
    git(folder, "worktree", "add", "-q", str(tmp_path / "b"), "-b", "other")
    assert git_commit(tmp_path / "b") == commit
    git(folder, "checkout", "-q", "--detach")
    assert git_commit(folder) == commit


def test_the_origin_of_a_run_is_its_code_and_its_data(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}")
    cfg = SlimeConfig(data=DataConfig(train=[DataFile(str(tmp_path / "a.jsonl"))]))
    origin = origin_of(cfg)
    assert "torch" in origin.code and [(file.path, file.bytes) for file in origin.data] == [(str(tmp_path / "a.jsonl"), 2)]
    assert Origin.from_dict(json.loads(json.dumps(asdict(origin)))) == origin
    cfg.run.only = "train"
    assert origin_of(cfg).data == []
