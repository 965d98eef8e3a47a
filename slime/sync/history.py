"""What readers and the publisher of a `WeightStore` do beside one another: a late joiner takes a lease on what it will read, the publisher
deletes what nobody needs.

    joiner     plan, lease, look again: all still there?  --no-->  plan anew, from what is left
    publisher  lists leases, then deletes, each manifest before its parts

A publisher that listed leases before the joiner's showed may delete after the joiner looked: then a part is Missing when it is read, and
`join` has to be called again. That lease is seen by every later listing.
"""

from collections.abc import Iterable

from slime.sync.chain import Node, NoWay, Order, Plan, deletable, lease, plan
from slime.sync.manifest import Manifest
from slime.sync.store import Artefact, Missing, WeightStore

TRIES = 5


def join(
    weights: WeightStore, holder: str, target: Order, now_s: float, held: Node | None = None, model_root: str = "", ttl_s: float = 600.0
) -> Plan:
    """The cheapest steps to `target`, leased in the name of `holder` (a word, such as its host) for `ttl_s`. Drop the lease when they are
    applied. See chain.plan for the rest. Raises NoWay, ManifestError for a version that is damaged."""
    listed: list[Artefact] = []
    for _ in range(TRIES):
        before, listed = listed, weights.artefacts()
        try:
            steps = plan(list(weights.manifests()), target, held, model_root)
        except NoWay:
            if listed == before:
                raise
            continue  # an anchor may have come while what it replaces went
        weights.put_lease(lease(holder, steps, now_s, ttl_s))
        if _there(weights, steps.steps):
            return steps
    weights.drop_lease(holder)
    raise NoWay(
        f"{target[0]}/{target[1]} of {weights.run_id}: what leads there was deleted {TRIES} times while {holder} looked; take a newer one"
    )


def _there(weights: WeightStore, steps: Iterable[Manifest]) -> bool:
    try:
        return all(weights.manifest(Artefact.of(step)) == step for step in steps)
    except Missing:
        return False


def collect(weights: WeightStore, manifests: Iterable[Manifest], acknowledged: Iterable[Order], now_s: float, keep: int) -> list[Manifest]:
    """Delete what nobody needs of `manifests` (all that exist); see chain.deletable. Returns what was deleted. Raises ManifestError for a
    damaged lease: nothing is deleted then."""
    gone = deletable(manifests, acknowledged, weights.leases(), now_s, keep)
    for manifest in gone:
        weights.remove(manifest)
    if gone:
        weights.sweep(gone[0].order)
    return gone
