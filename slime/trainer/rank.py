"""The Ray actor of one device: a thin shell that holds a rank's state and calls the other files of this room.

The driver imports this module to start ranks; torch and megatron-core, slow to import and of no use there, are imported by the methods.
"""

import functools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray

from slime.config import SlimeConfig
from slime.observe.hashed import File
from slime.observe.mismatch import PROBED
from slime.observe.stacks import Stacks
from slime.observe.trace import Span, Tracer
from slime.sync.bursts import in_order
from slime.sync.diff import Summary
from slime.sync.manifest import PartRef
from slime.sync.records import ModelSpec
from slime.types import Batch

if TYPE_CHECKING:
    from slime.trainer import publish
    from slime.trainer.snapshot import Snapshot
    from slime.trainer.state import Trained

EXPORT_BUCKET_BYTES = 64 << 20  # two are alive at once
ACTOR, CRITIC = "actor", "critic"  # what a rank may be, or both
SAVE, WATCH = "save", "watch"  # threads beside the one that trains
TRAINER = "trainer"  # the actor's folder in a checkpoint; the critic's is CRITIC
SAVE_NICE = 19  # the lowest; Ray starts its workers at 15

P = ParamSpec("P")
R = TypeVar("R")


def on_device(method: Callable[Concatenate["Rank", P], R]) -> Callable[Concatenate["Rank", P], R]:
    """Run a method of a rank in the scope of its device, whichever thread calls it. It must have the device's memory."""

    @functools.wraps(method)
    def scoped(self: "Rank", *args: P.args, **kwargs: P.kwargs) -> R:
        assert not self.offload.away, f"{method.__name__}: the engines have the memory of this rank's device"
        with self.device.scope():
            return method(self, *args, **kwargs)

    return scoped


THREADS = {SAVE: 1, WATCH: 1}  # Ray's concurrency groups of a rank


class Rank:
    """One rank of the actor, of its critic or of both; rank 0 is the leader. `build` comes first; from then on every method is called on
    all ranks together, in one order, except where it says otherwise. `values` and `learn` are of ranks with a critic, `load` and those
    that save of all, the others of the actor's. Start it with THREADS."""

    def __init__(self, cfg: SlimeConfig, roles: tuple[str, ...], rank: int, world: int, kind: str, threads: int) -> None:
        self.cfg, self.roles, self.rank, self.world, self.kind, self.threads = cfg, roles, rank, world, kind, threads
        self.tracer = Tracer(f"{'rank' if ACTOR in roles else CRITIC} {rank}")
        self.held: dict[str, Snapshot] = {}  # to be written, by folder
        self.base: list[publish.Snapshot] = []  # what engines have, where the weight channel keeps it here: at most one

    def open_store(self) -> tuple[str, int]:
        """Rank 0 alone: address and port where the ranks meet."""
        from slime.trainer import distributed

        address = ray.util.get_node_ip_address()
        self.store = distributed.open_store(address, self.cfg.cluster.start_timeout_s)
        return address, self.store.port

    def build(self, address: str, port: int) -> None:
        """Meet the other ranks and build the model. Raises ValueError for a model or option that cannot be used, RuntimeError where there
        is no device."""
        from slime.config.parallel import parallel_sizes
        from slime.trainer import device, distributed
        from slime.trainer.build import build_trainer
        from slime.trainer.critic import build_critic
        from slime.trainer.host_buffers import HostBuffers
        from slime.trainer.offload import Offload

        cfg = self.cfg
        self.device = device.set_up(self.kind, self.threads)
        distributed.use_interface_of(ray.util.get_node_ip_address())
        if self.rank > 0:
            self.store = distributed.join_store(address, port, cfg.cluster.start_timeout_s)
        with self.device.scope(), self.tracer.span("build"):
            self.parallel = distributed.join_groups(
                self.device, self.store, self.rank, self.world, parallel_sizes(cfg.trainer), cfg.run.seed, cfg.cluster.step_timeout_s
            )
            self.trained: dict[str, Trained] = {}  # by their folders in a checkpoint
            if ACTOR in self.roles:
                self.trained[TRAINER] = self.trainer = build_trainer(cfg, self.device, self.parallel, self.tracer)
            if CRITIC in self.roles:
                self.trained[CRITIC] = self.critic = build_critic(cfg, self.device, self.parallel, self.tracer)
        self.burst = self.device.burst(distributed.on_this_host(ray.get_runtime_context().get_node_id()))
        self.offload = Offload(pinned=self.device.pinned)
        self.buffers = {folder: HostBuffers(pinned=self.device.pinned) for folder in self.trained}  # of what is held

    @on_device
    def train(self, batch: Batch, values: np.ndarray | None = None, learns: bool = True) -> tuple[dict[str, float], np.ndarray | None]:
        """See `step.train_beside`. Of the leader alone returns for a critic."""
        from slime.trainer import step

        with self.tracer.span("train", samples=len(batch)):
            metrics, returns = step.train_beside(self.trainer, batch, values, learns)
        return metrics, returns if self.parallel.is_leader else None

    @on_device
    def read_ahead(self, *groups: Batch) -> None:
        """See `teaching.read_ahead`."""
        from slime.trainer import teaching

        teaching.read_ahead(self.trainer, groups)

    @on_device
    def values(self, batch: Batch) -> tuple[None, np.ndarray | None]:
        """(None, of the leader alone what `critic.values` gives)."""
        from slime.trainer import critic

        with self.tracer.span(CRITIC, samples=len(batch)):
            found = critic.values(self.critic, batch)
        return None, found if self.parallel.is_leader else None

    @on_device
    def learn(self, batch: Batch, values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
        """See `critic.learn`."""
        from slime.trainer import critic

        with self.tracer.span(CRITIC, samples=len(batch)):
            return critic.learn(self.critic, batch, values, returns)

    @on_device
    def log_probs(self, batch: Batch) -> np.ndarray:
        """See `passes.log_probs`."""
        from slime.trainer import passes

        return passes.log_probs(self.trainer, batch)

    @on_device
    def probe_logprobs(self, batch: Batch) -> np.ndarray:
        """Log-probs of `batch.first(PROBED)`, as SGLang gives them of tokens that are given: at temperature 1, by experts that the model
        chooses. float32, 0 outside loss_mask."""
        from slime.trainer import passes

        return passes.log_probs(self.trainer, replace(batch.first(PROBED), experts=None), temperature=1.0)

    def spans(self) -> list[Span]:
        """What this rank did since the last call. Of one rank alone."""
        return self.tracer.drain()

    @on_device
    def plan_buckets(self, bucket_bytes: int) -> list[list[str]]:
        """The leader alone: the parameters of each bucket of weights."""
        from slime.trainer import export

        model = self.trainer.model
        return export.plan_buckets(model.map, model.config.params_dtype.itemsize, bucket_bytes)

    @on_device
    def gather_bucket(self, names: list[str]) -> "ray.ObjectRef | None":
        """See `export.gather_bucket`; of the leader a reference to the Bucket, which lives as long as it, of the others None."""
        from slime.trainer import export

        with self.tracer.span("gather_weights"):
            bucket = export.gather_bucket(self.trainer.model, self.trainer.atlas, names)
        return ray.put(bucket) if self.parallel.is_leader else None

    def leave(self) -> int:
        """See `Offload.leave`, of all that is trained here; returns the bytes that are free now."""
        with self.device.scope(), self.tracer.span("offload"):
            return self.offload.leave(self.trained.values(), self.base)

    def enter(self) -> None:
        """See `Offload.enter`."""
        with self.device.scope(), self.tracer.span("reload"):
            self.offload.enter()

    def weights_spec(self) -> ModelSpec:
        """The tensors that are published. Of one rank alone; reads none of them."""
        from slime.trainer import publish_slices

        return publish_slices.model_spec(self.trainer.model)

    @on_device
    def take_base(self, run_id: str, on_host: bool) -> list[int]:
        """See `publish.take_base`; returns the fingerprints."""
        from slime.trainer import publish

        with self.tracer.span("take_base"):
            self.base = [publish.take_base(self.trainer.model, self.parallel, run_id, on_host)]
            return self.base[0].fingerprints.tolist()

    @on_device
    def encode(self, codec: str, part_bytes: int) -> "tuple[list[tuple[int, PartRef, ray.ObjectRef]], Summary]":
        """See `publish.encode`. Parts go to the object store of this rank's host."""
        from slime.trainer import publish

        with self.tracer.span("encode"):
            encoded, summary = publish.encode(self.base[0], self.trainer, codec, part_bytes, self.burst)
            refs = in_order(lambda part: PartRef.of(*part), encoded, self.burst)
            return [(number, ref, ray.put(payload)) for (number, payload), ref in zip(encoded, refs, strict=True)], summary

    @on_device
    def acknowledge(self) -> None:
        """See `publish.acknowledge`."""
        from slime.trainer import publish

        publish.acknowledge(self.base[0], self.trainer)

    @on_device
    def export_hf(self, directory: str) -> None:
        """Write a Hugging Face directory."""
        from slime.models.hf_files import HFWriter
        from slime.trainer import export

        model, atlas = self.trainer.model, self.trainer.atlas
        if not self.parallel.is_leader:
            export.write_hf(model, atlas, None, EXPORT_BUCKET_BYTES)
            return
        with HFWriter(directory, self.cfg.model.path, {**model.map.hf_shapes, **model.map.kept_shapes}) as writer:
            export.write_hf(model, atlas, writer, EXPORT_BUCKET_BYTES)

    @on_device
    def hold(self, directory: str) -> int:
        """See `shards.snapshot`, of all that is trained here, each in its folder of `directory`. Returns the bytes that are held until
        `write` has returned. Those before must have been written."""
        from slime.trainer import shards

        assert not self.held, "its memory would be overwritten"
        with self.tracer.span("snapshot"):
            self.held = {
                folder: shards.snapshot(trained, Path(directory) / folder, self.buffers[folder]) for folder, trained in self.trained.items()
            }
            return sum(snapshot.host_bytes for snapshot in self.held.values())

    @ray.method(concurrency_group=SAVE)
    def write(self) -> dict[str, File]:
        """See `Snapshot.write`; files by folder/name. On a thread of its own, while other methods go on; it gives way to them where there
        are few cores."""
        assert self.held, "`hold` comes first"
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SAVE_NICE)
        try:
            with self.tracer.span("save"):
                return {f"{folder}/{name}": file for folder, snapshot in self.held.items() for name, file in snapshot.write().items()}
        finally:
            self.held = {}

    @ray.method(concurrency_group=WATCH)
    def stacks(self) -> Stacks:
        """Where this rank is. Of one rank alone; on a thread of its own, so that it answers while the rank waits."""
        return Stacks.now()

    @on_device
    def load(self, directory: str, folder: str) -> int:
        """See `shards.load`; of one folder of `directory`. Returns the batches that the weights have learned from."""
        from slime.trainer import shards

        with self.tracer.span("load"):
            shards.load(self.trained[folder], Path(directory) / folder)
            return self.trained[folder].version
