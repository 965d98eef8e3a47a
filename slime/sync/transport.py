"""How the parts of a version get from the ranks to the host agents: one interface, three ways.

    ray     objects of Ray: ranks put them, agents get them; nothing stays
    host    files in this host's shared memory, for trainer and engines of one host; the newest version stays
    store   files of a directory or an object store, durable: the run's history, with anchors and retention (store.py, chain.py)

The driver calls `claim` once, then for every version `send` before the engines know of it and `settle` when all have proven it. Agents call
`fetch`. With host and store the bytes pass through the driver, which alone writes what is durable.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import ray

from slime.cluster import deadline
from slime.cluster.shared_folder import PREFIX, SharedFolder, shared_root
from slime.config import SyncConfig
from slime.sync.chain import Order, anchor_due
from slime.sync.history import collect
from slime.sync.manifest import ANCHOR, Manifest, ManifestError
from slime.sync.places import Missing
from slime.sync.records import ModelSpec
from slime.sync.store import Artefact, SplitBrain, WeightStore
from slime.sync.store_fsspec import open_store

log = logging.getLogger(__name__)

MOST_ASKED = 4  # anchors that are looked for; an agent that has not written an older one will not
ANCHOR_RATIO = 0.7  # of the weights' bytes that an anchor takes, about: byte planes of bf16 under zstd


class Transport(Protocol):
    """See the module."""

    def claim(self, epoch: int) -> int:
        """Become the run's one publisher; the epoch to publish in, at least `epoch`. Raises SplitBrain where another is at work."""
        ...

    def send(
        self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec, timeout_s: float | None = None
    ) -> "Sequence[ray.ObjectRef]":
        """Bring a version to where agents `fetch` it, in at most `timeout_s` (by default sync.timeout_s); what they need beside the
        manifest. Raises SplitBrain, TimeoutError, OSError."""
        ...

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        """Every engine holds the version: delete what nobody needs, and have it written whole where that is due. What cannot be deleted
        now is logged and tried again with the next version."""
        ...

    def close(self) -> None:
        """Remove what is of no use after the run."""
        ...


class RayTransport:
    """Objects of Ray."""

    def claim(self, epoch: int) -> int:
        return epoch

    def send(
        self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec, timeout_s: float | None = None
    ) -> "Sequence[ray.ObjectRef]":
        return parts

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        return

    def close(self) -> None:
        return


class StoreTransport:
    """Files. Where `anchors` is False, as in shared memory, the newest version alone is kept, and goes with this process."""

    def __init__(self, cfg: SyncConfig, url: str, run_id: str, key: bytes | None, anchors: bool) -> None:
        """`key` seals what is not a manifest: one that outlives this start, or none."""
        self._cfg, self._url, self._anchors = cfg, url, anchors
        self._place = open_store(url, cfg.timeout_s)
        self._store = WeightStore(self._place, run_id, key)
        self._shared: SharedFolder | None = None
        self._known: list[Manifest] = []
        self._asked: list[Order] = []  # versions that an agent is writing whole
        self._described = False  # whether the model's tensors are there

    def claim(self, epoch: int) -> int:
        if not self._anchors:
            try:
                self._shared = SharedFolder(Path(self._url))
            except FileExistsError as error:
                raise SplitBrain(
                    f"{self._url}: another trainer of this host publishes {self._store.run_id}, or another user's: {error}"
                ) from error
        claimed, _ = self._store.claim(epoch)
        damaged: dict[Artefact, str] = {}
        self._known = list(self._store.manifests(damaged))  # of before a resume, too: nobody else will delete them
        for artefact, why in damaged.items():
            log.warning("%s stays until somebody deletes it: %s", artefact.folder, why)
        return claimed

    def send(
        self, manifest: Manifest, parts: "Sequence[ray.ObjectRef]", spec: ModelSpec, timeout_s: float | None = None
    ) -> "Sequence[ray.ObjectRef]":
        ends = time.monotonic() + (timeout_s or self._cfg.timeout_s)
        payloads = deadline.get(list(parts), ends - time.monotonic(), f"the parts of weights {manifest.label}", "sync.timeout_s")
        with self._place.within(ends - time.monotonic()):
            if not self._described:
                self._store.put_model(spec)
                self._described = True
            self._store.publish(manifest, payloads)
        if manifest not in self._known:  # it is sent again where no engine was left to take it
            self._known.append(manifest)
        return ()

    def settle(self, manifest: Manifest, write_anchor: Callable[[Manifest], None], spec: ModelSpec) -> None:
        if not self._anchors:
            with _housekeeping(manifest):
                while len(self._known) > 1:
                    self._store.remove(self._known[0])
                    del self._known[0]
            return
        self._look_for_anchors()
        if anchor_due(self._known, manifest.order, self._cfg.anchor_every, int(ANCHOR_RATIO * spec.nbytes)):
            write_anchor(manifest)
            self._asked = [*self._asked, manifest.order][-MOST_ASKED:]
        with _housekeeping(manifest):
            gone = collect(self._store, self._known, [manifest.order], time.time(), self._cfg.keep)
            self._known = [held for held in self._known if held not in gone]

    def _look_for_anchors(self) -> None:
        """Those that an agent has finished since, each by its name: a store of many versions takes long to list."""
        asked, self._asked = self._asked, []
        for order in asked:
            try:
                self._known.append(self._store.manifest(Artefact(*order, ANCHOR)))
            except (Missing, OSError):
                self._asked.append(order)
            except ManifestError as error:
                log.warning("an anchor cannot be used: %s", error)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


@contextmanager
def _housekeeping(manifest: Manifest) -> Iterator[None]:
    """A store that is busy, or a lease that cannot be read, costs room and ends no run."""
    try:
        yield
    except (OSError, ValueError) as error:
        log.warning("weights %s: not all that is old could be deleted, the next version tries again: %s", manifest.label, error)


def make(cfg: SyncConfig, weights_dir: Path, run_id: str, key: bytes | None) -> Transport:
    """The transport of a recipe; `weights_dir` is where a store is by default, `key` that of sync.key_env."""
    if cfg.transport == "ray" or cfg.mode == "full":
        return RayTransport()
    return StoreTransport(cfg, url_of(cfg, weights_dir, run_id), run_id, key, anchors=cfg.transport == "store")


def url_of(cfg: SyncConfig, weights_dir: Path, run_id: str) -> str:
    """Where the files of a run are."""
    return str(shared_root() / f"{PREFIX}weights-{run_id}") if cfg.transport == "host" else cfg.url or str(weights_dir)


def fetch(manifest: Manifest, parts: Sequence[bytes], url: str, timeout_s: float) -> Sequence[bytes]:
    """An agent's way to the parts: as they came, or from the files. Raises ManifestError, Missing, OSError."""
    if parts or not manifest.parts:
        return parts
    return WeightStore(open_store(url, timeout_s), manifest.run_id).parts(manifest)
