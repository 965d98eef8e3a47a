"""What torch calls the bits of an element: it has unsigned integers of one byte only."""

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
