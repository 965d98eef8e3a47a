"""Weights as bits out of a Hugging Face directory, and into one. torch is imported when a function is called."""

from pathlib import Path

import numpy as np

from slime.sync.fold import Weights
from slime.sync.records import ModelSpec


def read_bits(path: Path, model: ModelSpec) -> list[np.ndarray]:
    """Bits of each tensor of a model, in its order and dtypes (a checkpoint in another one is cast, as the trainer does). Raises ValueError
    for a directory that lacks one, or has one of another shape."""
    import torch

    from slime.models.hf_files import HFReader

    found = []
    with HFReader(path) as reader:
        for spec in model.tensors:
            if reader.shape(spec.name) != spec.shape:
                raise ValueError(
                    f"{path}: {spec.name} has shape {reader.shape(spec.name)}, the run's has {spec.shape}: name its model.path"
                )
            tensor = reader.read(spec.name).to(getattr(torch, spec.dtype)).reshape(-1).contiguous()
            found.append(tensor.view(torch.uint8).numpy().copy().view(spec.type.bits))
    return found


def write_hf(weights: Weights, source: Path, out: Path) -> None:
    """A Hugging Face directory with these weights; config, tokenizer, and tensors that never travel are those of `source`."""
    import torch

    from slime.models.hf_files import HFReader, HFWriter

    with HFReader(source) as reader, HFWriter(out, source) as writer:
        for spec, bits in zip(weights.model.tensors, weights.bits, strict=True):
            tensor = torch.from_numpy(bits.view(np.uint8).copy()).view(getattr(torch, spec.dtype))
            writer.write(spec.name, tensor.reshape(spec.shape))
        for name in reader.names:
            if name not in weights.model.index:
                writer.write(name, reader.read(name))
