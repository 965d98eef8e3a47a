"""Where every thread of this process is, for a rank that does not answer; and every task of an event loop, for a rollout that does not end.

Stacks.now().text       every thread with its frames, innermost last
Stacks.now().waits      "trainer/step.py:210 _gather": the innermost frame of slime of each thread that is inside it
awaits()                "31 tasks in engine/client.py:210 _ask, 1 in rollout/manager.py:163 _fill"
"""

import asyncio
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import CoroutineType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
INNERMOST = 100  # frames of a thread that are shown
AT_REST = "nothing of slime"
STAND_IN = "cpu"  # what lies between torch and its callers there says nothing


@dataclass(frozen=True, slots=True)
class Stacks:
    """A picture of all threads but the one that took it."""

    text: str
    waits: str  # frames of slime, or AT_REST

    @classmethod
    def now(cls) -> "Stacks":
        """Look at this process. Needs the interpreter lock alone: it works while other threads wait in a collective."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = threading.get_ident()
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != own}
        texts = [_shown(names.get(ident, "a thread not of Python"), frame) for ident, frame in frames.items()]
        places = [place for frame in frames.values() if (place := _innermost(frame))]
        return cls("\n".join(texts), " and ".join(places) or AT_REST)


def awaits() -> str:
    """The innermost frames of slime in which the tasks of this thread's event loop wait, by number."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    places = Counter(place for task in tasks if (place := _awaited(task.get_coro())))
    return ", ".join(f"{count} task{'s' if count > 1 else ''} in {place}" for place, count in places.most_common()) or AT_REST


def _awaited(coroutine: Coroutine[Any, Any, Any] | Any) -> str:
    """The innermost frame of slime of what a coroutine awaits; empty where there is none."""
    found = ""
    while isinstance(coroutine, CoroutineType):
        frame = coroutine.cr_frame
        if frame is not None and (path := Path(frame.f_code.co_filename)).is_relative_to(ROOT):
            found = f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        coroutine = coroutine.cr_await
    return found


def _shown(name: str, frame: FrameType) -> str:
    lines = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=INNERMOST)
    lines.reverse()
    return f"thread {name}:\n" + "".join(lines.format())


def _innermost(frame: FrameType | None) -> str:
    """file:line function of the innermost frame of slime, and what of torch.distributed it called; empty where there is none."""
    called = ""
    while frame is not None:
        path, module = Path(frame.f_code.co_filename), frame.f_globals.get("__name__", "")
        if module.startswith("torch.distributed") and not module.endswith("_logger"):
            called = f" (in {frame.f_code.co_name} of {module})"
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != STAND_IN:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}{called}"
        frame = frame.f_back
    return ""
