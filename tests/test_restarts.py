"""When a run starts again by itself, and when it does not."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime import restarts
from slime.checkpoint import save
from slime.cluster.deadline import ProcessLost
from slime.cluster.signals import StopSignal
from slime.config import RunConfig, SlimeConfig
from slime.config.exits import ConfigError, GateStopped, PreflightError, SavedRunAgain
from slime.engine.errors import EngineLost
from slime.restarts import Attempts, Budget


def test_a_budget_counts_losses_without_progress_and_waits_longer_each_time() -> None:
    budget = Budget(allowed=3)
    assert [budget.lost(newest=-1) for _ in range(4)] == [2.0, 4.0, 8.0, None]
    assert [budget.lost(newest=10) for _ in range(4)] == [2.0, 4.0, 8.0, None]
    assert budget.lost(newest=20) == 2.0
    assert Budget(allowed=0).lost(newest=5) is None
    assert max(filter(None, (Budget(allowed=30, used=used).lost(-1) for used in range(30)))) == restarts.LONGEST_PAUSE_S


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)


def run_through(tmp_path: Path, act: Callable[[int], None], resume: str = "auto", began: bool = True) -> list[str]:
    """`act` in every attempt; returns the run.resume of each."""
    cfg = SlimeConfig(run=RunConfig(name="r", dir=str(tmp_path), resume=resume, max_restarts=2))
    seen: list[str] = []
    try:
        for attempt in Attempts(cfg, StopSignal(60.0)):
            with attempt:
                seen.append(attempt.cfg.run.resume)
                if began:
                    attempt.began(None)
                act(len(seen))
    except BaseException as error:
        error.add_note(f"{len(seen)} attempts")
        raise
    return seen


def losing(times: int, *losses: Exception) -> Callable[[int], None]:
    def act(attempt: int) -> None:
        if attempt <= times:
            raise losses[attempt % len(losses)]

    return act


@pytest.mark.usefixtures("no_pause")
def test_losses_are_survived(tmp_path: Path) -> None:
    losses = ProcessLost("a rank died"), EngineLost("all retired"), TimeoutError("waiting for the update")
    assert run_through(tmp_path, losing(2, *losses)) == ["auto"] * 3
    assert run_through(tmp_path, losing(0, *losses)) == ["auto"]
    assert run_through(tmp_path, losing(1, *losses), resume="never") == ["never", "auto"]
    assert run_through(tmp_path, losing(1, *losses), resume="must") == ["must", "must"]


@pytest.mark.usefixtures("no_pause")
def test_too_many_losses_without_a_new_checkpoint_are_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ProcessLost, match="a rank died") as raised:
        run_through(tmp_path, losing(9, ProcessLost("a rank died")))
    assert raised.value.__notes__ == ["3 attempts"]
    assert "restart 2 of 2" in caplog.text and "given up after 2 restarts without a new checkpoint" in caplog.text

    def act(attempt: int) -> None:
        (tmp_path / "r" / save.iteration(tmp_path, attempt).name).mkdir(parents=True)
        if attempt < 6:
            raise ProcessLost("a rank died")

    assert len(run_through(tmp_path, act)) == 6


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("error", [ConfigError("no"), GateStopped("no"), OSError(28, "full"), RuntimeError("a reward"), SavedRunAgain("s")])
def test_what_another_attempt_cannot_mend_is_raised(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        run_through(tmp_path, losing(1, error))
    assert raised.value.__notes__ == ["1 attempts"]


@pytest.mark.usefixtures("no_pause")
def test_a_first_start_that_fails_is_not_tried_again_and_a_later_one_is(tmp_path: Path) -> None:
    """Unless a process was lost. A host that was lost may take a while to come back."""
    assert run_through(tmp_path, losing(1, ProcessLost("died")), began=False) == ["auto"] * 2
    for error in (EngineLost("all retired"), TimeoutError("the engines"), PreflightError("no GPU")):
        with pytest.raises(type(error)):
            run_through(tmp_path, losing(1, error), began=False)
    cfg = SlimeConfig(run=RunConfig(name="r", dir=str(tmp_path), max_restarts=2))
    seen = 0
    for attempt in Attempts(cfg, StopSignal(60.0)):
        with attempt:
            seen += 1
            if seen == 1:
                attempt.began(None)
                raise ProcessLost("a host is gone")
            if seen == 2:
                raise PreflightError("1 CPU and 2 are asked for")
    assert seen == 3


@pytest.mark.parametrize("saved", [True, False])
def test_a_stop_signal_during_the_pause_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 30.0)
    cfg = SlimeConfig(run=RunConfig(name="r", dir=str(tmp_path)))
    if saved:
        save.iteration(tmp_path / "r", 4).mkdir(parents=True)
    signal = StopSignal(60.0)
    threading.Timer(0.3, lambda: setattr(signal, "received", "SIGTERM")).start()
    expected: type[Exception] = SavedRunAgain if saved else ProcessLost
    with pytest.raises(expected, match="stopped by SIGTERM while it was about to start again; it goes on from step 4" if saved else "died"):
        for attempt in Attempts(replace(cfg), signal):
            with attempt:
                attempt.began(None)
                raise ProcessLost("a rank died")


@pytest.mark.usefixtures("no_pause")
def test_another_attempt_begins_where_the_first_did(tmp_path: Path) -> None:
    """A run that goes on elsewhere, from which this one begins, has other checkpoints by then."""
    cfg = SlimeConfig(run=RunConfig(name="r", dir=str(tmp_path), resume="runs/other", max_restarts=2))
    seen: list[str] = []
    for attempt in Attempts(cfg, StopSignal(60.0)):
        with attempt:
            seen.append(attempt.cfg.run.resume)
            attempt.began(Path("/runs/other/iter_0000040"))
            if len(seen) < 3:
                raise ProcessLost("a rank died")
    assert seen == ["runs/other", "/runs/other/iter_0000040", "/runs/other/iter_0000040"]
    for own in (tmp_path / "r", tmp_path / "r" / "iter_0000004"):
        assert run_through(tmp_path, losing(1, ProcessLost("died")), resume=str(own)) == [str(own), "auto"]
    for began in (True, False):
        assert run_through(tmp_path, losing(1, ProcessLost("died")), resume="runs/other", began=began) == ["runs/other"] * 2


def test_a_stop_that_ends_the_ranks_first_is_a_stop(tmp_path: Path) -> None:
    cfg = SlimeConfig(run=RunConfig(name="r", dir=str(tmp_path), max_restarts=0))
    save.iteration(tmp_path / "r", 4).mkdir(parents=True)
    signal = StopSignal(60.0)
    with pytest.raises(SavedRunAgain, match="stopped by SIGTERM, and lost something meanwhile; the run goes on from step 4"):
        for attempt in Attempts(cfg, signal):
            with attempt:
                attempt.began(None)
                signal.received = "SIGTERM"
                raise ProcessLost("a rank died")
