"""Which files bring somebody from one version to another, when a whole one is worth its bytes, and which may be deleted. No I/O.

A version exists as a delta from the one before, perhaps as folds (several steps as one) and as an anchor (whole). They are the edges of a
graph whose nodes are versions; the cheapest way is the one of the fewest bytes:

    model directory --12 MB--> 0 --11 MB--> 1 --12 MB--> 2 --11 MB--> 3        deltas
                                 \\-----------28 MB----------/                   a fold 0 -> 3; an anchor leads to its version from anywhere

    plan(held=(0, 0), target=(0, 3))  ->  [fold 0 -> 3]
    plan(held=None,   target=(0, 3))  ->  [anchor 2, delta 3], or [delta 0, fold 3] from the model directory, whichever is cheaper

A step is taken only where the root of what it begins from is the root that is held, so a version of another past is never built upon.
Deleting goes by leases: who reads a plan's files says so, and for how long.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from slime.sync.manifest import ANCHOR, DELTA, MODEL_DIRECTORY, Manifest

Order = tuple[int, int]  # (epoch, number)
Node = tuple[Order, str]  # a version and its root
ANYWHERE: Node = ((-2, -2), "")  # holding nothing: only anchors lead away


class NoWay(ValueError):
    """No chain of what exists leads there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to apply, in order."""

    steps: tuple[Manifest, ...]

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    @property
    def needs(self) -> frozenset[str]:
        """Keys of the manifests whose files it reads."""
        return frozenset(key_of(step) for step in self.steps)


def key_of(manifest: Manifest) -> str:
    """Names a manifest among those of a run."""
    return f"{manifest.kind} {manifest.parent_epoch}/{manifest.parent_number}->{manifest.epoch}/{manifest.number}"


def source_of(manifest: Manifest) -> Node:
    return ANYWHERE if manifest.kind == ANCHOR else (manifest.parent, manifest.parent_root)


def target_of(manifest: Manifest) -> Node:
    return manifest.order, manifest.root


def plan(manifests: Iterable[Manifest], target: Order, held: Node | None = None, model_root: str = "") -> Plan:
    """The cheapest steps to `target`.

    `held` is what is there now ((epoch, number), root), None for nothing. With `model_root`, the root of the model directory, a way may
    also begin there. The plan is empty only where a manifest leads to just what is held: the same number with another root is another
    version. Raises NoWay naming both ends; what is missing between them may have been deleted.
    """
    edges: dict[Node, list[Manifest]] = {}
    exist: set[Node] = {(MODEL_DIRECTORY, model_root)} if model_root else set()
    for manifest in manifests:
        edges.setdefault(source_of(manifest), []).append(manifest)
        exist.add(target_of(manifest))
    starts = [ANYWHERE, *([held] if held else []), *([(MODEL_DIRECTORY, model_root)] if model_root else [])]
    if held is not None and held[0] == target and held in exist:
        return Plan(())
    best: dict[Node, int] = dict.fromkeys(starts, 0)
    came: dict[Node, Manifest] = {}
    queue: list[tuple[int, int, Node]] = [(0, 0, node) for node in starts]
    while queue:
        cost, steps, node = heapq.heappop(queue)
        if node[0] == target and node in exist:
            return Plan(_trace(came, node))
        if cost > best[node]:
            continue
        for manifest in edges.get(node, ()):
            there, total = target_of(manifest), cost + manifest.nbytes
            if there not in best or total < best[there]:
                best[there], came[there] = total, manifest
                heapq.heappush(queue, (total, steps + 1, there))
    begins = "nothing" if held is None else f"{held[0][0]}/{held[0][1]}"
    raise NoWay(f"no files lead from {begins} to {target[0]}/{target[1]}: take a newer version, or an anchor, or load the model directory")


def _trace(came: dict[Node, Manifest], node: Node) -> tuple[Manifest, ...]:
    steps: list[Manifest] = []
    while node in came:
        steps.append(came[node])
        node = source_of(came[node])
    return tuple(reversed(steps))


# --- anchors and folds ------------------------------------------------------------------------------------------------


def anchor_due(manifests: Iterable[Manifest], newest: Order, every: int, anchor_bytes: int) -> bool:
    """Whether `newest` should be written whole: there are `every` versions since the last anchor (or the first version), or their deltas
    have more than half of an anchor's bytes (`anchor_bytes`, an estimate)."""
    known = list(manifests)
    last = max((m.order for m in known if m.kind == ANCHOR and m.order <= newest), default=MODEL_DIRECTORY)
    since = [m for m in known if m.kind == DELTA and last < m.order <= newest]
    return last < newest and (len(since) >= every or 2 * sum(m.nbytes for m in since) > anchor_bytes)


def consecutive(steps: Sequence[Manifest]) -> None:
    """Raises ValueError, naming the first break, unless each step begins where the one before ends."""
    for one, following in pairwise(steps):
        if source_of(following) != target_of(one):
            raise ValueError(f"{following.label} begins from {following.parent_label} (root {following.parent_root}), not from {one.label}")


# --- retention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lease:
    """Somebody reads these files until then."""

    holder: str
    needs: tuple[str, ...]  # key_of the manifests
    expires_s: float  # Unix time by the holder's clock

    def live(self, now_s: float, skew_s: float) -> bool:
        """By our clock, which may be ahead of the holder's by `skew_s`."""
        return now_s <= self.expires_s + skew_s


def lease(holder: str, steps: Plan, now_s: float, ttl_s: float) -> Lease:
    return Lease(holder, tuple(sorted(steps.needs)), now_s + ttl_s)


def deletable(
    manifests: Iterable[Manifest],
    acknowledged: Iterable[Order],
    leases: Iterable[Lease],
    now_s: float,
    keep: int,
    skew_s: float = 300.0,
) -> list[Manifest]:
    """What nobody needs, oldest first.

    `acknowledged`: the version of every live engine. Kept are: the newest `keep` versions; what leads from the last anchor at or before the
    oldest that is kept, or that an engine holds, to the newest; what a live lease names. While there is no such anchor everything is kept,
    since a late joiner then comes from the model directory.
    """
    known = sorted(manifests, key=lambda m: (m.order, m.kind))
    versions = sorted({m.order for m in known})
    if not versions:
        return []
    floor = min([versions[max(0, len(versions) - max(1, keep))], *acknowledged])
    base = max((m.order for m in known if m.kind == ANCHOR and m.order <= floor and _leads_on(m, known)), default=None)
    if base is None:
        return []
    leased = {key for held in leases if held.live(now_s, skew_s) for key in held.needs}
    return [m for m in known if not _needed(m, base) and key_of(m) not in leased]


def _leads_on(anchor: Manifest, known: Sequence[Manifest]) -> bool:
    """Not where a resumed trainer has gone on from before it, or from the model directory."""
    return all(m.parent >= anchor.order for m in known if m.kind == DELTA and m.order > anchor.order)


def _needed(manifest: Manifest, base: Order) -> bool:
    """Whether it leads on from the anchor `base`, or is it. A delta to the anchor's own version, or before, leads nobody on; a fold that
    begins before the anchor still spares an engine that holds its beginning nothing, since no live engine does."""
    if manifest.order == base:
        return manifest.kind == ANCHOR
    return manifest.order > base and (manifest.kind == ANCHOR or manifest.parent >= base)
