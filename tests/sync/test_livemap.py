"""The live map: what is learned from a load_weights that fuses, slices, pads, concatenates, casts and derives; learning writes nothing."""

import concurrent.futures
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.layout import Block
from slime.sync.inserver_learn import SHIFT, CannotLearn, _label_blocks, learn
from slime.sync.inserver_lives import LiveTensors, Moved
from slime.sync.livemap import LiveMap, LiveMove, MapError, complement, paired
from slime.sync.records import ModelSpec, TensorSpec

BF16 = torch.bfloat16
SPEC = ModelSpec(
    (
        TensorSpec("embed", (10, 6), "bfloat16"),
        TensorSpec("q", (8, 6), "bfloat16"),
        TensorSpec("k", (4, 6), "bfloat16"),
        TensorSpec("down", (6, 8), "bfloat16"),
        TensorSpec("a", (3, 6), "bfloat16"),
        TensorSpec("b", (2, 6), "bfloat16"),
        TensorSpec("kv", (4, 6), "bfloat16"),
        TensorSpec("turned", (5, 6), "bfloat16"),
        TensorSpec("bias", (4,), "bfloat16"),
        TensorSpec("scale", (), "float32"),
        TensorSpec("experts", (2, 6, 4), "bfloat16"),
        TensorSpec("squared", (4,), "bfloat16"),
        TensorSpec("of_another_rank", (4,), "bfloat16"),
    )
)


class Toy(torch.nn.Module):
    """One of two ranks."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.rank = rank

        def weight(*shape: int, dtype: torch.dtype = BF16) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=False)

        self.embed = weight(8, 6)  # 5 rows of the vocabulary, 3 of padding
        self.head = self.embed
        self.qk = weight(6, 6)
        self.down = weight(6, 4)
        self.fused = weight(5, 6)
        self.kv = weight(4, 6)
        self.turned = weight(6, 5)
        self.bias = weight(4, dtype=torch.float32)
        self.scale = weight(1, dtype=torch.float32)
        self.experts = weight(2, 2, 6, 2)
        self.squared = weight(4)
        self.register_buffer("rotary", torch.randn(3))
        self.unused_workspace = torch.zeros(7)
        self.absorbed: Any = self.kv.data.unflatten(0, (2, 2)).transpose(1, 2).contiguous()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rank, waiting = self.rank, {}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for name, w in weights:
                match name:
                    case "embed":
                        self._embed(w)
                    case "q":
                        self.qk.data.narrow(0, 0, 4).copy_(w.narrow(0, 4 * rank, 4))
                    case "k":
                        pool.submit(self.qk.data[4:].copy_, w.chunk(2)[rank]).result()
                    case "down":
                        self.down.data.copy_(w[:, 4 * rank : 4 * rank + 4].clone())
                    case "a" | "b":
                        waiting[name] = w
                        if len(waiting) == 2:
                            self.fused.data.copy_(torch.cat([waiting["a"], waiting["b"]]))
                    case "kv":
                        self.kv.data.copy_(w.to(self.kv.device).reshape(4, 6))
                    case "turned":
                        self.turned.data.copy_(w.t())
                    case "experts":
                        for expert in range(2):
                            self.experts.data[expert].copy_(w[expert].view(6, 2, 2).permute(1, 0, 2))
                    case "squared":
                        self.squared.data.copy_(w * w)
                    case "bias" | "scale":
                        getattr(self, name).data.copy_(w)
        self.post_load_weights()

    def _embed(self, w: torch.Tensor) -> None:
        self.embed[:5].data.copy_(w[5 * self.rank : 5 * self.rank + 5])
        self.embed[5:].data.fill_(0)

    def post_load_weights(self) -> None:
        self.absorbed.copy_(self.kv.data.unflatten(0, (2, 2)).transpose(1, 2).contiguous())


def tensors(seed: int) -> list[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [(t.name, torch.randn(t.shape, generator=random).to(getattr(torch, t.dtype))) for t in SPEC.tensors]


def storages(model: torch.nn.Module, lives: LiveTensors) -> list[np.ndarray]:
    return [flat_of(tensor).copy() for tensor in lives._tensors]


def flat_of(tensor: torch.Tensor) -> np.ndarray:
    """The storage's elements, as bits; writable."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[whole.element_size()]).numpy()


def learned(model: torch.nn.Module, spec: ModelSpec = SPEC) -> tuple[LiveMap, LiveTensors]:
    lives = LiveTensors(model)
    return learn(model, spec, lives)[0], lives


def test_learning_writes_nothing() -> None:
    model = Toy()
    before = storages(model, LiveTensors(model))
    learned(model)
    assert all((a == b).all() for a, b in zip(before, storages(model, LiveTensors(model)), strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_map_says_what_load_weights_does(rank: int) -> None:
    """Storages filled by the map are those that load_weights fills; what the map does not fill it names."""
    model = Toy(rank)
    found, lives = learned(model)
    names = [live.name for live in found.lives]
    assert names.count("embed") == 1 and "head" not in names
    assert set(found.opaque) == {"turned", "bias", "squared"}
    assert "order" in found.opaque["turned"] and "cast" in found.opaque["bias"] and "aten.mul" in found.opaque["squared"]
    assert found.absent == ("of_another_rank",)
    assert {names[live]: [names[i] for i in of] for live, of in found.derived.items()} == {"absorbed": ["kv"]}
    foreign = {names[live]: runs for live, runs in found.foreign.items()}
    assert foreign == {
        "embed": ((30, 48),),
        "turned": ((0, 30),),
        "bias": ((0, 4),),
        "squared": ((0, 4),),
        "rotary": ((0, 3),),
        "absorbed": ((0, 24),),
    }
    new = tensors(7)
    filled = storages(model, lives)
    for move in found.moves:
        source = new[move.tensor][1].reshape(-1)
        bits = source.view(torch.int16 if source.dtype == BF16 else torch.int32).numpy()
        move.target.view(filled[move.live])[...] = move.source.view(bits)
    model.load_weights(new)
    for live, (mine, theirs) in enumerate(zip(filled, storages(model, lives), strict=True)):
        for start, end in found.foreign.get(live, ()):
            mine[start:end] = theirs[start:end]
        assert (mine == theirs).all(), names[live]


def test_concatenated_and_permuted_tensors_become_few_blocks() -> None:
    found, _ = learned(Toy())
    moves = {name: [found.moves[i] for i in found.of_tensor.get(SPEC.index[name], ())] for name in SPEC.index}
    assert moves["a"] == [LiveMove(4, Block(0, (18,), (1,)), moves["a"][0].live, Block(0, (18,), (1,)))]
    assert moves["b"] == [LiveMove(5, Block(0, (12,), (1,)), moves["a"][0].live, Block(18, (12,), (1,)))]
    assert moves["down"][0].source == Block(4, (6, 4), (8, 1))
    assert sum(move.source.size for move in moves["experts"]) == 48


def test_a_block_stays_in_its_tensor() -> None:
    """Two tensors of one size, one behind the other, are as regular as rows of one."""
    labels = np.concatenate([(number << SHIFT) + np.arange(12) for number in (3, 6, 9)])
    assert _label_blocks(labels, np.arange(36)) == [
        (number, Block(0, (12,), (1,)), Block(12 * i, (12,), (1,))) for i, number in enumerate((3, 6, 9))
    ]


def test_json() -> None:
    found, _ = learned(Toy())
    again = LiveMap.from_json(found.to_json())
    assert again == found and again.signature == found.signature
    text = found.to_json()
    for broken in (
        "",
        "[]",
        "{}",
        text[:-1],
        text.replace('moves":[[0,', 'moves":[[-1,'),
        text.replace("bfloat16", "bf16"),
        text.replace("[1]", "[0]"),
    ):
        with pytest.raises(MapError):
            LiveMap.from_json(broken)
    with pytest.raises(MapError, match="ends outside embed"):
        LiveMap.from_json(text.replace('["embed","bfloat16",48]', '["embed","bfloat16",20]'))


def test_what_cannot_be_learned_is_refused() -> None:
    class Looks(Toy):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, w in weights:
                if name == "scale" and w.item() > 1:
                    self.scale.data.copy_(w)

    class WritesTwice(Toy):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, w in weights:
                if name in ("q", "k"):
                    self.qk.data[:4].copy_(w[:4])

    with pytest.raises(CannotLearn, match="reads the values of scale"):
        learned(Looks())
    with pytest.raises(CannotLearn, match="two tensors to the same elements of qk"):
        learned(WritesTwice())


def test_what_goes_by_way_of_a_buffer_is_opaque() -> None:
    class Stacks(Toy):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            stacked = torch.empty(5, 6, dtype=BF16)
            for name, w in weights:
                if name == "a":
                    stacked[:3].copy_(w)
                if name == "b":
                    stacked[3:].copy_(w)
            self.fused.data.copy_(stacked)

    model = Stacks()
    before = model.fused.clone()
    found, _ = learned(model)
    assert set(found.opaque) == {"a", "b"} and not found.moves
    assert torch.equal(model.fused, before)


def test_a_source_of_a_derived_tensor_is_opaque_where_the_model_cannot_derive_it_again() -> None:
    class Inline(Toy):
        post_load_weights: Any = None

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, w in weights:
                if name == "kv":
                    self.kv.data.copy_(w)
            Toy.post_load_weights(self)

    assert "no post_load_weights" in learned(Inline())[0].opaque["kv"]


def test_a_replaced_storage_is_noticed() -> None:
    model = Toy()
    found, lives = learned(model)
    used = {move.live for move in found.moves}
    lives.check(used)
    model.unused_workspace = torch.zeros(9)
    lives.check(used)
    model.kv.data = model.kv.data.clone()
    with pytest.raises(Moved, match="kv is not where it was"):
        lives.check(used)


def test_storages_of_another_model_are_left_to_it() -> None:
    target, draft = Toy(), Toy()
    draft.embed = target.embed
    draft.head = target.embed
    taken = frozenset(int(a) for a in LiveTensors(target).addresses)
    assert "embed" not in [live.name for live in LiveTensors(draft, taken).lives]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), max_size=8))
def test_complement(runs: list[tuple[int, int]]) -> None:
    filled = np.zeros(70, int)
    for start, length in runs:
        filled[start : start + length] += 1
    starts, lengths = (np.array([run[i] for run in runs], np.int64) for i in (0, 1))
    gaps, overlap = complement(70, starts, starts + lengths)
    assert overlap == bool((filled > 1).any())
    found = np.zeros(70, bool)
    for start, end in gaps:
        assert start < end
        found[start:end] = True
    assert (found == (filled == 0)).all()


@given(st.permutations([0, 1, 2]), st.tuples(*[st.integers(1, 4)] * 3))
def test_paired_blocks_hold_the_same_elements_in_the_same_order(order: list[int], shape: tuple[int, int, int]) -> None:
    source = torch.arange(2 * 4 * 4 * 4).view(8, 4, 4)[1 : 1 + shape[0], : shape[1], : shape[2]]
    target = torch.empty(4, 4, 4)[: shape[order[0]], : shape[order[1]], : shape[order[2]]]
    back = [order.index(i) for i in range(3)]
    target = target.permute(back)
    pair = paired((source.storage_offset(), source.stride()), (target.storage_offset(), target.stride()), source.shape)
    if pair is None:
        assert order != [0, 1, 2]
        return
    values = np.arange(128)
    mine, theirs = np.zeros(64, int), torch.zeros(64, dtype=torch.int64)
    pair[1].view(mine)[...] = pair[0].view(values)
    theirs.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    assert (mine == theirs.numpy()).all()
