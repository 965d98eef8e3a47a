"""The weight channel with real servers and without Ray: a trainer that is nothing but bits, and a host's weights on a thread's event loop.

weights = Bits(directory)                      HF tensors, changed at random
host = Host(cfg, [server])                     HostWeights and a LiveEngine for every server
channel = Channel(cfg.sync, weights, host, WeightVersion(0, 0, RUN_ID))
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file

from slime.config import SlimeConfig
from slime.engine.agent import open_session
from slime.engine.control import Control
from slime.engine.host_copy import bits_of, tensor_of
from slime.engine.live import LiveEngine
from slime.engine.server import Server
from slime.engine.weights import HostWeights
from slime.models.hf_files import HFReader
from slime.sync import buckets, fingerprint, native, wire
from slime.sync.channel import Channel
from slime.sync.diff import Delta, Grid, Summary
from slime.sync.manifest import PartRef, root_of
from slime.sync.protocol import Adoption, Answer, Bucket
from slime.sync.publication import Action
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.flip_loader import LOADER, Flipper

RUN_ID = "run"
TIMEOUT_S = 60.0
# bfloat16: quiet and signalling NaNs with payloads, infinities, zeros, subnormals of both signs, the largest and smallest numbers
SPECIAL = np.array([0x7FC1, 0xFF83, 0xFFFF, 0x7F81, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x807F, 0x8001, 0x0080, 0x7F7F], np.uint16)
Tensors = list[np.ndarray]  # bits of every tensor, flat


class Bits:
    """A publisher of HF tensors that no model trains. It sends what differs from the version that was acknowledged last."""

    def __init__(self, directory: Path) -> None:
        with HFReader(directory) as reader:
            found = {name: torch.as_tensor(reader.read(name)) for name in reader.names}
        self._spec = ModelSpec(tuple(TensorSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in found.items()))
        self.now: Tensors = [bits_of(tensor).copy() for tensor in found.values()]
        self.held = self.copied()
        self.bytes_sent = 0

    def copied(self) -> Tensors:
        return [bits.copy() for bits in self.now]

    def mutate(self, seed: int, density: float) -> None:
        """Give about `density` of the elements other bits: neighbours in value, special values, any bits at all. Some tensors are left
        alone, some change more."""
        g = np.random.default_rng(seed)
        for bits in self.now:
            share = density * g.choice([0.0, 1.0, 1.0, 2.0])
            at = np.flatnonzero(g.random(bits.size) < share)
            drawn = g.integers(0, 256, at.size * bits.itemsize, dtype=np.uint8).view(bits.dtype)
            kind = g.random(at.size)
            drawn = np.where(kind < 0.4, bits[at] + bits.dtype.type(1), drawn)
            if bits.itemsize == 2:
                drawn = np.where(kind > 0.7, g.choice(SPECIAL, at.size), drawn)
            bits[at] = drawn

    def step(self, seed: int, density: float = 0.05) -> None:
        """Change some elements by a little, so that the model still gives numbers."""
        g = np.random.default_rng(seed)
        for number, spec in enumerate(self._spec.tensors):
            tensor = tensor_of(self._spec, number, self.now[number].copy()).reshape(-1)
            at = torch.from_numpy(np.flatnonzero(g.random(spec.size) < density))
            tensor[at] += torch.from_numpy(g.normal(0, 0.1, len(at))).to(tensor.dtype)
            self.now[number][:] = bits_of(tensor)

    def export(self, directory: Path, model: Path) -> Path:
        """A model directory with these weights and everything else of `model`."""
        directory.mkdir(parents=True)
        for path in model.iterdir():
            if path.suffix != ".safetensors":
                (directory / path.name).write_bytes(path.read_bytes())
        tensors = {s.name: tensor_of(self._spec, i, self.now[i].copy()) for i, s in enumerate(self._spec.tensors)}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    # --- sync.protocol.Publisher ------------------------------------------------------------------------------------

    def spec(self) -> ModelSpec:
        return self._spec

    def take_base(self, run_id: str) -> Sequence[int]:
        self._key = fingerprint.run_key(run_id)
        self._table = fingerprint.table(self._key)
        self.held = self.copied()
        return self.fingerprints(self.held)

    def fingerprints(self, tensors: Tensors) -> list[int]:
        keys = [fingerprint.tensor_key(self._key, spec.name) for spec in self._spec.tensors]
        return [fingerprint.full(bits, key, self._table) for bits, key in zip(tensors, keys, strict=True)]

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        grid = Grid.of(self._spec)
        found: list[Changes] = []
        changed: list[int] = []
        for number, (old, new) in enumerate(zip(self.held, self.now, strict=True)):
            at = native.diff(old, new)
            changed.append(len(at))
            counts = np.zeros(grid.blocks, np.int64)
            np.add.at(counts, grid.first[number] + at // wire.BLOCK, 1)
            whole = np.flatnonzero(grid.complete(counts)) - grid.first[number]
            listed = np.union1d(at, np.flatnonzero(np.isin(np.arange(old.size) // wire.BLOCK, whole))).astype(np.int64)
            found.append(Changes(number, listed, old[listed], new[listed]))
        payloads = [
            wire.encode_part(self._spec, part, [found[i] for i in part], codec, self.held.__getitem__)
            for part in self._spec.parts(part_bytes)
        ]
        self.bytes_sent += sum(map(len, payloads))
        refs = tuple(PartRef.of(number, payload) for number, payload in enumerate(payloads))
        root = root_of(self.fingerprints(self.held))
        summary = Summary(tuple(self.fingerprints(self.now)), root, tuple(changed), 0, 0.0, 0.0, 0.0)
        return Delta(payloads, refs, summary)  # type: ignore[arg-type]  # bytes where Ray has references

    def acknowledge(self, version: WeightVersion) -> None:
        self.held = self.copied()

    def weights(self, version: WeightVersion, bucket_bytes: int) -> Iterator[Any]:
        for part in self._spec.parts(bucket_bytes):
            yield [(self._spec.tensors[i].name, tensor_of(self._spec, i, self.now[i].copy())) for i in part]


class Host:
    """The engines of one host, as the driver sees them through its agent; sync.protocol.Receivers. Calls may come from any thread."""

    def __init__(self, cfg: SlimeConfig, started: Sequence[Server]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._session = self.run(_open())
        self.servers = list(started)
        self.live = [LiveEngine(s.spec.endpoint, cfg.rollout.tensor_parallel, self._session, s) for s in started]
        self.weights = HostWeights(cfg, lambda: self.live)
        self.answers: list[Answer] = []
        self.before: Callable[[Sequence[Action]], None] = lambda actions: None  # called before they are performed

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def close(self) -> None:
        self.weights.close()
        self.run(_hang_up(self.live))
        self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flippers(self, folder: Path) -> list[list[Flipper]]:
        """Those of every engine's ranks."""
        return [self._flippers(engine, folder / f"flipper{number}-{next(_NUMBERS)}") for number, engine in enumerate(self.live)]

    def _flippers(self, engine: LiveEngine, path: Path) -> list[Flipper]:
        async def begin() -> None:
            control = Control(engine.endpoint, self._session)
            await control.pause("in_place")
            async with engine._session():
                await control.update([buckets.serialise([(str(path), torch.empty(0))])] * engine.ranks, None, False, TIMEOUT_S, LOADER)
            await control.resume()

        self.run(begin())
        return [Flipper(path, rank) for rank in range(engine.ranks)]

    # --- sync.protocol.Receivers ------------------------------------------------------------------------------------

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        self.run(self.weights.adopt(spec.to_json(), run))

    def engines(self) -> list[str]:
        return [engine.endpoint.name for engine in self.weights.live()]

    def offer(self, manifest: str, parts: Any, timeout_s: float) -> None:
        self.run(self.weights.offer(manifest, parts))

    def offer_bucket(self, bucket: Bucket, first: bool, timeout_s: float) -> int:
        return self.run(self.weights.offer_bucket(bucket, first))

    def offer_whole(self, label: str, timeout_s: float) -> None:
        self.run(self.weights.offer_whole(label))

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        self.before(actions)
        answers = self.run(self.weights.perform(actions, label, timeout_s))
        self.answers += answers
        return answers

    def advance(self, label: str, timeout_s: float) -> None:
        self.run(self.weights.advance(label))

    def give_up(self, label: str, timeout_s: float) -> None:
        self.run(self.weights.give_up(label))

    def write_anchor(self, manifest: str) -> None:
        self.run(self.weights.write_anchor(manifest))

    def relabel(self, label: str, timeout_s: float) -> None:
        for engine in self.live:
            self.run(engine.relabel(label))


_NUMBERS = itertools.count()


async def _open() -> Any:
    return open_session()


async def _hang_up(engines: Sequence[LiveEngine]) -> None:
    for engine in engines:
        for link in engine._links:
            await link.close()


def bf16_recipe(model: Path, ranks: int = 1, **sglang: Any) -> SlimeConfig:
    """A recipe of servers that take the tests' loader too."""
    cfg = servers.recipe(model, tensor_parallel=ranks, sglang={"custom_weight_loader": [LOADER], **sglang})
    cfg.model.dtype = "bf16"
    return cfg


def open_channel(cfg: SlimeConfig, weights: Any, host: Host) -> Channel:
    """Opened: every engine is proven to hold the model directory."""
    channel = Channel(cfg.sync, weights, host, WeightVersion(0, 0, RUN_ID))
    channel.open()
    return channel
