"""Where every thread of this process is: for a rank that does not answer.

Stacks.now().text       every thread with its frames, innermost last
Stacks.now().waits      "trainer/step.py:210 _gather": the innermost frame of slime of each thread that is inside it
"""

import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

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


def stacks() -> str:
    """Every other thread of this process with its innermost frames, for people."""
    return Stacks.now().text


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
