"""Where the ranks are when they do not answer: asked beside what they wait in, and kept in the run's logs."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from slime.observe.files import write_atomic
from slime.observe.stacks import Stacks

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # a rank that does not answer within this is stopped, or its interpreter is stuck


def where(ranks: list[Any], what: str, logs: Path) -> str:
    """Ask every rank for its stacks. Writes logs/stacks-<what>-<time>.txt and returns "rank 0 waits in trainer/step.py:210 _sum; ...".

    `ranks` are Ray handles of `Rank`; `what` completes "waiting for ...".
    """
    asked = [rank.stacks.remote() for rank in ranks]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    answers = [_answer(ref) if ref in ready else None for ref in asked]
    waits = [f"rank {rank} {f'waits in {seen.waits}' if seen else 'does not answer'}" for rank, seen in enumerate(answers)]
    texts = [f"=== rank {rank}\n\n{seen.text if seen else 'no answer'}\n" for rank, seen in enumerate(answers)]
    path = logs / f"stacks-{re.sub(r'[^a-z0-9]+', '-', what.lower())[:60].strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        write_atomic(path, f"waiting for {what}\n{'; '.join(waits)}\n\n" + "\n".join(texts))
    except OSError as error:  # what the ranks wait for may be this disk
        log.error("the stacks of the ranks could not be written to %s (%s):\n%s", path, error, "\n".join(texts))
    return f"{'; '.join(waits)} (all stacks in {path})"


def _answer(ref: "ray.ObjectRef") -> Stacks | None:
    try:
        return ray.get(ref, timeout=0)
    except RayError:  # its process has ended
        return None
