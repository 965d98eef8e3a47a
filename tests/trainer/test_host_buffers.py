"""Host memory of checkpoints is made once and kept."""

import pytest
import torch

from slime.trainer.host_buffers import HostBuffers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
def test_a_copy_has_the_bits_and_memory_of_its_own(shape, dtype) -> None:
    buffers = HostBuffers(pinned=False)
    tensor = torch.randint(0, 100, shape).to(dtype)
    held = buffers.copy("x", tensor)
    assert torch.equal(held, tensor) and held.dtype == dtype and held.shape == tensor.shape
    assert buffers.holds(held) and not buffers.holds(tensor)


def test_the_next_one_lies_where_the_last_one_lay() -> None:
    buffers = HostBuffers(pinned=False)
    first = buffers.copy("x", torch.ones(4, 3))
    second = buffers.copy("x", torch.zeros(4, 3).t().contiguous().t())
    assert second.data_ptr() == first.data_ptr() and second.is_contiguous() and not first.any()
    assert buffers.holds(second[1:, 2]) and buffers.take("y", (4,), torch.float32).data_ptr() != first.data_ptr()


def test_a_name_keeps_its_shape() -> None:
    buffers = HostBuffers(pinned=False)
    buffers.take("x", (2, 3), torch.float32)
    with pytest.raises(AssertionError, match=r"x was torch\.float32\[2, 3\] at the save before"):
        buffers.take("x", (3, 2), torch.float32)
