"""Who takes part in a weight update, and in which order.

    channel (driver)            publisher (trainer)          receivers (host agents)            each engine of an agent
    publish(number)
      begin(label)       ------------------------------->    begin                              pause, begin session
      weights()          ---->  gathers bucket k+1
      load(bucket k)     ------------------------------->    serialise, keep a host copy        update
      ...
      load(last bucket)  ------------------------------->                                       update with the label
      commit(label)      ------------------------------->    every engine must report label     end session, flush, label?, continue

Buckets reach an engine one after the other; the first one is gathered before the pause. Requests that arrive between pause and continue
wait; those that were running are retracted and computed again (or, before SGLang 0.5.21, cut short). The label is recorded with the last
bucket, so an engine that reports it has loaded them all. Whatever fails, that engine is fenced: it stays paused, and the publication
raises.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import ray

from slime.types import WeightVersion

Bucket = list[tuple[str, Any]]  # (Hugging Face name, torch.Tensor on the CPU)


class Publisher(Protocol):
    """Holds the weights of a version."""

    def weights(self, version: WeightVersion, bucket_bytes: int) -> "Iterator[ray.ObjectRef]":
        """References to `Bucket`s that together hold every tensor once. A bucket is gathered when it is asked for."""
        ...


class Receivers(Protocol):
    """All engines, through their host agents. Every method returns when each engine is done, and raises what any of them raised."""

    def begin(self, label: str, timeout_s: float) -> None:
        """Pause every engine and open its update session."""
        ...

    def load(self, bucket: "ray.ObjectRef", label: str | None, timeout_s: float) -> int:
        """Load a bucket into every engine; `label` comes with the last one. Returns the bytes sent."""
        ...

    def commit(self, label: str, timeout_s: float) -> None:
        """Close the session, flush, prove that every engine reports `label`, continue."""
        ...

    def relabel(self, label: str, timeout_s: float) -> None:
        """Call the weights that the engines loaded themselves `label`."""
        ...
