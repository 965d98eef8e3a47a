"""Weights on the wire to stock SGLang: a bucket of Hugging Face tensors as base64 of a plain pickle.

SGLang's own serialiser passes CPU tensors as file descriptors, which only its parent process may hand over; from any other process the
server dies. A plain pickle holds the data inline, works from any host, and SGLang's restricted unpickler accepts it.
"""

import base64
import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the module takes seconds to import, and an agent imports this one before it starts its servers
    import torch


def serialise(bucket: Sequence[tuple[str, "torch.Tensor"]]) -> str:
    """What /update_weights_from_tensor takes for one TP rank. Every rank gets whole tensors and keeps its part."""
    stream = io.BytesIO()
    pickle.dump([(name, _alone(tensor)) for name, tensor in bucket], stream, protocol=pickle.HIGHEST_PROTOCOL)
    return base64.b64encode(stream.getbuffer()).decode("ascii")


def _alone(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor on the CPU, contiguous, without grad, and with no other bytes in its storage: a pickle holds the whole storage."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
