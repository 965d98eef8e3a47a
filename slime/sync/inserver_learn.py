"""Learns a rank's live map by watching what `model.load_weights` would write where, without letting it write.

The model loads *stand-ins*: tensors with the names, shapes and dtypes of the HF tensors and no memory. A stand-in is dispatched here
from whichever thread uses it. It knows which element of which HF tensor each of its elements is:

    plain    a strided view of one HF tensor: an offset and strides
    labels   elements of HF tensors in any order, after a concatenation or a copy that moved them: int64, number << 40 | position
    spoiled  a result of arithmetic, or of a cast: it depends on HF tensors and is none of their elements

A copy of a plain or labelled stand-in into a storage of the model becomes moves; of a spoiled one, or with another dtype, it makes its HF
tensors opaque. Everything else that would write to the model is watched by a dispatch mode, and what it computed that from is followed: a
storage that is written with something computed from other storages is derived (the absorbed projections of latent attention).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from slime.layout import Block
from slime.sync.inserver_lives import LiveTensors
from slime.sync.livemap import LiveMap, LiveMove, complement, divided, paired
from slime.sync.records import ModelSpec

aten = torch.ops.aten
SHIFT = 40  # bits of a position in a label
MOST_PIECES = 4096  # moves that one copy of labels may become
MOST_DIVISIONS = 256  # moves that one copy of a view may become
MOST_SINGLES = 1 << 16  # stretches of one element that a move may have: more are too slow to hash
MOVES_ONLY = {  # beside views: what puts elements elsewhere and leaves them as they are
    aten.cat.default,
    aten.stack.default,
    aten.clone.default,
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten._reshape_copy.default,
    aten.index_select.default,
    aten.flip.default,
}
COPIES = {aten.clone.default, aten._to_copy.default}


class CannotLearn(ValueError):
    """load_weights does with its tensors what no map can follow."""


class StandIn(torch.Tensor):
    """See the module. `stands` is a meta tensor with the strides that it has in the HF tensor (plain), the labels, or any meta tensor."""

    stands: torch.Tensor
    recorder: "Recorder"
    number: int | None  # of the HF tensor, if plain
    numbers: frozenset[int]  # of all that it depends on
    why: str | None  # if spoiled

    @staticmethod
    def __new__(
        cls, inner: torch.Tensor, dtype: torch.dtype, recorder: "Recorder", number: int | None, numbers: frozenset[int], why: str | None
    ) -> "StandIn":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=0, dtype=dtype, device=torch.device("meta"), requires_grad=False
        )
        made.stands, made.recorder, made.number, made.numbers, made.why = inner, recorder, number, numbers, why
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat = tree_flatten((args, kwargs))[0]
        recorder = next(arg for arg in flat if isinstance(arg, StandIn)).recorder
        return recorder.use(func, args, kwargs or {})

    def labels(self) -> torch.Tensor:
        """int64 of its shape, if plain or labels."""
        if self.number is None:
            return self.stands
        return _positions(self.stands) + (self.number << SHIFT)


@dataclass
class Recorder:
    """What was written where. `lives` are the storages of the model."""

    spec: ModelSpec
    lives: LiveTensors
    moves: list[LiveMove] = field(default_factory=list)
    opaque: dict[int, str] = field(default_factory=dict)
    derived: dict[int, set[int]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)  # storages
    origins: dict[int, tuple[set[int], set[int]]] = field(default_factory=dict)  # storage address -> (storages, HF tensors) it comes from
    kept: list[torch.Tensor] = field(default_factory=list)  # so that no address is used again

    def stand_ins(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, tensor in enumerate(self.spec.tensors):
            dtype = getattr(torch, tensor.dtype)
            yield tensor.name, StandIn(torch.empty(tensor.shape, dtype=dtype, device="meta"), dtype, self, i, frozenset({i}), None)

    # --- with stand-ins -------------------------------------------------------------------------------------------

    def use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation on stand-ins."""
        targets = _written(func, args, kwargs)
        if targets:
            for target in targets:
                self._write(func, target, args, kwargs)
            return targets[0]
        used = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, StandIn)]
        numbers = frozenset().union(*(arg.numbers for arg in used))
        spoiled = next((arg.why for arg in used if arg.why), None)
        dtype = used[0].dtype
        if spoiled is None and self._moves_only(func, args, kwargs, dtype):
            if func in COPIES:
                return StandIn(used[0].stands, dtype, self, used[0].number, numbers, None)
            if func.is_view and used[0].number is not None:
                made = self._view(func, args, kwargs, used[0])
                if made is not None:
                    return made
            result = self._on(func, args, kwargs, lambda arg: arg.labels().contiguous() if func.is_view else arg.labels())
            return self._wrap(result, dtype, None, numbers, None)
        why = spoiled or str(func)
        if not all("Tensor" in str(value.type) for value in func._schema.returns):
            raise CannotLearn(f"load_weights reads the values of {self._names(numbers)} ({func})")
        result = self._on(func, args, kwargs, lambda arg: torch.empty(arg.shape, dtype=arg.dtype, device="meta"), meta=True)
        return self._wrap(result, None, None, numbers, why)

    def _moves_only(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> bool:
        """Whether the result is made of elements of stand-ins, unchanged."""
        if func is aten.view.dtype or not (func.is_view or func in MOVES_ONLY):
            return False
        if func in COPIES:
            return kwargs.get("dtype") in (None, dtype)
        of = args[:1] if func is aten.index_select.default else args
        tensors = [arg for arg in tree_flatten((of, kwargs))[0] if isinstance(arg, torch.Tensor)]
        return all(isinstance(arg, StandIn) and arg.dtype == dtype for arg in tensors)

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: StandIn) -> Any:
        """A view of a plain stand-in; None where a copy that was taken for plain is not laid out as the view needs."""
        try:
            result = self._on(func, args, kwargs, lambda arg: arg.stands)
        except RuntimeError:
            return None
        return self._wrap(result, source.dtype, source.number, source.numbers, None)

    def _on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Callable[[StandIn], torch.Tensor], meta: bool = False
    ) -> Any:
        def replace(arg: torch.Tensor) -> torch.Tensor:
            if isinstance(arg, StandIn):
                return inner(arg)
            return torch.empty_like(arg, device="meta") if meta else arg

        args, kwargs = tree_map_only(torch.Tensor, replace, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = "meta" if meta else None
        return func(*args, **kwargs)

    def _wrap(self, result: Any, dtype: torch.dtype | None, number: int | None, numbers: frozenset[int], why: str | None) -> Any:
        return tree_map_only(torch.Tensor, lambda inner: StandIn(inner, dtype or inner.dtype, self, number, numbers, why), result)

    def _write(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, StandIn)]
        numbers = frozenset().union(*(arg.numbers for arg in used))
        live = None if isinstance(target, StandIn) else self.lives.of(target)
        if isinstance(target, StandIn):
            target.why, target.number, target.numbers = str(func), None, target.numbers | numbers
        elif live is None:
            self.origins.setdefault(_address(target), (set(), set()))[1].update(numbers)
            self.kept.append(target)
        else:
            self.written.add(live)
            source = args[1] if func is aten.copy_.default else None
            why = self._copy(live, target, source) if isinstance(source, StandIn) else f"written by {func}"
            if why is not None:
                self.opaque |= {number: f"{self.lives.name(live)}: {why}" for number in numbers}

    def _copy(self, live: int, target: torch.Tensor, source: StandIn) -> str | None:
        """Record target.copy_(source). Returns why it is opaque, None where it is moves."""
        if source.why is not None:
            return f"computed by {source.why}"
        dtype = self.lives.dtype(live)
        if source.dtype != target.dtype or target.dtype != dtype:
            return f"cast from {source.dtype} to {target.dtype}"
        if not target.numel():
            return None
        view = (int(target.storage_offset()), target.stride())
        inner = source.stands.expand(target.shape)
        if source.number is None:
            pairs = _label_blocks(inner.numpy().reshape(-1), _positions(target).numpy().reshape(-1))
        else:
            divisions = divided((int(inner.storage_offset()), inner.stride()), view, target.shape, MOST_DIVISIONS)
            pairs = None if divisions is None else [(source.number, *pair) for pair in divisions]
        if pairs is None:
            return "elements in another order"
        found = [LiveMove(number, block, live, place) for number, block, place in pairs]
        if any(move.stretch == 1 and move.source.size > MOST_SINGLES for move in found):
            return "elements far apart"
        self.moves += found
        return None

    def _names(self, numbers: Iterable[int]) -> str:
        return ", ".join(self.spec.tensors[number].name for number in sorted(numbers))

    # --- without ----------------------------------------------------------------------------------------------------

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation on other tensors: done, unless it would write to the model."""
        tensors = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, torch.Tensor)]
        targets = _written(func, args, kwargs)
        lives, numbers = self._from(tensors)
        for target in targets:
            live = self.lives.of(target)
            if live is not None:
                self.written.add(live)
                if lives - {live}:
                    self.derived.setdefault(live, set()).update(lives - {live})
                self.opaque |= {number: f"{self.lives.name(live)}: written by {func} by way of another tensor" for number in numbers}
        if any(self.lives.of(target) is not None for target in targets):
            return targets[0]
        result = func(*args, **kwargs)
        if lives or numbers:
            for made in [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)] + targets:
                if self.lives.of(made) is None and made.device.type != "meta":
                    self.kept.append(made)
                    known = self.origins.setdefault(_address(made), (set(), set()))
                    known[0].update(lives)
                    known[1].update(numbers)
        return result

    def _from(self, tensors: Iterable[torch.Tensor]) -> tuple[set[int], set[int]]:
        lives: set[int] = set()
        numbers: set[int] = set()
        for tensor in tensors:
            live = self.lives.of(tensor)
            if live is not None:
                lives.add(live)
            elif tensor.device.type != "meta":
                known = self.origins.get(_address(tensor), (set(), set()))
                lives |= known[0]
                numbers |= known[1]
        return lives, numbers


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        use = self._recorder.use if any(isinstance(arg, StandIn) for arg in tree_flatten((args, kwargs))[0]) else self._recorder.follow
        return use(func, args, kwargs or {})


def learn(model: Any, spec: ModelSpec, lives: LiveTensors) -> tuple[LiveMap, frozenset[int]]:
    """The map of the model's storages, and those that load_weights writes to.

    Raises CannotLearn where load_weights looks at values, or writes two HF tensors to the same elements."""
    recorder = Recorder(spec, lives)
    with torch.no_grad(), _Watch(recorder):
        model.load_weights(recorder.stand_ins())
    moves = sorted(set(recorder.moves), key=lambda move: (move.tensor, move.live, move.target.offset))
    derived = {live: tuple(sorted(of)) for live, of in recorder.derived.items()}
    if derived and not callable(getattr(model, "post_load_weights", None)):
        feeding = {live for of in derived.values() for live in of}
        for move in moves:
            if move.live in feeding:
                recorder.opaque.setdefault(move.tensor, "the model derives a tensor from it and has no post_load_weights")
    filling: dict[int, list[LiveMove]] = {}
    for move in moves:
        filling.setdefault(move.live, []).append(move)
    foreign = {}
    for live in sorted(lives.weights | recorder.written):
        runs, overlap = complement(lives.lives[live].size, *_extents(filling.get(live, [])))
        if overlap:
            raise CannotLearn(f"load_weights writes two tensors to the same elements of {lives.name(live)}")
        if runs:
            foreign[live] = runs
    names = [tensor.name for tensor in spec.tensors]
    found = {move.tensor for move in moves} | set(recorder.opaque)
    made = LiveMap(
        spec.signature,
        tuple(lives.lives),
        tuple(moves),
        {names[number]: why for number, why in recorder.opaque.items()},
        tuple(name for number, name in enumerate(names) if number not in found),
        derived,
        foreign,
    )
    return made, frozenset(recorder.written)


def _extents(moves: list[LiveMove]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n], int64 [n]: [start, end) of every stretch of elements that the moves fill in their storage."""
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for move in moves:
        length = move.target.shape[-1] if move.target.strides[-1] == 1 else 1
        first = move.target.at(np.arange(0, move.target.size, length, dtype=np.int64))
        starts.append(first)
        ends.append(first + length)
    return np.concatenate(starts), np.concatenate(ends)


def _label_blocks(labels: np.ndarray, places: np.ndarray) -> list[tuple[int, Block, Block]] | None:
    """Elements (int64 [n]) and where each goes (int64 [n]) as blocks; None where they are too many."""
    breaks = np.flatnonzero((np.diff(labels) != 1) | (np.diff(places) != 1)) + 1
    starts, ends = np.append(0, breaks), np.append(breaks, len(labels))
    if len(starts) > MOST_PIECES * 256:
        return None
    runs = np.stack([labels[starts], places[starts], ends - starts], 1)
    found: list[tuple[int, Block, Block]] = []
    at = 0
    while at < len(runs):
        label, place, length = runs[at].tolist()
        rows, steps = 1, (0, 0)
        if at + 1 < len(runs):
            steps = (int(runs[at + 1, 0]) - label, int(runs[at + 1, 1]) - place)
            follows = (np.diff(runs[at:, 0]) == steps[0]) & (np.diff(runs[at:, 1]) == steps[1]) & (runs[at + 1 :, 2] == length)
            follows &= runs[at + 1 :, 0] >> SHIFT == label >> SHIFT  # a block does not go from one tensor into another
            rows = 1 + (len(follows) if follows.all() else int(follows.argmin()))
        source, number = label & ((1 << SHIFT) - 1), label >> SHIFT
        pair = paired((source, (steps[0], 1)), (place, (steps[1], 1)), (rows, length)) if min(steps) >= 0 else None
        if pair is None:
            rows, pair = 1, paired((source, (1,)), (place, (1,)), (length,))
        assert pair is not None
        found.append((number, *pair))
        at += rows
        if len(found) > MOST_PIECES:
            return None
    return found


def _positions(view: torch.Tensor) -> torch.Tensor:
    """int64 of its shape: the position of each element of a view in its storage."""
    found = torch.full((1,) * view.ndim, int(view.storage_offset()), dtype=torch.int64)
    for axis, (length, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        steps = torch.arange(length, dtype=torch.int64) * stride
        found = found + steps.view([-1 if i == axis else 1 for i in range(view.ndim)])
    return found


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return found


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
