"""Hugging Face directories into megatron-core's distributed checkpoints and back, in this process alone.

A checkpoint that is made here has a folder `hf` beside its shards, with all that the way back needs:

    OUT/  metadata.json  common.pt  .metadata  __0_0.distcp
          hf/  config.json, tokenizer and the like   origin.json: family, and the dtype of every HF tensor
               kept/model.safetensors: tensors that training carries along, where there are any
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.models.config_json import ConfigJson
from slime.models.hf_files import COMPANIONS, DTYPES, HFReader, HFWriter
from slime.models.hf_headers import SINGLE
from slime.models.hf_stream import NAMES, SafetensorsStream, room_for
from slime.models.map import ModelMap
from slime.models.registry import FAMILIES, load_map
from slime.observe.console import Console
from slime.trainer import names, proof, shards
from slime.trainer.alone import alone
from slime.trainer.distributed import Parallel
from slime.trainer.export import assemble
from slime.trainer.model import bias_dtypes, build_stages, load_hf
from slime.trainer.options import sort_options

HF, KEPT, ORIGIN = "hf", "kept", "origin.json"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class MegatronSource:
    """A distributed checkpoint and what it takes to make a Hugging Face model of it."""

    shards: Path  # megatron-core's folder
    model: Path  # a directory with config.json and tokenizer
    map: ModelMap
    kept: Path | None  # whose safetensors hold the tensors that were carried along
    dtypes: dict[str, torch.dtype]  # HF tensor -> what it is to be, where that loses nothing; others stay what the checkpoint holds


@dataclass(frozen=True)
class Converted:
    """What a conversion did and found."""

    map: ModelMap
    dtype: torch.dtype  # that the distributed checkpoint holds
    bits: proof.Comparison
    left_out: tuple[str, ...]  # HF tensors that follow from others
    logits: float | None  # largest difference; None: not compared


@dataclass
class Held:
    """A model in memory, whole, without anything that training needs."""

    map: ModelMap
    config: TransformerConfig
    gpt: GPTModel

    def tensors(self, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        """The HF tensors, in the dtypes that are given where these lose nothing, one parameter's at a time."""
        for name, tensor in names.tensors(self.gpt):
            if name in self.map.layouts:
                for hf, whole in assemble(self.map, name, [tensor.data]):
                    yield hf, _narrow(whole, dtypes.get(hf, whole.dtype))


def of_convert(path: Path) -> MegatronSource:
    """A checkpoint that `to_megatron` made. Raises ValueError where its `hf` folder is not whole."""
    hf = path / HF
    try:
        origin = json.loads((hf / ORIGIN).read_text(encoding="utf-8"))
        model_map = FAMILIES[origin["family"]].build(ConfigJson(hf), 1)
        dtypes = {name: DTYPES[dtype] for name, dtype in origin["dtypes"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{hf / ORIGIN}: not as `slime convert` writes it ({error!r}); convert the model again") from error
    kept = hf / KEPT if (hf / KEPT).is_dir() else None
    if kept is not None:
        with HFReader(kept) as reader:
            model_map = replace(model_map, kept_shapes={name: reader.shape(name) for name in reader.names})
    return MegatronSource(path, hf, model_map, kept, dtypes)


def of_run(trainer: Path, model: Path, family: str) -> MegatronSource:
    """The trainer's folder of a run's checkpoint, and the model that the run began from. Raises ValueError for such a model that cannot
    be used."""
    model_map = load_map(model, family)
    return MegatronSource(trainer, model, model_map, model if model_map.kept_shapes else None, bias_dtypes(model_map, model))


def to_megatron(source: Path, model_map: ModelMap, out: Path, console: Console, logits: bool) -> Converted:
    """Write the HF model of a directory as a distributed checkpoint into folder `out`, read it again, and compare."""
    dtype = dtype_for(model_map, source)
    with HFReader(source) as reader:
        left_out = set(reader.names) - set(model_map.hf_shapes) - set(model_map.kept_shapes)
        with alone() as parallel:
            held = _build(model_map, dtype, parallel)
            with _counting(console, "load", len(model_map.layouts)) as count:
                load_hf([held.gpt], model_map, source, parallel, count)
            with console.bar("write", None):
                shards.save_weights(held.gpt, parallel, out)
                _write_companions(source, model_map, reader, out / HF)
            with console.bar("read back", None):
                _forget(held.gpt)
                shards.load_weights(held.gpt, parallel, out)
            back = of_convert(out)
            with _counting(console, "compare bits", len(model_map.hf_shapes) + len(model_map.kept_shapes)) as count:
                bits = proof.compare(_everything(held, back), reader, left_out, count)
            ours, rows = _our_logits(held) if logits and not bits.faults else (None, [])
            del held
    return Converted(model_map, dtype, bits, tuple(sorted(left_out)), _difference(console, ours, source, rows))


def to_hf(source: MegatronSource, out: Path, console: Console, logits: bool) -> Converted:
    """Write a distributed checkpoint as an HF directory into folder `out`, read it again, and compare."""
    model_map, dtype = source.map, held_dtype(source.shards)
    shapes = {**model_map.hf_shapes, **model_map.kept_shapes}
    with alone() as parallel:
        held = _build(model_map, dtype, parallel)
        with console.bar("load", None):
            shards.load_weights(held.gpt, parallel, source.shards)
        with _counting(console, "write", len(shapes)) as count, HFWriter(out, source.model, shapes) as writer:
            for name, tensor in _everything(held, source):
                writer.write(name, tensor)
                count(name)
        with _counting(console, "compare bits", len(shapes)) as count, HFReader(out) as reader:
            bits = proof.compare(_everything(held, source), reader, set(), count)
        ours, rows = _our_logits(held) if logits and not bits.faults else (None, [])
        del held
    return Converted(model_map, dtype, bits, (), _difference(console, ours, out, rows))


def dtype_for(model_map: ModelMap, source: Path) -> torch.dtype:
    """What megatron-core has to hold the model of an HF directory in to lose nothing. Routers keep their bias in fp32 anyway."""
    with HFReader(source) as reader:
        parameters = (layout for name, layout in model_map.layouts.items() if not model_map.is_router_bias(name))
        held = {reader.dtype(tensor.name) for layout in parameters for tensor in layout.sources}
    return torch.bfloat16 if held == {torch.bfloat16} else torch.float32


def held_dtype(directory: Path) -> torch.dtype:
    """What the weights of a distributed checkpoint are held in. Raises ValueError where they are not those of a GPTModel."""
    held = dist_checkpointing.load_tensors_metadata(str(directory))
    if EMBEDDING not in held:
        raise ValueError(f"{directory}: no tensor {EMBEDDING} there; give a checkpoint that slime wrote")
    return held[EMBEDDING].dtype


def _build(model_map: ModelMap, dtype: torch.dtype, parallel: Parallel) -> Held:
    config, stages = build_stages(model_map, dtype, parallel, sort_options({}))
    return Held(model_map, config, stages[0])


def _everything(held: Held, source: MegatronSource) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of a checkpoint: the model's, then those that were carried along."""
    yield from held.tensors(source.dtypes)
    if source.kept is not None:
        with HFReader(source.kept) as reader:
            for name in held.map.kept_shapes:
                yield name, reader.read(name)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, where that holds the same values; as it is where it does not."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _write_companions(source: Path, model_map: ModelMap, reader: HFReader, hf: Path) -> None:
    """The folder `hf` of a distributed checkpoint."""
    hf.mkdir()
    for file in ("config.json", *COMPANIONS):
        if (source / file).is_file():
            shutil.copyfile(source / file, hf / file)
    dtypes = {name: NAMES[reader.dtype(name)] for name in model_map.hf_shapes}
    (hf / ORIGIN).write_text(json.dumps({"family": model_map.family, "dtypes": dtypes}, indent=1) + "\n", encoding="utf-8")
    if not model_map.kept_shapes:
        return
    (hf / KEPT).mkdir()
    wide_first = sorted(model_map.kept_shapes, key=lambda name: -reader.dtype(name).itemsize)  # each begins at a multiple of its size
    stream = SafetensorsStream(hf / KEPT / SINGLE, room_for(wide_first))
    for name in wide_first:
        stream.add(name, reader.read(name))
    stream.close()


@torch.no_grad()
def _forget(gpt: GPTModel) -> None:
    """So that what is there afterwards was read."""
    for _, tensor in names.tensors(gpt):
        tensor.fill_(torch.nan)


def _our_logits(held: Held) -> tuple[Tensor, list[Tensor]]:
    rows = proof.sequences(held.map.vocab_size, held.map.gpt["max_sequence_length"])
    return proof.megatron_logits(held.gpt, held.config, rows, held.map.vocab_size), rows


def _difference(console: Console, ours: Tensor | None, path: Path, rows: list[Tensor]) -> float | None:
    """The largest one between our logits and transformers'. Infinite where one of them is no number."""
    if ours is None:
        return None
    with console.bar("compare logits", None):
        difference = (ours - proof.transformers_logits(path, rows)).abs().max().item()
    return difference if difference == difference else float("inf")


@contextlib.contextmanager
def _counting(console: Console, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that moves by one a call."""
    with console.bar(what, total) as bar:
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(done, name)

        yield count
