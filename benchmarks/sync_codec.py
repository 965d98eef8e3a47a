"""Bytes and speed of the weight channel's codecs beside what others send, on one optimizer step of bf16 weights.

    OMP_NUM_THREADS=1 python -m benchmarks.sync_codec [--elements 33554432] [--pairs DIR]

Simulates Adam (0.9, 0.98) on weights N(0, 0.02) with float32 masters that lie anywhere in their bf16 cell, as after many steps, and takes
one step at five learning rates, for about .1, .5, 1, 3 and 10 % changed elements. `--pairs` adds real weights: old_X.npy and new_X.npy of
uint16 bits. Every encoding begins with the two arrays and ends in a copy of the old one, which must be the new one bit for bit. GB/s are of
dense bf16 by CPU time of one thread, best of three. Bounds: the entropy of positions and steps if elements change alike (iid), and if
their exponents are known (exponent); a codec's distance is given to both. Bars (see BARS) hold for the simulated rows: the run fails if
one does not. Prints a table and writes benchmarks/results/sync_codec.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rivals import Coo, Full, Gap16, Way, Xor
from slime.sync import native
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.wire import decode_part, encode_part

RESULTS = Path(__file__).parent / "results"
RATES = {0.001: 6.3e-8, 0.005: 3.75e-7, 0.01: 8.2e-7, 0.03: 2.96e-6, 0.1: 1.3e-5}  # density: learning rate
BETAS, EPS, SIGMA, STEPS = (0.9, 0.98), 1e-8, 0.02, 30
CHUNK = 1 << 20
REPEATS = 3
XOR = "xor + zstd-1 (slime)"
OURS, SMALL = "steps (ours, default)", "exponent (ours)"
# Bytes beside xor + zstd-1, at most, by density.
BARS = {
    OURS: {0.001: 0.62, 0.005: 0.48, 0.01: 0.48, 0.03: 0.48, 0.1: 0.50},
    SMALL: {0.001: 0.38, 0.005: 0.34, 0.01: 0.34, 0.03: 0.34, 0.1: 0.38},
}
FAST_AT, ENCODE_BAR, DECODE_BAR = (0.01, 0.03), 1.0, 3.0  # speed of the default beside xor + zstd-1, at least


@dataclass(frozen=True)
class Pair:
    """Two versions of some weights (uint16 bits of bf16)."""

    name: str
    density: float  # of RATES; 0 for real weights
    old: np.ndarray
    new: np.ndarray


@dataclass(frozen=True)
class Row:
    """One encoding of one pair. Bits are of a parameter; GB/s of dense weights."""

    pair: str
    encoding: str
    changed: float
    bits: float
    of_dense: float
    of_xor: float
    of_iid: float
    of_exponent: float
    iid_bits: float
    exponent_bits: float
    encode_gb_s: float
    decode_gb_s: float


class Ours(Way):
    codec = "steps"

    def __init__(self, old: np.ndarray, new: np.ndarray) -> None:
        super().__init__(old, new)
        self.model = ModelSpec((TensorSpec("w", self.old.shape, "bfloat16"),))

    def encode(self) -> list[bytes]:
        positions = native.diff(self.old, self.new)
        changes = Changes(0, positions, self.old[positions], self.new[positions])
        return [encode_part(self.model, range(1), [changes], self.codec, lambda tensor: self.old)]

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        for changes in decode_part(self.model, range(1), wire[0], lambda tensor: self.old):
            bits[changes.positions] = changes.new


class Small(Ours):
    codec = "exponent"


WAYS: dict[str, type[Way]] = {
    "full": Full,
    "COO u32 + bf16 (verl, vLLM)": Coo,
    XOR: Xor,
    "gap16 + xor + zstd-1 (NeMo-RL)": Gap16,
    OURS: Ours,
    SMALL: Small,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=32 << 20)
    parser.add_argument("--pairs", type=Path, default=None, help="a folder of old_X.npy and new_X.npy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    failed: list[str] = []
    for pair in [*simulate(args.elements), *(read(args.pairs) if args.pairs else ())]:
        of = measure(pair)
        rows += of.values()
        failed += missed(pair, of)
    console = Console(width=170)
    console.print(table(rows))
    for line in failed:
        console.print(f"missed: {line}")
    RESULTS.mkdir(exist_ok=True)
    found = {"elements": args.elements, "rows": [asdict(row) for row in rows], "missed": failed}
    (RESULTS / "sync_codec.json").write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


def simulate(elements: int) -> Iterator[Pair]:
    """A pair for each learning rate: the last of STEPS steps of Adam, whose gradients are noise around a mean."""
    generator = torch.Generator().manual_seed(7)

    def noise(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    old = np.empty(elements, np.uint16)
    news = {density: np.empty(elements, np.uint16) for density in RATES}
    for start in range(0, elements, CHUNK):
        n = min(CHUNK, elements - start)
        mean, m, v = 0.2 * noise(n), torch.zeros(n), torch.zeros(n)
        for _ in range(STEPS):
            gradient = noise(n) + mean
            m.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        update = m / (1 - BETAS[0] ** STEPS) / ((v / (1 - BETAS[1] ** STEPS)).sqrt() + EPS)
        rounded = (noise(n) * SIGMA).to(torch.bfloat16).float()
        cell = torch.exp2(torch.floor(torch.log2(rounded.abs().clamp_min(1e-30))) - 7)
        master = rounded + (torch.rand(n, generator=generator) - 0.5) * cell * 0.999
        old[start : start + n] = bits_of(master)
        for density, rate in RATES.items():
            news[density][start : start + n] = bits_of(master - rate * update)
    for density, new in news.items():
        yield Pair(f"Adam, lr {RATES[density]:g}", density, old, new)


def bits_of(weights: torch.Tensor) -> np.ndarray:
    return weights.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def read(folder: Path) -> Iterator[Pair]:
    """The pairs of a folder. Raises ValueError for one that is not uint16 or not of one size."""
    for path in sorted(folder.glob("old_*.npy")):
        other = path.with_name("new_" + path.name.removeprefix("old_"))
        old, new = np.load(path).reshape(-1), np.load(other).reshape(-1)
        if old.dtype != np.uint16 or new.dtype != np.uint16 or len(old) != len(new):
            raise ValueError(f"{path} and {other} are not uint16 bits of one size")
        yield Pair(path.stem.removeprefix("old_"), 0, old, new)


def measure(pair: Pair) -> dict[str, Row]:
    """A row for each way. Raises AssertionError where a decoded array is not the new one."""
    gb = pair.old.nbytes / 1e9
    rows: dict[str, Row] = {}
    iid, by_exponent = bounds(pair)
    changed = float(np.mean(pair.old != pair.new))
    sizes: dict[str, int] = {}
    for name, kind in sorted(WAYS.items(), key=lambda item: item[0] != XOR):
        way = kind(pair.old, pair.new)
        wire, encode_s = timed(way.encode)
        bits = pair.old.copy()

        def prepare(bits: np.ndarray = bits) -> None:
            bits[:] = pair.old

        _, decode_s = timed(lambda way=way, wire=wire, bits=bits: way.decode(wire, bits), prepare)  # type: ignore[misc]
        assert np.array_equal(bits, pair.new), f"{name} of {pair.name} is not bit-exact"
        sizes[name] = sum(map(len, wire))
        each = 8 * sizes[name] / len(pair.old)
        near = (each / iid if iid else 0.0, each / by_exponent if by_exponent else 0.0, iid, by_exponent)
        rows[name] = Row(
            pair.name, name, changed, each, each / 16, sizes[name] / sizes[XOR], *near, encode_gb_s=gb / encode_s, decode_gb_s=gb / decode_s
        )
    return {name: rows[name] for name in WAYS}


def timed(do: Callable[[], Any], prepare: Callable[[], None] = lambda: None) -> tuple[Any, float]:
    """What `do` returns, and its CPU seconds: the best of REPEATS."""
    best = float("inf")
    for _ in range(REPEATS):
        prepare()
        begun = time.thread_time()
        found = do()
        best = min(best, time.thread_time() - begun)
    return found, best


def bounds(pair: Pair) -> tuple[float, float]:
    """Bits of a parameter at the least: alike for all elements, and by the old value's exponent."""

    def key(bits: np.ndarray) -> np.ndarray:
        magnitudes = (bits & 0x7FFF).astype(np.int32)
        return np.where(bits >> 15, -magnitudes - 1, magnitudes)

    positions = native.diff(pair.old, pair.new)
    steps = key(pair.new[positions]) - key(pair.old[positions])
    exponents = pair.old >> 7 & 0xFF
    members = np.bincount(exponents, minlength=256)
    by_exponent = 0.0
    for exponent in np.unique(exponents[positions]).tolist():
        own = steps[exponents[positions] == exponent]
        by_exponent += cost(members[exponent], own)
    return cost(len(pair.old), steps) / len(pair.old), by_exponent / len(pair.old)


def cost(members: int, steps: np.ndarray) -> float:
    """Bits of which of so many elements change, and by which steps."""
    n = len(steps)
    where = sum(-k * np.log2(k / members) for k in (n, members - n) if k)
    _, counts = np.unique(steps, return_counts=True)
    return float(where - (counts * np.log2(counts / max(n, 1))).sum())


def missed(pair: Pair, rows: dict[str, Row]) -> list[str]:
    """What does not hold of a simulated pair."""
    if not pair.density:
        return []
    found = []
    for name, bar in BARS.items():
        if rows[name].of_xor > bar[pair.density]:
            found.append(f"{name}, {pair.name}: {rows[name].of_xor:.3f} of xor, bar {bar[pair.density]}")
    if pair.density in FAST_AT:
        encode = rows[OURS].encode_gb_s / rows[XOR].encode_gb_s
        decode = rows[OURS].decode_gb_s / rows[XOR].decode_gb_s
        if encode < ENCODE_BAR or decode < DECODE_BAR:
            least = f"bars {ENCODE_BAR} and {DECODE_BAR}"
            found.append(f"{OURS}, {pair.name}: encodes {encode:.2f} and decodes {decode:.2f} times as fast as xor, {least}")
    return found


def table(rows: list[Row]) -> Table:
    made = Table(title="One optimizer step of bf16 weights, one thread")
    for head in ("weights", "changed", "encoding"):
        made.add_column(head)
    for head in ("bits/param", "of dense", "of xor", "of iid bound", "of exponent bound", "encode GB/s", "decode GB/s"):
        made.add_column(head, justify="right")
    for row in rows:
        near = [f"{x:.2f}" for x in (row.of_iid, row.of_exponent)]
        speeds = [f"{x:.1f}" for x in (row.encode_gb_s, row.decode_gb_s)]
        beside = {
            "full": (row.pair, f"{row.changed:.3%}"),
            XOR: ("bound, iid", f"{row.iid_bits:.4f}"),
            OURS: ("bound, exponent", f"{row.exponent_bits:.4f}"),
        }
        names = beside.get(row.encoding, ("", ""))
        sizes = (f"{row.bits:.4f}", f"1/{1 / row.of_dense:.0f}", f"{row.of_xor:.3f}")
        made.add_row(*names, row.encoding, *sizes, *near, *speeds, end_section=row.encoding == SMALL)
    return made


if __name__ == "__main__":
    sys.exit(main())
