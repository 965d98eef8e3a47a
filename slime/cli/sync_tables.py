"""What `slime sync inspect` shows: versions, and of one version its tensors, layers and codings."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from slime.observe.console_table import short
from slime.sync.manifest import ANCHOR, MODEL_DIRECTORY, Manifest
from slime.sync.records import ModelSpec
from slime.sync.store import Artefact
from slime.sync.wire import PartBlock, describe_part

NUMBERS = ("parts", "bytes", "ratio", "changed", "density")
BAR = 24  # characters of the longest bar
LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")


def versions(model: ModelSpec, manifests: Sequence[Manifest], damaged: Mapping[Artefact, str], where: str) -> Table:
    """A row for every manifest."""
    signed = sum(bool(m.mac) for m in manifests)
    table = Table(
        "version",
        "kind",
        "from",
        *NUMBERS,
        "most changed",
        "root",
        "written (UTC)",
        title=f"{escape(where)}: run {manifests[0].run_id}, {short(_size(model))} weights in {len(model.tensors)} tensors, "
        f"{short(model.nbytes)}B whole; {signed} of {len(manifests)} manifests signed",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in table.columns[3 : 3 + len(NUMBERS)]:
        column.justify = "right"
    for m in manifests:
        changed = "" if m.kind == ANCHOR else short(sum(m.changed))
        table.add_row(
            f"{m.epoch}/{m.number}",
            m.kind,
            parent(m),
            str(len(m.parts)),
            short(m.nbytes),
            f"{model.nbytes / max(1, m.nbytes):.1f}x",
            changed,
            "" if m.kind == ANCHOR else _percent(sum(m.changed), _size(model)),
            "" if m.kind == ANCHOR else _most(model, m),
            m.root[:8],
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m.created_s)) if m.created_s else "",
        )
    for artefact, why in damaged.items():
        table.add_row(f"{artefact.epoch}/{artefact.number}", f"[red]{artefact.kind}[/]", f"[red]damaged: {escape(why)}[/]")
    return table


def blocks_of(model: ModelSpec, manifest: Manifest, parts: Sequence[bytes]) -> list[PartBlock]:
    """How every block is coded."""
    described = zip(model.parts(manifest.part_bytes), parts, strict=True)
    return [block for tensors, payload in described for block in describe_part(model, tensors, payload)]


def tensors(model: ModelSpec, manifest: Manifest, blocks: Sequence[PartBlock], top: int) -> Table:
    """The tensors that most changed."""
    table = _table(f"{manifest.label}: {manifest.kind} from {parent(manifest)}; most changed tensors", "tensor")
    sizes: Counter[str] = Counter()
    for block in blocks:
        sizes[block.tensor] += block.nbytes
    changes = ((spec, changed) for spec, changed in zip(model.tensors, manifest.changed, strict=True) if changed)
    ranked = sorted(changes, key=lambda pair: -pair[1])[:top]
    longest = max((changed / max(1, spec.size) for spec, changed in ranked), default=0)
    for spec, changed in ranked:
        _row(table, spec.name, changed, spec.size, sizes[spec.name], longest)
    return table


def layers(model: ModelSpec, manifest: Manifest, blocks: Sequence[PartBlock]) -> Table:
    """Density of every layer, and of what is in none."""
    table = _table("by layer", "layer")
    changed: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for spec, count in zip(model.tensors, manifest.changed, strict=True):
        changed[layer_of(spec.name)] += count
        sizes[layer_of(spec.name)] += spec.size
    for block in blocks:
        nbytes[layer_of(block.tensor)] += block.nbytes
    longest = max(changed[name] / max(1, sizes[name]) for name in sizes)
    for name in sizes:
        _row(table, name, changed[name], sizes[name], nbytes[name], longest)
    return table


def codecs(manifest: Manifest, blocks: Sequence[PartBlock]) -> Table:
    """How blocks are coded: how many, and their bytes."""
    table = Table("coding", "blocks", "listed", "bytes", "bits each", title="codings", title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in sorted({block.codec for block in blocks}):
        own = [block for block in blocks if block.codec == name]
        listed, nbytes = sum(b.changed for b in own), sum(b.nbytes for b in own)
        table.add_row(name, str(len(own)), short(listed), short(nbytes), f"{8 * nbytes / max(1, listed):.2f}")
    table.add_row("table and heads", "", "", short(manifest.nbytes - sum(b.nbytes for b in blocks)), "")
    return table


def layer_of(name: str) -> str:
    """`model.layers.3` of a tensor in it; of others the name without `.weight`."""
    match = LAYER.match(name)
    return match[1] if match else name.removesuffix(".weight")


def parent(manifest: Manifest) -> str:
    """What a version begins from, in words."""
    if manifest.kind == ANCHOR:
        return "nothing"
    return "model" if manifest.parent == MODEL_DIRECTORY else f"{manifest.parent_epoch}/{manifest.parent_number}"


def _table(title: str, what: str) -> Table:
    table = Table(what, "changed", "density", "", "bytes", title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index in (1, 2, 4):
        table.columns[index].justify = "right"
    return table


def _row(table: Table, name: str, changed: int, size: int, nbytes: int, longest: float) -> None:
    bar = "█" * round(BAR * changed / max(1, size) / longest) if longest else ""
    table.add_row(escape(name), short(changed), _percent(changed, size), bar, short(nbytes))


def _most(model: ModelSpec, manifest: Manifest) -> str:
    shares: Iterable[tuple[float, str]] = ((n / max(1, t.size), t.name) for t, n in zip(model.tensors, manifest.changed, strict=True))
    share, name = max(shares, default=(0.0, ""))
    return escape(f"{name} {share:.2%}") if share else ""


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.3%}"


def _size(model: ModelSpec) -> int:
    return sum(tensor.size for tensor in model.tensors)
