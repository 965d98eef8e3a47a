"""What readers and the publisher of a `WeightStore` do beside one another: a reader takes a lease on what it will read, the publisher
deletes what nobody needs.

    reader     plan, lease, look again: all still there?  --no-->  plan anew, from what is left
    publisher  lists leases, then deletes, each manifest before its parts

A publisher that listed leases before the reader's showed may delete after the reader looked: then a part is Missing when it is read, and
`join` has to be called again. That lease is seen by every later listing.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

from slime.sync.chain import Node, NoWay, Order, Plan, deletable, lease, plan
from slime.sync.manifest import KINDS, Manifest
from slime.sync.places import Busy, Missing
from slime.sync.store import Artefact, WeightStore

log = logging.getLogger(__name__)

TRIES = 5
TTL_S = 3600.0  # of the lease of a reader that is killed


def join(
    weights: WeightStore,
    holder: str,
    target: Order,
    now_s: float,
    held: Node | None = None,
    model_root: str = "",
    ttl_s: float = TTL_S,
    kinds: Collection[str] = KINDS,
) -> Plan:
    """The cheapest steps of these kinds to `target`, leased in the name of `holder` (a word, such as its host) for `ttl_s`. Drop the lease
    when they are applied. See chain.plan for the rest. What is damaged leads nowhere. Raises NoWay."""
    listed: list[Artefact] = []
    for _ in range(TRIES):
        before, listed = listed, weights.artefacts()
        try:
            steps = plan(_of(weights, kinds), target, held, model_root)
        except NoWay:
            if listed == before:
                raise
            continue  # an anchor may have come while what it replaces went
        _take(weights, holder, steps, now_s, ttl_s)
        if _there(weights, steps.steps):
            return steps
    weights.drop_lease(holder)
    raise NoWay(
        f"{target[0]}/{target[1]} of {weights.run_id}: what leads there was deleted {TRIES} times while {holder} looked; take a newer one"
    )


@contextmanager
def reading(
    weights: WeightStore,
    holder: str | None,
    target: Order,
    held: Node | None = None,
    model_root: str = "",
    kinds: Collection[str] = KINDS,
) -> "Iterator[Iterator[tuple[Manifest, list[bytes]]]]":
    """What `join` finds, each step with its parts, read one after the other; the lease holds until the block ends. With `holder` None none
    is taken. Raises as `join`, and Missing or ManifestError for a part that is gone or damaged."""
    if holder is None:
        yield _steps(weights, None, plan(_of(weights, kinds), target, held, model_root))
        return
    try:
        yield _steps(weights, holder, join(weights, holder, target, time.time(), held, model_root, kinds=kinds))
    finally:
        with suppress(OSError):  # it ends by itself
            weights.drop_lease(holder)


def _steps(weights: WeightStore, holder: str | None, found: Plan) -> "Iterator[tuple[Manifest, list[bytes]]]":
    taken_s = time.time()
    for step in found.steps:
        if holder is not None and time.time() > taken_s + TTL_S / 2:
            taken_s = time.time()
            _take(weights, holder, found, taken_s, TTL_S)
        yield step, weights.parts(step)


def _of(weights: WeightStore, kinds: Collection[str]) -> list[Manifest]:
    return [manifest for manifest in weights.manifests({}) if manifest.kind in kinds]


def _take(weights: WeightStore, holder: str, steps: Plan, now_s: float, ttl_s: float) -> None:
    """A store that may only be read gives no lease."""
    try:
        weights.put_lease(lease(holder, steps, now_s, ttl_s))
    except Busy:
        raise
    except OSError as error:
        log.warning("no lease (%s): if the run of these files goes on, it may delete them before they are read", error)


def _there(weights: WeightStore, steps: Iterable[Manifest]) -> bool:
    try:
        return all(weights.manifest(Artefact.of(step)) == step for step in steps)
    except Missing:
        return False


def collect(weights: WeightStore, manifests: Iterable[Manifest], acknowledged: Iterable[Order], now_s: float, keep: int) -> list[Manifest]:
    """Delete what nobody needs of `manifests` (all that can be read), and what a killed publisher left among it; see chain.deletable.
    Returns what was deleted. Raises ManifestError for a damaged lease, and OSError: what they tell of is then still there, or half gone,
    and may be given again."""
    known, held = list(manifests), list(acknowledged)
    if not deletable(known, held, (), now_s, keep):
        return []  # whatever leases say, which are not listed then
    gone = deletable(known, held, weights.leases(), now_s, keep)
    for manifest in gone:
        weights.remove(manifest)
    if gone:
        # Only before all that stays: whoever holds a lease may be writing a fold to one of the versions that it names.
        weights.sweep(min(manifest.order for manifest in known if manifest not in gone))
    return gone
