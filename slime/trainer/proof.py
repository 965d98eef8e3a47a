"""What proves a conversion: tensors that are equal to the bit, and logits that are transformers' own."""

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.models.hf_files import HFReader
from slime.trainer.attention import PackedSequences

MAX_LOGIT_DIFFERENCE = 1e-4  # in fp32
LENGTHS = (37, 21, 21, 5)  # of the sequences whose logits are compared
BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class Comparison:
    """What a comparison of tensors found."""

    equal: int = 0
    differing: list[str] = field(default_factory=list)  # in bits, dtype or shape
    missing: list[str] = field(default_factory=list)  # on one side only

    @property
    def faults(self) -> list[str]:
        return [*self.differing, *self.missing]


def compare(tensors: Iterable[tuple[str, Tensor]], reader: HFReader, leave_out: set[str], compared: Callable[[str], None]) -> Comparison:
    """Compare HF tensors with those of a directory bit by bit; `leave_out` are names that may be missing among `tensors`. `compared` is
    told each name."""
    found, unseen = Comparison(), set(reader.names)
    for name, tensor in tensors:
        if name not in unseen:
            found.missing.append(name)
        elif same_bits(tensor, reader.read(name)):
            found.equal += 1
        else:
            found.differing.append(name)
        unseen.discard(name)
        compared(name)
    found.missing += sorted(unseen - leave_out)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(BITS[a.itemsize]), b.contiguous().view(BITS[b.itemsize]))
    )


def sequences(vocab: int, longest: int) -> list[Tensor]:
    """int64 [n] each, the tokens whose logits are compared: always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocab, (min(n, longest),), generator=generator) for n in LENGTHS]


@torch.no_grad()
def megatron_logits(gpt: GPTModel, config: TransformerConfig, rows: list[Tensor], vocab: int) -> Tensor:
    """fp32 [tokens, vocab] of a model on this rank alone, which is turned into fp32 for good."""
    gpt.float().eval()
    config.params_dtype, config.pipeline_dtype, config.bf16 = torch.float32, torch.float32, False
    row, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(r)) for r in rows])[None]
    packed = PackedSequences.of([len(r) for r in rows], positions[0])
    return gpt(row, positions, None, packed_seq_params=packed).reshape(-1, gpt.vocab_size)[:, :vocab].float().clone()


@torch.no_grad()
def transformers_logits(path: Path, rows: list[Tensor]) -> Tensor:
    """fp32 [tokens, vocab] of the model in an HF directory."""
    gc.collect()  # megatron-core's model refers to itself
    hide_broken_torchvision()
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # there is one already
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    return torch.cat([model(row[None]).logits[0] for row in rows])


def hide_broken_torchvision() -> None:
    """transformers imports torchvision beside every model class. Where its wheel was built for another torch that fails, though a language
    model has no use for it."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # as if it were not installed
