import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync import native
from slime.sync.codec import DENSE, STEPS8, Packer
from slime.sync.records import BLOCK, ELEMENT_TYPES, Changes, ModelSpec, TensorSpec
from slime.sync.wire import HEAD, ROW, PartBlock, WireError, decode_part, describe_part, encode_part

MODEL = ModelSpec(
    (
        TensorSpec("embed", (300, 64), "bfloat16"),
        TensorSpec("empty", (0, 8), "bfloat16"),
        TensorSpec("norm", (64,), "float32"),
        TensorSpec("scalar", (), "float64"),
        TensorSpec("codes", (33, 31), "float8_e4m3fn"),
        TensorSpec("ids", (77,), "int64"),
        TensorSpec("long", (2 * BLOCK + 3,), "bfloat16"),
    )
)
ALL = range(len(MODEL.tensors))


def make_old(model: ModelSpec = MODEL, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, t.nbytes, dtype=np.uint8).view(t.type.bits) for t in model.tensors]


def stepped(olds: list[np.ndarray], density: float, seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.where(random.random(len(old)) < density, old + old.dtype.type(1), old) for old in olds]


def changes_of(olds: list[np.ndarray], news: list[np.ndarray], tensors: range = ALL) -> list[Changes]:
    found = []
    for i in tensors:
        positions = native.diff(olds[i], news[i])
        found.append(Changes(i, positions, olds[i][positions], news[i][positions]))
    return found


def decoded(model: ModelSpec, tensors: range, payload: bytes, olds: list[np.ndarray]) -> list[np.ndarray]:
    """The tensors after the changes; the old ones cannot be written."""
    news = [old.copy() for old in olds]
    for old in olds:
        old.flags.writeable = False
    last = -1
    for changes in decode_part(model, tensors, payload, olds.__getitem__):
        assert changes.tensor > last and (np.diff(changes.positions) > 0).all()
        assert np.array_equal(changes.old, olds[changes.tensor][changes.positions])
        news[changes.tensor][changes.positions] = changes.new
        last = changes.tensor
    return news


@pytest.mark.parametrize("codec", ["steps", "exponent"])
@pytest.mark.parametrize("density", [0, 0.001, 0.01, 0.34, 1])
def test_a_part_becomes_the_weights_again(density: float, codec: str) -> None:
    olds = make_old()
    news = stepped(olds, density)
    payload = encode_part(MODEL, ALL, changes_of(olds, news), codec, olds.__getitem__)
    for got, new in zip(decoded(MODEL, ALL, memoryview(payload), olds), news, strict=True):  # type: ignore[arg-type]
        assert np.array_equal(got, new)
    blocks = describe_part(MODEL, ALL, payload)
    counts = {name: sum(b.changed for b in blocks if b.tensor == name) for name in MODEL.index}
    assert counts == {t.name: int((old != new).sum()) for t, old, new in zip(MODEL.tensors, olds, news, strict=True)}
    assert HEAD.size <= len(payload) - sum(block.nbytes for block in blocks) < HEAD.size + 40 * len(blocks) + 50


def test_tensors_without_changes_may_be_absent() -> None:
    olds = make_old()
    news = [old if i != 2 else old + np.uint32(1) for i, old in enumerate(olds)]
    every = changes_of(olds, news)
    assert encode_part(MODEL, ALL, every, "steps") == encode_part(MODEL, ALL, [every[2]], "steps")
    assert len(encode_part(MODEL, ALL, [], "steps")) == HEAD.size
    assert list(decode_part(MODEL, ALL, encode_part(MODEL, ALL, [], "steps"), olds.__getitem__)) == []


def test_changes_on_both_sides_of_a_block_edge() -> None:
    olds = make_old()
    news = [old.copy() for old in olds]
    news[6][[0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 2]] ^= 1
    payload = encode_part(MODEL, ALL, changes_of(olds, news), "steps")
    assert [(b.tensor, b.block, b.changed) for b in describe_part(MODEL, ALL, payload)] == [("long", 0, 2), ("long", 1, 2), ("long", 2, 2)]
    assert np.array_equal(decoded(MODEL, ALL, payload, olds)[6], news[6])


def test_a_complete_block_takes_no_old_bits() -> None:
    olds, others = make_old(), make_old(seed=5)
    everything = [Changes(i, np.arange(len(old)), old, new) for i, (old, new) in enumerate(zip(olds, others, strict=True))]
    payload = encode_part(MODEL, ALL, everything, "dense")
    assert {block.codec for block in describe_part(MODEL, ALL, payload)} == {"dense"}
    for got, new in zip(decoded(MODEL, ALL, payload, make_old(seed=6)), others, strict=True):
        assert np.array_equal(got, new)


@pytest.mark.parametrize("codec", ["steps", "exponent"])
def test_positions_beyond_32_bits(codec: str) -> None:
    """A tensor of 2^33 elements, all of them one: an array of one element that is read 2^33 times."""
    model = ModelSpec((TensorSpec("huge", (1 << 13, (1 << 20) + 1), "bfloat16"),))
    size = model.tensors[0].size
    old = np.broadcast_to(np.array([0x3F80], np.uint16), (size,))
    positions = np.array([0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 300, 1 << 33, size - 1])
    new = np.arange(8, dtype=np.uint16) + 0x3F81
    payload = encode_part(model, range(1), [Changes(0, positions, old[positions], new)], codec, lambda tensor: old)
    (found,) = decode_part(model, range(1), payload, lambda tensor: old)
    assert np.array_equal(found.positions, positions) and np.array_equal(found.new, new) and (found.old == 0x3F80).all()


@given(seed=st.integers(0, 1 << 32), density=st.floats(0, 1), codec=st.sampled_from(["steps", "exponent"]), first=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_any_run_of_tensors(seed: int, density: float, codec: str, first: int) -> None:
    model = ModelSpec(MODEL.tensors[:6])
    tensors = range(min(first, 5), 6)
    olds = make_old(model, seed)
    news = stepped(olds, density, seed)
    payload = encode_part(model, tensors, changes_of(olds, news, tensors), codec, olds.__getitem__)
    got = decoded(model, tensors, payload, olds)
    assert all(np.array_equal(got[i], news[i]) for i in tensors)


def one(tensor: int, positions: list[int], dtype: str = "bfloat16") -> Changes:
    bits = ELEMENT_TYPES[dtype].bits
    return Changes(tensor, np.array(positions, np.int64), np.zeros(len(positions), bits), np.ones(len(positions), bits))


@pytest.mark.parametrize(
    ("changes", "codec", "message"),
    [
        ([], "xor", "codec 'xor' is none of"),
        ([], "exponent", "needs old_of"),
        ([one(6, [1])], "steps", "tensor 6 after those of -1 in a part of tensors 0:4"),
        ([one(0, [1]), one(0, [2])], "steps", "tensor 0 after those of 0"),
        ([one(0, [1], "float32")], "steps", "changes of embed are not int64 positions"),
        ([one(0, [300 * 64])], "steps", "positions of embed are not ascending between 0 and 19199"),
        ([one(0, [-1, 4])], "steps", "positions of embed are not ascending"),
        ([one(0, [4, 4])], "steps", "changes of block 0 of embed: positions"),
        ([one(0, [4])], "dense", "changes of block 0 of embed: 1 of 19200 elements are listed"),
    ],
)
def test_changes_that_cannot_be(changes: list[Changes], codec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_part(MODEL, range(4), changes, codec)


def test_old_bits_of_another_shape_are_the_callers_fault() -> None:
    payload = encode_part(MODEL, range(4), [one(0, [4])], "steps")
    with pytest.raises(ValueError, match=r"the old bits of embed are uint16 \[5\], not uint16 \[19200\]") as raised:
        list(decode_part(MODEL, range(4), payload, lambda tensor: np.zeros(5, np.uint16)))
    assert not isinstance(raised.value, WireError)


def refused(payload: bytes, message: str, tensors: range = ALL, model: ModelSpec = MODEL) -> None:
    for read in (
        lambda: list(decode_part(model, tensors, payload, make_old().__getitem__)),
        lambda: describe_part(model, tensors, payload),
    ):
        with pytest.raises(WireError, match=message):
            read()


def test_parts_of_something_else_are_refused() -> None:
    olds = make_old()
    payload = encode_part(MODEL, ALL, changes_of(olds, stepped(olds, 0.01)), "steps")
    refused(b"", "0 bytes: shorter than its head")
    refused(b"PK\3\4" + payload[4:], "no part of a publication")
    refused(payload[:4] + b"\2\0" + payload[6:], "format 2; this slime reads 1")
    refused(payload, "tensors 0:7, not of 0:6", range(6))
    refused(payload, "a part of model", model=ModelSpec(MODEL.tensors[:-1]), tensors=range(6))
    refused(payload[:-1], "bytes of streams where its table tells")
    refused(payload + b"\0", "bytes of streams where its table tells")
    refused(payload[:30], "shorter than its head|a table of")


def retold(payload: bytes, row: int, **fields: int | tuple[int, ...]) -> bytes:
    """The part with another row in its table."""
    *head, count, packed = HEAD.unpack_from(payload)
    planes = Packer().unpack(memoryview(payload)[HEAD.size : HEAD.size + packed], count * ROW.itemsize)
    rows = planes.reshape(ROW.itemsize, count).T.copy().reshape(-1).view(ROW)
    for name, value in fields.items():
        rows[row][name] = value
    raw = rows.view(np.uint8).reshape(count, ROW.itemsize).T.tobytes()
    return HEAD.pack(*head, count, len(raw)) + raw + payload[HEAD.size + packed :]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (1, {"tensor": 7}, r"a row of \(tensor, block\) \(7, 0\) after \(0, 0\) in a part of tensors 0:7"),
        (1, {"tensor": 1 << 31}, r"\(2147483648, 0\) after \(0, 0\)"),
        (1, {"tensor": 0}, r"\(0, 0\) after \(0, 0\)"),
        (2, {"block": 0}, r"\(6, 0\) after \(6, 0\)"),
        (2, {"block": 3}, "block 3 of long: method 2 with 1 changes of -1048573 elements"),
        (0, {"method": 0, "gaps": 0}, "block 0 of embed: method 0 with 1 changes of 19200 elements"),
        (0, {"method": 5, "gaps": 0}, "block 0 of embed: method 5 with"),
        (0, {"method": DENSE, "gaps": 0}, "method 4 with 1 changes of 19200 elements"),
        (1, {"tensor": 1, "method": DENSE, "changed": 0, "gaps": 0}, "block 0 of empty: method 4 with 0 changes of 0 elements"),
        (1, {"changed": 0}, "with 0 changes of 1048576 elements"),
        (2, {"changed": BLOCK + 1}, "with 1048577 changes of 1048576 elements"),
        (2, {"gaps": 18}, "with 1 changes of 1048576 elements and 18 gap bytes"),
        (2, {"method": STEPS8}, "block 1 of long has streams that steps8 does not have"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: int, fields: dict[str, int], message: str) -> None:
    payload = encode_part(MODEL, ALL, [one(0, [4]), one(6, [4, BLOCK + 4])], "steps")
    assert retold(payload, row)[HEAD.size + 3 * ROW.itemsize :] == payload[HEAD.size + HEAD.unpack_from(payload)[-1] :]
    list(decode_part(MODEL, ALL, retold(payload, row), make_old().__getitem__))
    refused(retold(payload, row, **fields), message)


def test_a_row_of_a_tensor_before_the_part_is_refused() -> None:
    payload = retold(encode_part(MODEL, range(2, 4), [one(2, [4], "float32")], "steps"), 0, tensor=0)
    refused(payload, r"\(0, 0\) after \(-1, -1\) in a part of tensors 2:4", range(2, 4))


def test_streams_that_do_not_fit_their_row_name_its_block() -> None:
    payload = encode_part(MODEL, ALL, [one(0, [4]), one(6, [4, BLOCK + 4])], "steps")
    with pytest.raises(WireError, match=r"block 1 of long \(steps16\): a zstd stream"):
        list(decode_part(MODEL, ALL, retold(payload, 2, changed=9), make_old().__getitem__))


def test_damage_names_its_block() -> None:
    olds = make_old()
    news = [old.copy() for old in olds]
    news[6][BLOCK : 2 * BLOCK] ^= 1
    payload = encode_part(MODEL, ALL, changes_of(olds, news), "steps")
    with pytest.raises(WireError, match=r"block 1 of long \(steps8\): "):
        list(decode_part(MODEL, ALL, payload[:-1] + bytes([payload[-1] ^ 255]), olds.__getitem__))


def test_description() -> None:
    payload = encode_part(MODEL, range(4), [one(0, [4]), one(2, [3, 5], "float32")], "steps")
    assert describe_part(MODEL, range(4), payload) == [PartBlock("embed", 0, "steps16", 1, 4), PartBlock("norm", 0, "steps8", 2, 4)]
