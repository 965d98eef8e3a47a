"""How the parts of a version get from the ranks to the host agents: one interface, three ways.

    ray     objects of Ray: ranks put them, agents get them; nothing stays
    host    files in this host's shared memory, for trainer and engines of one host; the newest version stays
    store   files of a directory or an object store, durable: the run's history, with anchors and retention (store.py, chain.py)

The driver calls `claim` once, then for every version `send` before the engines know of it and `settle` when all have proven it. Agents call
`fetch`. With host and store the bytes pass through the driver, which alone writes what is durable.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import ray

from slime.cluster import deadline
from slime.config import SyncConfig
from slime.sync.chain import anchor_due, deletable
from slime.sync.manifest import ANCHOR, Manifest
from slime.sync.records import ModelSpec
from slime.sync.store import WeightStore
from slime.sync.store_fsspec import open_store

SHARED_MEMORY = Path("/dev/shm")
ANCHOR_RATIO = 0.7  # of the weights' bytes that an anchor takes, about: byte planes of bf16 under zstd


class Transport(Protocol):
    """See the module."""

    def claim(self, epoch: int) -> int:
        """Become the run's one publisher; the epoch to publish in, at least `epoch`. Raises SplitBrain where another is at work."""
        ...

    def send(self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec) -> "Sequence[ray.ObjectRef]":
        """Bring a version to where agents `fetch` it; what they need beside the manifest. Raises SplitBrain, OSError."""
        ...

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        """Every engine holds the version: delete what nobody needs, and have it written whole where that is due."""
        ...

    def close(self) -> None:
        """Remove what is of no use after the run."""
        ...


class RayTransport:
    """Objects of Ray."""

    def claim(self, epoch: int) -> int:
        return epoch

    def send(self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec) -> "Sequence[ray.ObjectRef]":
        return parts

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        return

    def close(self) -> None:
        return


class StoreTransport:
    """Files. Where `anchors` is False, as in shared memory, the newest version alone is kept."""

    def __init__(self, cfg: SyncConfig, url: str, run_id: str, key: bytes | None, anchors: bool) -> None:
        """`key` seals what is not a manifest: one that outlives this start, or none."""
        self._cfg, self._url, self._anchors = cfg, url, anchors
        self._store = WeightStore(open_store(url, cfg.timeout_s), run_id, key)
        self._known: list[Manifest] = []
        self._described = False  # whether the model's tensors are there

    def claim(self, epoch: int) -> int:
        claimed, _ = self._store.claim(epoch)
        self._known = list(self._store.manifests())  # of before a resume, too: nobody else will delete them
        return claimed

    def send(self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec) -> "Sequence[ray.ObjectRef]":
        if not self._described:
            self._store.put_model(spec)
            self._described = True
        payloads = deadline.get(list(parts), self._cfg.timeout_s, f"the parts of weights {manifest.label}", "sync.timeout_s")
        self._store.publish(manifest, payloads)
        self._known.append(manifest)
        return ()

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        if not self._anchors:
            for old in self._known[:-1]:
                self._store.remove(old)
            self._known = self._known[-1:]
            return
        self._known += self._new_anchors()
        if anchor_due(self._known, manifest.order, self._cfg.anchor_every, int(ANCHOR_RATIO * spec.nbytes)):
            write_anchor(manifest)
        for old in deletable(self._known, [manifest.order], self._store.leases(), time.time(), self._cfg.keep):
            self._store.remove(old)
            self._known.remove(old)

    def _new_anchors(self) -> list[Manifest]:
        """Those that an agent has finished since."""
        known = {found.order for found in self._known if found.kind == ANCHOR}
        anchors = [found for found in self._store.artefacts() if found.kind == ANCHOR and (found.epoch, found.number) not in known]
        return [self._store.manifest(found) for found in anchors]

    def close(self) -> None:
        if not self._anchors:
            shutil.rmtree(self._url, ignore_errors=True)


def make(cfg: SyncConfig, weights_dir: Path, run_id: str, key: bytes | None) -> Transport:
    """The transport of a recipe; `weights_dir` is where a store is by default, `key` that of sync.key_env."""
    if cfg.transport == "ray" or cfg.mode == "full":
        return RayTransport()
    return StoreTransport(cfg, url_of(cfg, weights_dir, run_id), run_id, key, anchors=cfg.transport == "store")


def url_of(cfg: SyncConfig, weights_dir: Path, run_id: str) -> str:
    """Where the files of a run are."""
    return str(SHARED_MEMORY / f"slime-weights-{run_id}") if cfg.transport == "host" else cfg.url or str(weights_dir)


def fetch(manifest: Manifest, parts: Sequence[bytes], url: str, timeout_s: float) -> Sequence[bytes]:
    """An agent's way to the parts: as they came, or from the files. Raises ManifestError, Missing, OSError."""
    if parts or not manifest.parts:
        return parts
    return WeightStore(open_store(url, timeout_s), manifest.run_id).parts(manifest)
