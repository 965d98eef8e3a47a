"""Killing runs of the real command, at moments that a seed fixes.

    plan = plan_of(seed=7, count=5, calls=40, start_s=20, steps=12)
    finished = survive(inputs, "killed", plan, overrides)          # the same command again after every end of its driver

A `Kill` names a victim and a moment: so many seconds after a line of metrics.jsonl, or after the start or the last kill; or the n-th
request of the driver, in its saves, to make something durable, visible or gone. The latter is counted in the driver itself:
`python -m tests.killing '{"call": n}' ARGUMENTS` is `slime` with that.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.launch import LAUNCH_S, ROOT, Launched, Offspring, arguments

VICTIMS = {  # victim -> what its process is called
    "driver": "",
    "rank": "ray::Rank",
    "engine": "sglang::scheduler",
    "raylet": "/raylet",
    "agent": "ray::EngineActor",
    "manager": "ray::RolloutManager",
    "everything": "",
}
ENDS_THE_DRIVER = ("driver", "everything")
NOTHING_TO_DO = 4  # the command's code where a run has all its updates and its model
GONE_S = 60.0  # for what a dead driver leaves to end


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. `call` counts the driver's requests in saves; `after_s` counts from when metrics.jsonl has `line`, or from the start or
    the last kill."""

    victim: str
    after_s: float = 0.0
    call: int | None = None
    line: int | None = None


def plan_of(seed: int, count: int, calls: int, start_s: float, steps: int) -> list[Kill]:
    """`count` kills, every victim in turn, of the driver every other time in the middle of a save: `calls` are the requests of all saves of
    an undisturbed run of `steps` updates, which takes `start_s` to start. A quarter of the other kills come while it starts, the rest
    beside its updates."""
    rng = random.Random(seed)
    victims, early = list(VICTIMS), 0.25
    rng.shuffle(victims)
    lines = sorted(rng.sample(range(1, steps + 1), count))
    kills = []
    for victim, line in zip((victims[i % len(victims)] for i in range(count)), lines, strict=True):
        after_s = round(rng.uniform(0.0, 1.0), 2)
        if victim == "driver" and seed % 2:
            kills.append(Kill(victim, call=rng.randint(1, calls)))
        elif rng.random() < early:
            kills.append(Kill(victim, after_s=round(rng.uniform(1.0, start_s), 1)))
        else:
            kills.append(Kill(victim, after_s=after_s, line=line))
    return sorted(kills, key=lambda kill: kill.call is None)  # who counts must know from the start


def survive(inputs: Path, name: str, plan: list[Kill], *overrides: str, timeout_s: float = LAUNCH_S) -> tuple[Launched, list[Kill]]:
    """Start the command, kill as planned, start it again where the driver ended, and so on to its end. Returns the run, and those kills
    that found their victim. `timeout_s` is for what follows the last kill."""
    left, done, struck = list(plan), [], False
    process, offspring, log = _start(inputs, name, left[0] if left else None, overrides)
    while left:
        kill = left.pop(0)
        struck = _strike(process, offspring, kill, inputs / "runs" / name / "metrics.jsonl")
        done += [kill] if struck else []
        if process.poll() == 0:
            break  # the run was at its end before
        if process.poll() is not None:
            assert offspring.left(GONE_S) == []
            ended = log.read_text().rpartition("\n--- ")[2][-3000:]  # of this start alone
            explained = "while it started" in ended or _ended_by_ray(done, inputs / "runs" / name, ended)
            assert process.returncode == -signal.SIGKILL or explained, f"it did not start again by itself ({process.returncode}):\n{ended}"
            left = left if struck else [kill, *left]  # an end that an earlier kill has brought
            process, offspring, log = _start(inputs, name, left[0] if left else None, overrides)
            struck = False
    try:
        code = process.wait(timeout_s)
        if code and struck:  # it lost an engine before it had begun: whoever started it starts it again
            assert offspring.left(GONE_S) == []
            process, offspring, log = _start(inputs, name, None, overrides)
            code = process.wait(timeout_s)
        code = 0 if code == NOTHING_TO_DO and done and done[-1].victim in ENDS_THE_DRIVER else code  # it was killed when all was done
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the command did not end in {timeout_s} s after {done}:\n{log.read_text()[-6000:]}") from None
    return Launched(code, log.read_text(), "", inputs / "runs" / name, offspring), done


def _start(inputs: Path, name: str, kill: Kill | None, overrides: tuple[str, ...]) -> tuple[subprocess.Popen, Offspring, Path]:
    """Its output goes to a file beside the run, one for all starts."""
    log = inputs / f"{name}.log"
    command = [
        sys.executable,
        "-m",
        "tests.killing",
        json.dumps(asdict(kill) if kill else {}),
        "train",
        *arguments(inputs, name, *overrides),
    ]
    with log.open("a") as out:
        out.write(f"--- {kill}\n")
        out.flush()
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=inputs, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    return process, Offspring(process), log


def _strike(process: subprocess.Popen, offspring: Offspring, kill: Kill, metrics: Path) -> bool:
    """Wait for the moment and kill; False where the run ended before, or the victim was not there."""
    until = time.monotonic() + (kill.after_s if kill.call is None and kill.line is None else LAUNCH_S)
    waits_for_line = kill.line is not None
    while time.monotonic() < until:
        if waits_for_line and _lines(metrics, offspring.begun_s) > (kill.line or 0):
            waits_for_line, until = False, time.monotonic() + kill.after_s
        if process.poll() is not None:
            return process.returncode == -signal.SIGKILL
        time.sleep(0.02)
    if kill.victim in ENDS_THE_DRIVER:
        pids = [process.pid, *(offspring.alive() if kill.victim == "everything" else ())]
    else:
        pids = [pid for pid, command in offspring.alive().items() if VICTIMS[kill.victim] in command][:1]
    for pid in pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    if kill.victim in ENDS_THE_DRIVER:
        process.wait()
    return bool(pids)


def _ended_by_ray(done: list[Kill], run_dir: Path, ended: str) -> bool:
    """Whether Ray has ended the driver, which was registering with the raylet that was killed last, or using its object store."""
    if not done or done[-1].victim != "raylet":
        return False
    logs = run_dir.glob("logs/ray/*/python-core-driver-*.log")
    return "Failed to register worker to Raylet" in ended or any("Terminate the process" in log.read_text() for log in logs)


def _lines(path: Path, since_s: float) -> int:
    """Lines of a file that was written since then; an earlier process may have left more of them."""
    try:
        return path.read_bytes().count(b"\n") if path.stat().st_mtime > since_s else 0
    except FileNotFoundError:
        return 0


# --- inside the driver ---------------------------------------------------------------------------------------------------------


def count_calls(at: int | None, counted: Callable[[int], None]) -> None:
    """From here on this process is killed before its `at`-th request to make something of a checkpoint durable, visible or gone; `counted`
    is told how many there were."""
    lock, seen = threading.Lock(), [0]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
            if _of_a_checkpoint(target):
                with lock:
                    seen[0] += 1
                    counted(seen[0])
                    if seen[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)
            return function(target, *args, **kwargs)

        return wrapped

    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, wrap(getattr(os, name)))
    shutil.rmtree = wrap(shutil.rmtree)  # type: ignore[assignment]


def _of_a_checkpoint(target: Any) -> bool:
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
    return "/iter_" in str(path) or "latest_checkpointed" in str(path)


def main() -> None:
    kill = json.loads(sys.argv[1])
    sys.argv = ["slime", *sys.argv[2:]]
    counts = os.environ.get("SLIME_TEST_COUNT")
    count_calls(kill.get("call"), lambda n: Path(counts).write_text(str(n)) if counts else None)  # type: ignore[arg-type,return-value]
    from slime.cli.main import main as slime

    slime()


if __name__ == "__main__":
    main()
