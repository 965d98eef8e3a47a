"""The weight channel as the driver sees it: publish a version, get it into every engine, or raise."""

import time

from slime.config import SyncConfig
from slime.observe.trace import Span, Tracer
from slime.sync.protocol import Publisher, Receivers
from slime.types import WeightVersion

MIB = 1 << 20


class Channel:
    """Full weights, through stock SGLang's tensor update; see protocol.py for the order of calls."""

    def __init__(self, cfg: SyncConfig, publisher: Publisher | None, receivers: Receivers | None, version: WeightVersion) -> None:
        """`version` gives run id and epoch. Without receivers nothing is published; without a publisher engines keep what they loaded."""
        self._cfg = cfg
        self._publisher = publisher
        self._receivers = receivers
        self._version = version
        self._held: str | None = None  # label that every engine is proven to hold
        self._tracer = Tracer("sync")

    def publish(self, number: int) -> dict[str, float]:
        """Bring every engine to version `number`; returns at once where they hold it. Metrics: sync/*, time/sync_s.

        Raises EngineError, EngineLost or StaleWeights naming the engine, TimeoutError naming sync.timeout_s; the engines then hold no
        version that counts, until a publication succeeds.
        """
        version = WeightVersion(self._version.epoch, number, self._version.run_id)
        if self._receivers is None or self._held == version.label:
            return {}
        self._held = None
        if self._publisher is None:
            self._receivers.relabel(version.label, self._cfg.timeout_s)
            metrics: dict[str, float] = {}
        else:
            metrics = self._send(version, self._publisher, self._receivers)
        self._held = version.label
        return {"sync/version": float(number), **metrics}

    def spans(self) -> list[Span]:
        """What was published since the last call."""
        return self._tracer.drain()

    def _send(self, version: WeightVersion, publisher: Publisher, receivers: Receivers) -> dict[str, float]:
        """All buckets to all engines. The next one is gathered before one is loaded, since the label goes with the last."""
        begun, wire, staged_s = time.perf_counter(), 0, 0.0
        deadline = begun + self._cfg.timeout_s
        with self._tracer.span("gather", version=version.number):
            buckets = publisher.weights(version, self._cfg.bucket_mb * MIB)
            bucket = next(buckets, None)
            assert bucket is not None, "a model has tensors"
        paused = time.perf_counter()
        with self._tracer.span("pause", version=version.number):
            receivers.begin(version.label, self._left(deadline, version))
            while bucket is not None:
                following = next(buckets, None)
                label = version.label if following is None else None
                wire += receivers.load(bucket, label, self._left(deadline, version))
                bucket = following
            loaded = time.perf_counter()
            staged_s = loaded - paused
            receivers.commit(version.label, self._left(deadline, version))
        ended = time.perf_counter()
        return {
            "sync/wire_bytes": float(wire),
            "sync/gather_s": paused - begun,
            "sync/stage_s": staged_s,
            "sync/commit_s": ended - loaded,
            "sync/pause_s": ended - paused,
            "time/sync_s": ended - begun,
        }

    def _left(self, deadline: float, version: WeightVersion) -> float:
        left = deadline - time.perf_counter()
        if left <= 0:
            raise TimeoutError(f"publishing weights {version.label}: not in every engine after {self._cfg.timeout_s:g} s (sync.timeout_s)")
        return left
