"""What an engine holds, as a state machine without I/O. Its host agent keeps one `Receiver` for each.

    Stale --adopted--> Holds v --stage w--> Staged v,w --write w--> Written v,w --proof--> (proven) --accept--> Holds w
                         ^  <----------drop----------|                  |
                         |  <-----------------------undo----------------|
    any --died, fence--> Fenced --reload--> Stale <--released-- any

It generates in Holds and Staged, with weights that were proven, and in no other state. `publication.py` says which event is due.
"""

from dataclasses import dataclass

from slime.sync.manifest import MODEL_DIRECTORY, Manifest
from slime.types import WeightVersion


class Refused(ValueError):
    """An engine cannot do what was asked in the state it is in; it changed nothing."""


@dataclass(frozen=True, slots=True)
class Held:
    """Weights, by version and proof. Those of the model directory have (epoch, number) (-1, -1)."""

    version: WeightVersion
    root: str  # of their fingerprints

    @classmethod
    def target(cls, manifest: Manifest) -> "Held":
        return cls(manifest.version, manifest.root)

    @classmethod
    def model_directory(cls, run_id: str, root: str) -> "Held":
        return cls(WeightVersion(*MODEL_DIRECTORY, run_id), root)

    @property
    def order(self) -> tuple[int, int]:
        return self.version.epoch, self.version.number

    @property
    def label(self) -> str:
        return self.version.label


@dataclass(frozen=True, slots=True)
class Stale:
    """It may hold anything."""

    reason: str


@dataclass(frozen=True, slots=True)
class Holds:
    """Proven; it generates."""

    held: Held


@dataclass(frozen=True, slots=True)
class Staged:
    """It generates with `base` and has all that makes it `target`."""

    base: Held
    target: Held


@dataclass(frozen=True, slots=True)
class Written:
    """Paused, with `target` or a part of it; `base` can be restored."""

    base: Held
    target: Held
    proven: bool = False


@dataclass(frozen=True, slots=True)
class Fenced:
    """Paused or dead; it gets no requests."""

    reason: str


EngineState = Stale | Holds | Staged | Written | Fenced


class Receiver:
    """One engine. Every method is an event; where the state does not allow it, it changes nothing and raises Refused naming both sides."""

    def __init__(self, name: str, run_id: str, signature: str) -> None:
        """`name` is the engine's, for errors; `signature` that of the model it serves (ModelSpec.signature)."""
        self.name, self.run_id, self.signature = name, run_id, signature
        self.state: EngineState = Stale("it has just started")

    @property
    def held(self) -> Held | None:
        """What it generates with; None where that is nothing proven."""
        match self.state:
            case Holds(held) | Staged(held, _):
                return held
        return None

    def adopted(self, held: Held) -> None:
        """It was loaded whole and proven to be `held`."""
        if not isinstance(self.state, Stale):
            raise self._refused(f"adopt {held.label}")
        self._check_run(held.version.run_id)
        self.state = Holds(held)

    def stage(self, manifest: Manifest) -> None:
        """It has checked and staged all of `manifest`. Another version that was staged is replaced."""
        self.check(manifest)
        held = self.held
        assert held is not None
        if Held.target(manifest) != held:
            self.state = Staged(held, Held.target(manifest))

    def check(self, manifest: Manifest) -> None:
        """Raises Refused unless `manifest` can be staged. Of the version that it holds already: allowed, and nothing is to be done."""
        self._check_run(manifest.run_id)
        if manifest.signature != self.signature:
            raise Refused(f"{self.name} serves a model of signature {self.signature}, {manifest.label} is of {manifest.signature}")
        held = self.held
        if held is None:
            raise self._refused(f"stage {manifest.label}")
        if Held.target(manifest) == held:
            return
        if manifest.order <= held.order:
            raise Refused(f"{self.name} holds {held.label} (root {held.root}), {manifest.label} (root {manifest.root}) is not newer")
        if manifest.parent != held.order or manifest.parent_root != held.root:
            raise Refused(
                f"{self.name} holds {held.label} (root {held.root}), but {manifest.label} begins from {manifest.parent_label} "
                f"(root {manifest.parent_root}): bring it there first, or load it whole"
            )

    def drop(self) -> None:
        """What was staged is let go."""
        match self.state:
            case Staged(base, _):
                self.state = Holds(base)
            case Holds():
                return
            case _:
                raise self._refused("drop what is staged")

    def write(self, version: WeightVersion) -> None:
        """A commit begins: from here on it may hold a part. Of the version that it holds or has written: allowed, and changes nothing."""
        match self.state:
            case Staged(base, target) if target.version == version:
                self.state = Written(base, target)
            case Holds(held) if held.version == version:
                return
            case Written(_, target) if target.version == version:
                return
            case _:
                raise self._refused(f"commit {version.label}, which is not staged")

    def proof(self, root: str) -> bool:
        """The root of its live weights was found. Returns whether it is the target's; if not, it must be undone, reloaded or fenced."""
        match self.state:
            case Holds(held):
                return root == held.root
            case Written(base, target):
                self.state = Written(base, target, proven=root == target.root)
                return root == target.root
            case _:
                raise self._refused("be proven")

    def accept(self) -> None:
        """Every engine is proven: it goes on."""
        match self.state:
            case Written(_, target, True):
                self.state = Holds(target)
            case Holds():
                return
            case _:
                raise self._refused("go on")

    def undo(self, version: WeightVersion, root: str) -> bool:
        """`version` was undone, if it was written at all, and the live weights have `root`. Where that is not the base's, the engine is
        fenced and False returned."""
        match self.state:
            case Written(base, target) if target.version == version:
                pass
            case Staged(base, _) | Holds(base) if base.version != version:
                pass
            case _:
                raise self._refused(f"undo {version.label}")
        intact = root == base.root
        self.state = Holds(base) if intact else Fenced(f"undoing {version.label} did not restore {base.label}")
        return intact

    def reload(self) -> None:
        """It is about to be loaded whole."""
        self.state = Stale("it is being loaded anew")

    def released(self) -> None:
        """It gives up the memory of its weights: it holds nothing, until it is loaded whole and proven again."""
        self.state = Stale("its memory was released")

    def fence(self, reason: str) -> None:
        self.state = Fenced(reason)

    def died(self) -> None:
        self.state = Fenced("it died")

    def _check_run(self, run_id: str) -> None:
        if run_id != self.run_id:
            raise Refused(f"{self.name} belongs to run {self.run_id}, the weights to run {run_id}: clear the directory they came from")

    def _refused(self, what: str) -> Refused:
        return Refused(f"{self.name} cannot {what}: it is {describe(self.state)}")


def describe(state: EngineState) -> str:
    """A state in words."""
    match state:
        case Stale(reason):
            return f"stale ({reason})"
        case Holds(held):
            return f"at {held.label}"
        case Staged(base, target):
            return f"at {base.label} with {target.label} staged"
        case Written(base, target, proven):
            return f"between {base.label} and {target.label} ({'proven' if proven else 'unproven'})"
        case Fenced(reason):
            return f"fenced ({reason})"
