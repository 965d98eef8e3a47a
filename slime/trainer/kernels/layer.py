"""What lies between the matrix products of a transformer layer, each in one pass over memory: norm, gated activation, and the way from a
row of projected heads to what attention takes. For Triton (`layer_programs`); where it does not run, megatron-core's own modules do.

Values are computed in fp32 and rounded once. Log-probs of trainer and engines differ by the rounding of both, and a stream of residuals is
rounded twice in every layer. Here what rounding takes from a sum goes along beside it, as a second tensor (`added`), into the norm that
follows and into the next sum.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 1024  # that share the rows of a gradient which adds up over rows
BLOCK = 1024
LOW = "low"  # of a sum: what rounding took from it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; in the dtype of x. Of a sum that `added` made, before it was rounded."""
    return _Norm.apply(x, weight, eps, x.__dict__.get(LOW))


def added(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual, of one dtype, rounded to it, and beside it what rounding took. Of a residual that `added` made that is summed too, and
    forgotten here: the graph, which keeps sums, is not to keep it as well."""
    if x.dtype == torch.float32:
        return x + residual
    total, low = _Added.apply(x, residual, residual.__dict__.pop(LOW, None))
    setattr(total, LOW, low)
    return total


def swiglu(pair: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]: silu(first half) * second half."""
    return _SwiGLU.apply(pair)


@dataclass(frozen=True)
class Turn:
    """How heads are rotated (RoPE, arXiv:2104.09864)."""

    angles: Tensor  # fp32 [positions, rotated channels], each angle twice: halves one after the other, or interleaved
    positions: Tensor  # int64 [T], of each token in its sequence
    interleaved: bool
    mscale: float = 1.0


def heads(mixed: Tensor, weights: tuple[Tensor, Tensor] | None, groups: int, size: int, turn: Turn, eps: float) -> tuple[Tensor, ...]:
    """(queries [T, groups * shared, size], keys and values [T, groups, size]) from a row of projected heads a token.

    mixed     [T, groups * (shared + 2) * size]: a group's queries, its key, its value, and then the next group
    weights   of the norms of queries and keys, [size] each; None: they are not normed
    """
    return _Heads.apply(mixed, *(weights or (None, None)), groups, size, turn, eps)


def made_by(make: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    """The tensor, which says how it is made again: the same bits, but for a norm's of a sum, which is then that of the rounded one."""
    tensor.make = make  # type: ignore[attr-defined]
    return tensor


@contextmanager
def forgetting(tensor: Tensor) -> Iterator[None]:
    """Inside, who saves for its backward pass what `made_by` returned keeps nothing, and gets it made again then."""
    make: Callable[[], Tensor] = tensor.make  # type: ignore[attr-defined]
    place, size = tensor.data_ptr(), tensor.numel()  # torch keeps the hooks, and with them what they hold

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == place and saved.numel() == size else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, low: Tensor | None) -> Tensor:
        from slime.trainer.kernels import layer_programs as programs

        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows:
            programs.norm[(rows,)](x, x if low is None else low, weight, out, scales, width, eps, LOW=low is not None, **_over(width))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        from slime.trainer.kernels import layer_programs as programs

        x, weight, scales = ctx.saved_tensors
        rows, width = len(scales), x.shape[-1]
        d_x, shares = torch.empty_like(x), min(rows, PROGRAMS)
        d_weights = torch.empty(shares, width, dtype=torch.float32, device=x.device)
        if rows:
            programs.norm_gradient[(shares,)](d_out.contiguous(), x, weight, scales, d_x, d_weights, rows, width, **_over(width))
        return d_x, d_weights.sum(0).to(weight.dtype), None, None


def _over(width: int) -> dict[str, int]:
    """How a program takes a row of this width."""
    block = _power_of_two(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor]:
        from slime.trainer.kernels import layer_programs as programs

        x, residual = x.contiguous(), residual.contiguous()
        total, left = torch.empty_like(x), torch.empty_like(x)
        count = x.numel()
        if count:
            of = x if low is None else low
            programs.add[(-(-count // BLOCK),)](x, residual, of, total, left, count, LOW=low is not None, BLOCK=BLOCK)
        ctx.mark_non_differentiable(left)
        return total, left

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return d_total, d_total, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Tensor) -> Tensor:
        from slime.trainer.kernels import layer_programs as programs

        pair = pair.contiguous()
        width = pair.shape[-1] // 2
        rows = pair.numel() // (2 * width)
        out = pair.new_empty(*pair.shape[:-1], width)
        if rows:
            programs.swiglu[(rows, -(-width // BLOCK))](pair, out, width, BLOCK=BLOCK)
        ctx.save_for_backward(pair)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        from slime.trainer.kernels import layer_programs as programs

        (pair,) = ctx.saved_tensors
        width = pair.shape[-1] // 2
        rows, d_pair = pair.numel() // (2 * width), torch.empty_like(pair)
        if rows:
            programs.swiglu_gradient[(rows, -(-width // BLOCK))](d_out.contiguous(), pair, d_pair, width, BLOCK=BLOCK)
        return d_pair


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, groups: int, size: int, turn: Turn, eps: float
    ) -> tuple[Tensor, ...]:
        from slime.trainer.kernels import layer_programs as programs

        mixed = mixed.contiguous()
        ctx.save_for_backward(mixed, q_weight, k_weight)
        ctx.groups, ctx.size, ctx.turn, ctx.eps = groups, size, turn, eps
        tokens, shared = len(mixed), mixed.shape[1] // (groups * size) - 2
        found = []
        for kind, weight in ((Kind(groups, shared, shared + 2, 0), q_weight), (Kind(groups, 1, shared + 2, shared), k_weight)):
            out = mixed.new_empty(tokens, kind.count, size)
            numbers = (turn.angles, turn.positions, groups * (shared + 2), eps, turn.mscale)
            if tokens:
                of = mixed if weight is None else weight
                programs.heads[(tokens,)](mixed, out, of, *numbers, **kind.constants(size, turn, weight is not None))
            found.append(out)
        values = mixed.view(tokens, groups, shared + 2, size)[:, :, shared + 1].contiguous()
        return (*found, values)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        from slime.trainer.kernels import layer_programs as programs

        mixed, q_weight, k_weight = ctx.saved_tensors
        groups, size, turn, d_mixed = ctx.groups, ctx.size, ctx.turn, torch.empty_like(mixed)
        tokens, shared = len(mixed), mixed.shape[1] // (groups * size) - 2
        shares, d_weights = min(tokens, PROGRAMS), []
        kinds = (Kind(groups, shared, shared + 2, 0), Kind(groups, 1, shared + 2, shared))
        for kind, weight, d_out in zip(kinds, (q_weight, k_weight), (d_q, d_k), strict=True):
            d_weight = torch.empty(shares, size, dtype=torch.float32, device=mixed.device)
            numbers = (turn.angles, turn.positions, d_mixed, d_weight, tokens, groups * (shared + 2), ctx.eps, turn.mscale)
            if tokens:
                of = mixed if weight is None else weight
                constants = kind.constants(size, turn, weight is not None)
                programs.heads_gradient[(shares,)](d_out.contiguous(), mixed, of, *numbers, **constants)
            d_weights.append(None if weight is None else d_weight.sum(0).to(weight.dtype))
        d_mixed.view(tokens, groups, shared + 2, size)[:, :, shared + 1] = d_v
        return d_mixed, *d_weights, None, None, None, None


@dataclass(frozen=True)
class Kind:
    """Which heads of a row: `shared` of every `group`, from the `first` on."""

    groups: int
    shared: int
    group: int
    first: int

    @property
    def count(self) -> int:
        return self.groups * self.shared

    def constants(self, size: int, turn: Turn, normed: bool) -> dict[str, Any]:
        """What a program of these heads is compiled for."""
        tile = _power_of_two(self.count)
        return {
            "SIZE": size, "TURNED": turn.angles.shape[1], "INTERLEAVED": turn.interleaved, "NORMED": normed,
            "COUNT": self.count, "SHARED": self.shared, "GROUP": self.group, "FIRST": self.first, "HEADS": tile,
            "num_warps": min(8, max(1, tile * size // 1024)),
        }  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
