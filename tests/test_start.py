"""What a recipe's paths become before anything is started, and what is written down before anything is published."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime import start
from slime.checkpoint.origin import Origin
from slime.config import CriticConfig, DataConfig, DataFile, EvalSet, ModelConfig, SlimeConfig
from slime.observe.console import Console
from slime.resume import EPOCH
from slime.start import on_disk


def test_paths_become_absolute_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "warm").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    data = DataConfig(train=[DataFile("a.jsonl", 2.0)], eval={"e": EvalSet("e.jsonl", samples=3)})
    found = on_disk(SlimeConfig(model=ModelConfig("warm"), data=data, critic=CriticConfig("warm")))
    assert found.critic.path == str(tmp_path / "model") and on_disk(SlimeConfig(model=ModelConfig("warm"))).critic.path is None
    assert found.model.path == str(tmp_path / "model")
    assert found.data.train == [DataFile(str(tmp_path / "a.jsonl"), 2.0)]
    assert found.data.eval == {"e": EvalSet(str(tmp_path / "e.jsonl"), samples=3)}


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match=r"model\.path=no/where/at/all: no such directory, and not a hub id"):
        on_disk(SlimeConfig(model=ModelConfig("no/where/at/all")))


@pytest.mark.parametrize(
    ("top_p", "algorithm", "only", "said"),
    [
        (0.9, "grpo", "all", True),
        (0.9, "grpo", "train", True),
        (1.0, "grpo", "all", False),
        (0.9, "sft", "all", False),
        (0.9, "grpo", "rollout", False),
    ],
)
def test_a_run_that_trains_on_a_nucleus_says_so(
    caplog: pytest.LogCaptureFixture, top_p: float, algorithm: str, only: str, said: bool
) -> None:
    cfg = SlimeConfig()
    cfg.rollout.top_p, cfg.algorithm.name, cfg.run.only = top_p, algorithm, only
    start.warn_of_nucleus(cfg)
    assert [r.getMessage().partition(":")[0] for r in caplog.records if r.levelname == "WARNING"] == ["rollout.top_p=0.9"] * said


def test_the_epoch_that_a_store_gives_is_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything is published: the channel is open, and no more."""
    before: list[Any] = []

    def open_channel(**_: Any) -> int:
        before.append(json.loads((tmp_path / EPOCH).read_text())["epoch"])
        return 7

    for name in ("check_device", "check_resources", "place", "check_run_dir"):
        monkeypatch.setattr(start, name, lambda *_: None)
    monkeypatch.setattr(start, "start_parts", lambda *_: start.Parts(None, None, SimpleNamespace()))
    monkeypatch.setattr(start, "Channel", lambda *_, **__: SimpleNamespace(open=open_channel, close=lambda: None))
    cluster: Any = SimpleNamespace(device="cpu")
    signal: Any = SimpleNamespace()
    with ExitStack() as stack:
        run = start.build(SlimeConfig(), tmp_path, {}, None, Origin(), cluster, Console(steps=1), signal, stack)
    assert before == [0] and run.version.epoch == 7
    assert json.loads((tmp_path / EPOCH).read_text()) == {"run_id": run.version.run_id, "epoch": 7}
