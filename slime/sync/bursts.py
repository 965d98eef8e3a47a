"""The cores of a host for bursts of work: coding weights, decoding and applying them.

    for found in in_order(decode, parts):        decodes the next parts meanwhile

What Ray reserves for a rank or an engine is what it takes all the time. A burst takes half of the host's cores for a fraction of a second.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def burst(sharers: int = 1) -> int:
    """Threads of each of `sharers` processes of this host that have a burst at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // 2 // sharers)


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """What `work` makes of each item, in the items' order, on `threads` threads (by default those of a burst). At most twice as many
    results wait to be taken. The first failure is raised when its turn comes; what has not begun by then is not done."""
    threads = threads or burst()
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
