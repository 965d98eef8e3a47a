"""`slime convert SOURCE OUT`: a Hugging Face directory into a megatron-core checkpoint, or back, and the proof that nothing was lost.

SOURCE is a Hugging Face directory (config.json, safetensors, tokenizer), a checkpoint of a run (runs/NAME/iter_0000010), or what this
command made of a Hugging Face directory. OUT gets the other form. It is written beside OUT under a hidden name, read back and compared
with SOURCE bit by bit; then the logits of transformers and of megatron-core are compared in fp32. Only then is it given its name.
"""

import argparse
import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console as RichConsole

from slime.checkpoint import manifest
from slime.checkpoint.state import read_state
from slime.config.exits import ConfigError
from slime.layout import Shape
from slime.models.map import ModelMap
from slime.models.registry import load_map
from slime.observe.console import Console
from slime.observe.files import fsync_directory

if TYPE_CHECKING:
    import torch

    from slime.trainer.convert import Converted, MegatronSource

NO_LOGITS = "--no-logits"
ITSELF = 1 << 30  # bytes that libraries take
COPIES = 1.7  # of the weights, while megatron-core reads or writes: it copies the MLP's fused projections
NAMED = 8  # tensors that an error or a line names


def main(argv: list[str]) -> None:
    """Raises ConfigError (ValueError) for a SOURCE or OUT that cannot be used, RuntimeError where the proof fails."""
    parser = argparse.ArgumentParser(prog="slime convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face directory, or megatron-core checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; must not exist or be empty")
    parser.add_argument("--model", type=Path, help="of a run's checkpoint: the model it began from, where model.path does not lead there")
    parser.add_argument(NO_LOGITS, action="store_true", help="compare bits alone, for a model that does not fit into memory in fp32")
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: weights are moved and compared on the CPU
    console = Console(steps=0, out=RichConsole(stderr=True, highlight=False))
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries, about how they call one another
            found = convert(args.source, args.out, console, args.model, logits=not args.no_logits)
    finally:
        console.stop()
    sys.stdout.write(account(args.out, found))


def convert(source: Path, out: Path, console: Console, model: Path | None = None, logits: bool = True) -> "Converted":
    """Convert, prove, and only then let OUT appear. Raises like `main`."""
    _check_out(out)
    if (source / "config.json").is_file():
        if model is not None:
            raise ConfigError(f"--model={model}: {source} is a model itself; leave --model out")
        return _to_megatron(source, out, console, logits)
    return _to_hf(source, out, console, model, logits)


def account(out: Path, found: "Converted") -> str:
    """What the command prints when all is well."""
    dtype = str(found.dtype).removeprefix("torch.")
    lines = [f"{out}: {found.map.family}, held in {dtype}", f"  read back    {found.bits.equal} tensors, all equal to the bit"]
    if found.map.kept_shapes:
        lines.append(f"  carried      {len(found.map.kept_shapes)} of them untrained: {_some(list(found.map.kept_shapes))}")
    if found.left_out:
        lines.append(f"  left out     {len(found.left_out)} that follow from the others: {_some(list(found.left_out))}")
    said = "not compared" if found.logits is None else f"largest difference from transformers {found.logits:.1e}"
    return "\n".join([*lines, f"  logits       {said}"]) + "\n"


def find_megatron(source: Path, model: Path | None) -> "MegatronSource":
    """What lies at SOURCE where it is no Hugging Face directory. Raises ValueError where it is nothing that can be converted."""
    from megatron.core.dist_checkpointing import check_is_distributed_checkpoint

    from slime.trainer.convert import HF, of_convert, of_run

    if check_is_distributed_checkpoint(str(source)) and (source / HF).is_dir():
        if model is not None:
            raise ConfigError(f"--model={model}: {source / HF} says what the model is; leave --model out")
        return of_convert(source)
    if check_is_distributed_checkpoint(str(source / "trainer")):
        state = read_state(source)
        manifest.verify(source, step=state.step, content=False)
        path = Path(state.config["model"]["path"]) if model is None else model
        if not (path / "config.json").is_file():
            raise ConfigError(f"{source}: it began from model.path={path}, where no config.json is; name that model's directory by --model")
        return of_run(source / "trainer", path, state.config["model"]["family"])
    raise ConfigError(
        f"slime convert {source}: neither a Hugging Face directory (config.json) nor a megatron-core checkpoint (metadata.json); give one "
        "of these, or the iter_ folder of a run"
    )


def _to_megatron(source: Path, out: Path, console: Console, logits: bool) -> "Converted":
    model_map = load_map(source)
    from slime.trainer import convert

    _check_memory(model_map, convert.dtype_for(model_map, source).itemsize, logits)
    _begin(console, source, out, model_map)
    with _unfinished(out) as folder:
        found = convert.to_megatron(source, model_map, folder, console, logits)
        _check(found, source)
    return found


def _to_hf(source: Path, out: Path, console: Console, model: Path | None, logits: bool) -> "Converted":
    megatron = find_megatron(source, model)
    from slime.trainer import convert

    dtype: torch.dtype = convert.held_dtype(megatron.shards)
    _check_memory(megatron.map, dtype.itemsize, logits)
    _begin(console, source, out, megatron.map)
    with _unfinished(out) as folder:
        found = convert.to_hf(megatron, folder, console, logits)
        _check(found, source)
    return found


def _begin(console: Console, source: Path, out: Path, model_map: ModelMap) -> None:
    parameters = _elements(model_map.hf_shapes)
    console.start("slime convert", {"from": str(source), "to": str(out), "model": f"{model_map.family}, {parameters:,} parameters"})


def _check(found: "Converted", source: Path) -> None:
    """Raises RuntimeError unless the conversion is proven."""
    from slime.trainer.proof import MAX_LOGIT_DIFFERENCE

    bits = found.bits
    if bits.faults:
        raise RuntimeError(
            f"slime convert {source}: of {bits.equal + len(bits.faults)} tensors that were read back {len(bits.differing)} differ from "
            f"SOURCE and {len(bits.missing)} are on one side only: {_some(bits.faults)}. OUT was not made"
        )
    if found.logits is not None and found.logits > MAX_LOGIT_DIFFERENCE:
        raise RuntimeError(
            f"slime convert {source}: every tensor is equal to the bit, but the logits of megatron-core and transformers differ by "
            f"{found.logits:.1e}, more than {MAX_LOGIT_DIFFERENCE:.0e}: they compute different models. OUT was not made; {NO_LOGITS} makes "
            "it all the same"
        )


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"slime convert: OUT={out} exists and is not an empty directory; name another")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"slime convert: OUT={out}: no directory {out.absolute().parent}; make it first")


def _check_memory(model_map: ModelMap, itemsize: int, logits: bool) -> None:
    """Raises RuntimeError where memory is short. The two models whose logits are compared are held one after the other."""
    parameters, free = _elements(model_map.hf_shapes), psutil.virtual_memory().available
    convert, compare = (int(copies * itemsize * parameters) + ITSELF for copies, itemsize in ((COPIES, itemsize), (1.25, 4)))
    if convert > free:
        raise RuntimeError(f"slime convert: {_gib(convert)} of memory are needed, {_gib(free)} are free; use a larger machine")
    if logits and compare > free:
        raise RuntimeError(
            f"slime convert: comparing logits in fp32 needs {_gib(compare)} of memory, {_gib(free)} are free; {NO_LOGITS} leaves it out"
        )


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes OUT when the block ends well, and is removed when it does not."""
    folder = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        fsync_directory(folder)
        os.rename(folder, out)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
