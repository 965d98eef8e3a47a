"""What is written of a tensor is what torch's reader wants, and no copy of a large one."""

import io

import pytest
import torch

from slime.trainer.snapshot import COPIED, _serialised

LARGE = COPIED // 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(7.0),
        torch.arange(float(LARGE)).view(4, -1),
        torch.arange(2.0 * LARGE)[LARGE:],  # a part of a buffer
        torch.arange(float(LARGE)).view(4, -1).t(),
        torch.arange(LARGE * 2).to(torch.bfloat16),
        torch.tensor(3.0),
        torch.empty(0, 3),
    ],
    ids=["small", "large", "part", "strided", "bf16", "scalar", "empty"],
)
def test_the_pieces_of_a_tensor_are_a_file_of_torch(tensor: torch.Tensor) -> None:
    content = b"".join(_serialised(tensor))
    read = torch.load(io.BytesIO(content), weights_only=True)
    assert torch.equal(read, tensor) and read.dtype == tensor.dtype
    assert len(content) < tensor.nbytes + 4096, "what lies around it is not written"


def test_a_large_tensor_is_written_out_of_its_own_memory() -> None:
    tensor = torch.zeros(3 * LARGE)[LARGE:]
    pieces = list(_serialised(tensor))
    tensor.fill_(1.0)
    assert torch.equal(torch.load(io.BytesIO(b"".join(pieces)), weights_only=True), torch.ones(2 * LARGE))
    assert [len(piece) == tensor.nbytes for piece in pieces] == [False, True, False]


def test_other_objects_are_written_as_they_are() -> None:
    assert b"".join(_serialised(io.BytesIO(b"abc"))) == b"abc"
