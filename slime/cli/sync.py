"""`slime sync inspect | verify | replay | fold WHERE`: the history of a run's weights, kept by sync.transport=store.

  slime sync inspect runs/mine                                    a table: every version, its form, bytes, density
  slime sync inspect runs/mine --version 12                       one version: tensors, layers, how blocks are coded
  slime sync verify  runs/mine --model MODEL                      every file, signature and step; bits proven at every version
  slime sync replay  runs/mine --model MODEL --to 12 --out OUT    a Hugging Face directory of version 12, proven to the bit
  slime sync fold    runs/mine --model MODEL --from 0 --to 12     the steps between two versions as one, for late joiners

WHERE is a run's directory, a directory of weights, or sync.url (s3://bucket/path; AWS_ENDPOINT_URL, AWS_REGION and keys as usual). MODEL is
what the run's model.path named: history begins there, or at an anchor. A version is NUMBER (of the newest epoch that has it), EPOCH/NUMBER,
or `model` for the model directory.
"""

import argparse
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from slime.cli import sync_tables as tables
from slime.cli.sync_models import read_bits, write_hf
from slime.config.exits import ConfigError
from slime.sync.chain import Order, source_of
from slime.sync.fold import NotTheseWeights, Weights, fold
from slime.sync.history import reading
from slime.sync.manifest import ANCHOR, DELTA, FOLD, MODEL_DIRECTORY, Manifest, ManifestError, sign
from slime.sync.places import Missing
from slime.sync.records import ModelSpec
from slime.sync.store import Artefact, WeightStore
from slime.sync.store_fsspec import open_store
from slime.sync.wire import WireError

Say = Callable[[str], None]


@dataclass(frozen=True)
class History:
    """The versions of one run, as far as they can be read."""

    weights: WeightStore
    key: bytes | None
    manifests: list[Manifest]
    damaged: dict[Artefact, str]  # why

    @property
    def signed(self) -> bool:
        return any(manifest.mac for manifest in self.manifests)

    @property
    def reader(self) -> str | None:
        """Who takes a lease on what is read; nobody where the run's trainer could not read the lease."""
        return None if self.signed and self.key is None else f"sync-{uuid.uuid4().hex[:12]}"

    @property
    def model(self) -> ModelSpec:
        """Raises ConfigError where its file is gone."""
        try:
            return self.weights.model(self.manifests[-1].signature)
        except Missing as error:
            raise ConfigError(f"{error}: the list of tensors is gone; put model.<signature>.json back from another copy") from error

    def find(self, text: str) -> Order:
        """The version that the user means."""
        if text == "model":
            return MODEL_DIRECTORY
        epoch, _, number = text.rpartition("/")
        known = sorted({m.order for m in self.manifests})
        found = [order for order in known if str(order[1]) == number and epoch in ("", str(order[0]))]
        if not found:
            said = ", ".join(f"{e}/{n}" for e, n in known[:8]) + (f" ... {known[-1][0]}/{known[-1][1]}" if len(known) > 8 else "")
            raise ConfigError(f"slime sync: no version {text} in {self.weights.store.where}; there are {said}")
        return found[-1]


def main(argv: list[str]) -> None:
    """Raises ConfigError (ValueError) for arguments that cannot be used, RuntimeError where something is damaged or not proven."""
    args = _parser().parse_args(argv)
    key = _key(args.key_env)
    history = read_history(args.where, args.run, key)
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=160)

    def say(line: str) -> None:
        out.print(escape(line))

    match args.command:
        case "inspect":
            inspect(history, args.version, args.top, out)
        case "verify":
            verify(history, args.model, say)
        case "replay":
            replay(history, args.model, history.find(args.to), args.out, say)
        case "fold":
            add_fold(history, args.model, history.find(args.first), history.find(args.to), args.codec, say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slime sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, what in (
        ("inspect", "what there is"),
        ("verify", "prove that all of it is whole"),
        ("replay", "write a version as a Hugging Face directory"),
        ("fold", "make several steps one"),
    ):
        made[name] = command = commands.add_parser(name, help=what, description=f"slime sync {name}: {what}. See slime sync --help.")
        command.add_argument("where", metavar="WHERE", help="a run's directory, a directory of weights, or sync.url")
        command.add_argument("--run", metavar="ID", help="run id, where WHERE has several")
        command.add_argument("--key-env", metavar="NAME", help="environment variable with the key of sync.key_env; proves who wrote")
    made["inspect"].add_argument("--version", metavar="V", help="look into one version; default: the newest")
    made["inspect"].add_argument("--top", type=int, default=10, metavar="N", help="tensors to list; default 10")
    help_model = "the run's model.path, where history begins; without it only what follows from an anchor is "
    made["verify"].add_argument("--model", type=Path, metavar="MODEL", help=f"{help_model}decoded")
    made["replay"].add_argument("--model", type=Path, metavar="MODEL", required=True, help="the run's model.path: base, config, tokenizer")
    made["replay"].add_argument("--to", metavar="V", required=True, help="version to write")
    made["replay"].add_argument("--out", type=Path, metavar="OUT", required=True, help="directory to write; must not exist or be empty")
    made["fold"].add_argument("--model", type=Path, metavar="MODEL", help=f"{help_model}in reach")
    made["fold"].add_argument("--from", dest="first", metavar="V", required=True, help="version to begin from")
    made["fold"].add_argument("--to", metavar="V", required=True, help="version to end at")
    made["fold"].add_argument("--codec", choices=("steps", "exponent"), default="exponent", help="default exponent, the smaller one")
    return parser


def _key(name: str | None) -> bytes | None:
    if name is None:
        return None
    if not os.environ.get(name):
        raise ConfigError(f"slime sync: --key-env={name}: no such environment variable, or it is empty; export the run's key there")
    return os.environ[name].encode()


def read_history(where: str, run: str | None, key: bytes | None) -> History:
    """Everything that can be read. Raises ConfigError where there is no run, or several and none is named."""
    store = open_store(_weights_of(where))
    runs = sorted({name.split("/")[0] for name in store.list("") if name.endswith("/manifest.json")})
    if not runs:
        raise ConfigError(f"slime sync: {store.where} holds no weights; give a run's directory (sync.transport=store) or its sync.url")
    if run is None and len(runs) > 1:
        raise ConfigError(f"slime sync: {store.where} holds {len(runs)} runs: {', '.join(runs[:8])}; choose one by --run")
    if run is not None and run not in runs:
        raise ConfigError(f"slime sync: --run={run}: not in {store.where}; there are {', '.join(runs[:8])}")
    weights = WeightStore(store, run or runs[0], key)
    damaged: dict[Artefact, str] = {}
    manifests = list(weights.manifests(damaged))
    if not manifests:
        raise RuntimeError(f"slime sync: no version of {weights.run_id} can be read: {'; '.join(list(damaged.values())[:2])}")
    return History(weights, key, sorted(manifests, key=lambda m: m.order), damaged)


def _weights_of(where: str) -> str:
    """Where a run's directory keeps them."""
    directory = Path(where)
    if "://" not in where and not directory.is_dir():
        raise ConfigError(f"slime sync {where}: no such directory")
    return str(directory / "weights") if (directory / "config.yaml").is_file() and (directory / "weights").is_dir() else where


# --- the commands -----------------------------------------------------------------------------------------------------


def inspect(history: History, version: str | None, top: int, out: Console) -> None:
    model, manifests = history.model, history.manifests
    order = manifests[-1].order if version is None else history.find(version)
    if version is None:
        out.print(tables.versions(model, manifests, history.damaged, history.weights.store.where))
    chosen = [m for m in manifests if m.order == order]
    manifest = next((m for m in chosen if m.kind == DELTA), chosen[0])
    blocks = tables.blocks_of(model, manifest, history.weights.parts(manifest))
    out.print(tables.tensors(model, manifest, blocks, top), tables.layers(model, manifest, blocks), tables.codecs(manifest, blocks))


def verify(history: History, path: Path | None, say: Say) -> None:
    """Raises RuntimeError naming everything that is wrong."""
    faults = [f"{artefact.folder}: {why}" for artefact, why in history.damaged.items()]
    whole: list[Manifest] = []
    for manifest in history.manifests:
        try:
            history.weights.parts(manifest)
            whole.append(manifest)
        except (ManifestError, Missing) as error:
            faults.append(str(error))
    said = "signatures are right" if history.key else "signatures were not looked at (--key-env)"
    say(f"{history.weights.run_id}: {len(whole)} manifests with {sum(m.nbytes for m in whole)} bytes of parts; digests match; {said}")
    proven = _walk(history, path, whole, say, faults)
    faults += _pointer_faults(history)
    left = [m for m in whole if m not in proven]
    if left and path is not None and not faults:
        faults.append(f"nothing leads to where {_named(left)} begin: files are missing, or --model is another model")
    if faults:
        raise RuntimeError("slime sync verify: " + "\n  ".join([f"{len(faults)} faults", *faults]))
    end = f"; not decoded without --model: {_named(left)}" if left else ""
    say(f"{len(proven)} steps decoded, fingerprints proven at each{end}")


def _walk(history: History, path: Path | None, whole: Sequence[Manifest], say: Say, faults: list[str]) -> set[Manifest]:
    """Decode every step that can be reached from the model directory or an anchor, and prove where it leads. Returns those that held."""
    model, run_id = history.model, history.weights.run_id
    proven: set[Manifest] = set()
    tried: set[Manifest] = set()
    starts = [] if path is None else [Weights(model, run_id, read_bits(path, model))]

    def step(weights: Weights, manifest: Manifest) -> None:
        tried.add(manifest)
        reached = weights.copy()
        try:
            reached.apply(manifest, history.weights.parts(manifest))
        except (ManifestError, WireError, NotTheseWeights) as error:
            faults.append(str(error))
            return
        proven.add(manifest)
        say(f"  {manifest.label} {manifest.kind} from {tables.parent(manifest)}: root {manifest.root}")
        if manifest.kind != FOLD:
            starts.append(reached)

    for anchor in (None, *(manifest for manifest in whole if manifest.kind == ANCHOR)):
        if anchor is not None:
            step(Weights(model, run_id), anchor)
        while starts:
            weights = starts.pop()
            for manifest in whole:
                if manifest not in tried and source_of(manifest) == weights.node:
                    step(weights, manifest)
    return proven


def _pointer_faults(history: History) -> list[str]:
    """What is wrong with `latest`. Signed, it can be read only with the key."""
    try:
        pointer = history.weights.latest()
    except ManifestError as error:
        return [] if history.signed and history.key is None else [str(error)]
    if pointer is None:
        return []
    found = [m for m in history.manifests if m.order == (pointer.epoch, pointer.number)]
    if not found or found[0].root != pointer.root:
        return [f"latest leads to {pointer.epoch}/{pointer.number} (root {pointer.root}), which is not there"]
    return []


def replay(history: History, path: Path, order: Order, out: Path, say: Say) -> None:
    """Raises ConfigError for an OUT that exists, NotTheseWeights where bits are not proven, NoWay where nothing leads there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"slime sync replay: --out={out} exists and is not an empty directory; name another")
    if order == MODEL_DIRECTORY:
        raise ConfigError("slime sync replay: --to=model is MODEL itself; name a version")
    weights = _reach(history, path, order, say)
    write_hf(weights, path, out)
    held = Weights(weights.model, weights.run_id, read_bits(out, weights.model))
    if held.fingerprints != weights.fingerprints:
        raise NotTheseWeights(f"slime sync replay: {out} was written and read back with other bits: its disk is not to be trusted")
    say(f"{out}: {weights.run_id}/{order[0]}/{order[1]}, root {held.root}, read back and proven")


def _reach(history: History, path: Path | None, order: Order, say: Say) -> Weights:
    """The weights of a version, by the cheapest way."""
    model, run_id = history.model, history.weights.run_id
    base = None if path is None else Weights(model, run_id, read_bits(path, model))
    if order == MODEL_DIRECTORY:
        if base is None:
            raise ConfigError("slime sync: version `model` needs --model")
        return base
    weights = Weights(model, run_id) if base is None else base
    with reading(history.weights, history.reader, order, base.node if base else None, base.root if base else "") as steps:
        for step, parts in steps:
            if step.kind == ANCHOR:
                weights = Weights(model, run_id)
            weights.apply(step, parts)
            say(f"  {step.kind} from {tables.parent(step)} to {step.label}: root {step.root}")
    return weights


def add_fold(history: History, path: Path | None, first: Order, last: Order, codec: str, say: Say) -> None:
    """Raises ConfigError for fewer than two steps, NoWay where deltas do not lead from `first` to `last`, and what `replay` raises."""
    if history.key is None and history.signed:
        raise ConfigError("slime sync fold: the run's versions are signed; name the key by --key-env, so that the fold is too")
    base = _reach(history, path, first, say)
    with reading(history.weights, history.reader, last, base.node, kinds=(DELTA,)) as found:
        steps = list(found)
        if len(steps) < 2:
            raise ConfigError(f"slime sync fold: {len(steps)} steps lead from --from to --to; a fold is of two or more")
        made = fold(base, steps, codec)
        manifest = sign(made.manifest, history.key) if history.key else made.manifest
        history.weights.add(manifest, made.parts)
    before = sum(step.nbytes for step, _ in steps)
    share = manifest.nbytes / max(1, before)
    say(f"{manifest.label} from {tables.parent(manifest)}: {len(steps)} steps of {before} bytes as one of {manifest.nbytes} ({share:.2f})")


def _named(manifests: Sequence[Manifest]) -> str:
    names = [f"{m.kind} {m.label}" for m in manifests]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
