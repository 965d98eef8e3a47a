"""Weights on the wire to stock SGLang: a bucket of Hugging Face tensors as base64 of a plain pickle.

SGLang's own serialiser passes CPU tensors as file descriptors, which only its parent process may hand over; from any other process the
server dies. A plain pickle holds the data inline, works from any host, and SGLang's restricted unpickler accepts it.
"""

import base64
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the module takes seconds to import, and an agent imports this one before it starts its servers
    import torch

ATTENTION = ".self_attn."


def together(found: "Iterable[Sequence[tuple[str, torch.Tensor]]]") -> "Iterator[list[tuple[str, torch.Tensor]]]":
    """The same tensors in the same order; those of one attention, which follow one another, are never divided between buckets. SGLang fuses
    some of them (q_a_proj with kv_a_proj_with_mqa), and drops one that comes in an update without the other."""
    held: list[tuple[str, torch.Tensor]] = []
    for bucket in found:
        held += bucket
        cut = len(held)
        while cut and (owner := _attention(held[cut - 1][0])) and owner == _attention(held[-1][0]):
            cut -= 1
        if cut:
            yield held[:cut]
        held = held[cut:]
    if held:
        yield held


def _attention(name: str) -> str:
    """The attention that a tensor belongs to; empty where it belongs to none."""
    return name.partition(ATTENTION)[0] if ATTENTION in name else ""


def serialise(bucket: Sequence[tuple[str, "torch.Tensor"]]) -> str:
    """What /update_weights_from_tensor takes for one TP rank. Every rank gets whole tensors and keeps its part."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump([(name, _alone(tensor)) for name, tensor in bucket])
    return base64.b64encode(stream.getbuffer()).decode("ascii")


class _Pickler(pickle.Pickler):
    """torch pickles tensors of 8-bit floats in a form that it cannot always read again; here they are bytes, with their dtype."""

    def reducer_override(self, found: Any) -> Any:
        import torch

        if not isinstance(found, torch.Tensor) or found.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return NotImplemented
        storage = torch.storage.TypedStorage(wrap_storage=found.untyped_storage(), dtype=torch.uint8, _internal=True)
        return torch._utils._rebuild_tensor_v3, (storage, 0, tuple(found.shape), found.stride(), False, OrderedDict(), found.dtype)


def _alone(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor on the CPU, contiguous, without grad, and with no other bytes in its storage: a pickle holds the whole storage."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
