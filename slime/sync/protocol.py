"""Who takes part in a weight update, and in which order.

    channel (driver)        publisher (trainer ranks)     receivers (host agents)                each SGLang rank (inserver.py)
    open()
      adopt()         ------------------------------->    read the model directory, ask     ---> learn where each HF element lives,
                                                          for a proof; load it anew if not       hash everything that lives
      take_base()     ----> keep the model directory's
                            bits as snapshot
    publish(number)
      delta()         ----> diff, exchange, encode
      offer()         ------------------------------->    verify, decode, project
      PREPARE         ------------------------------->                                      ---> copy beside the weights, check the base
      COMMIT          ------------------------------->    pause, one call, compare          ---> write in place, hash everything
      RESUME          ------------------------------->    continue
      ACKNOWLEDGE     ----> snapshot := version           host copy := version

The words in capitals are `publication.Do`: a pure state machine says which engine is asked what next. Until ACKNOWLEDGE nothing is lost: a
failure in PREPARE leaves every engine as it was, one in COMMIT is undone on every engine that wrote (or healed, sync.on_mismatch). An
engine that cannot be brought back is fenced: it stays paused and gets no requests. The trainer's snapshot moves only after every engine has
proven the version, so what failed is simply diffed again. An engine that dies on the way leaves the quorum, and the others go on; its host
agent starts it anew and brings it to the host copy, but not before the publication has ended (ACKNOWLEDGE, or give_up()).

With cluster.share=swap no engine has memory when a version is published: after `offer`, in which every host proves that what it decoded is
the trainer's, ACKNOWLEDGE follows at once. An engine that comes back is loaded whole from the host copy and proven; then it gets requests.

With sync.mode=full the agents are offered all tensors, and COMMIT is a load through stock SGLang's own update, with the same proof.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from slime.sync.diff import Delta
from slime.sync.publication import Action
from slime.sync.records import ModelSpec
from slime.types import WeightVersion

Bucket = list[tuple[str, Any]]  # (Hugging Face name, torch.Tensor on the CPU)


@dataclass(frozen=True, slots=True)
class Adoption:
    """What a host agent has to know of a run."""

    run_id: str
    key: bytes = field(repr=False)  # that manifests are signed with
    url: str  # where parts lie that do not come with the manifest


@dataclass(frozen=True, slots=True)
class Answer:
    """How an action ended."""

    action: Action
    failed: str = ""  # why; empty where it succeeded
    write_s: float = 0.0  # of COMMIT: inside the engine
    audit_s: float = 0.0
    staged_bytes: int = 0  # of PREPARE, over all ranks of the engine
    lost: bool = False  # it failed because the engine is gone or answers nothing: it takes part no more


class Publisher(Protocol):
    """Holds the weights of a version."""

    def spec(self) -> ModelSpec:
        """The tensors that travel."""
        ...

    def take_base(self, run_id: str) -> Sequence[int]:
        """Keep the weights as they are, loaded from the model directory, as snapshot; their fingerprints."""
        ...

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        """What has changed since the snapshot."""
        ...

    def acknowledge(self, version: WeightVersion) -> None:
        """The snapshot becomes what `delta` sent last."""
        ...

    def weights(self, version: WeightVersion, bucket_bytes: int) -> "Iterator[ray.ObjectRef]":
        """References to `Bucket`s that together hold every tensor once. A bucket is gathered when it is asked for."""
        ...


class Receivers(Protocol):
    """All engines, through their host agents."""

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        """Learn where the weights live in every engine, and prove that they are the model directory's. Raises what any of them raised."""
        ...

    def engines(self) -> list[str]:
        """Names of the engines that are live."""
        ...

    def offer(self, manifest: str, parts: "Sequence[ray.ObjectRef]", timeout_s: float) -> None:
        """A delta, signed; its parts lie at Adoption.url where none are given. Raises what any agent raised; no engine has seen it then."""
        ...

    def offer_bucket(self, bucket: "ray.ObjectRef", first: bool, timeout_s: float) -> int:
        """A part of a whole version, the `first` or a further one; returns its bytes."""
        ...

    def offer_whole(self, label: str, timeout_s: float) -> None:
        """The buckets since the first are the version `label`."""
        ...

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        """Do these side by side, for the version that was offered; one answer each."""
        ...

    def advance(self, label: str, timeout_s: float) -> None:
        """Host copies become the version, by the next offer at the latest."""
        ...

    def give_up(self, label: str, timeout_s: float) -> None:
        """The version that was offered is not published: hosts go on with what they hold."""
        ...

    def write_anchor(self, manifest: str) -> None:
        """Begin to write the version that the host copies hold whole to Adoption.url; it ends before the next `advance`."""
        ...

    def relabel(self, label: str, timeout_s: float) -> None:
        """Call the weights that the engines loaded themselves `label`."""
        ...
