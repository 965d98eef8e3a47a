"""Checkpoints in and out: what is read is what lies there, what is written loads elsewhere, a half export is not a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.layout import Block
from slime.models import hf_files, hf_headers
from slime.models.hf_files import INDEX, SINGLE, HFReader, HFWriter
from slime.models.registry import load_map
from tests.tiny import load_hf_model, make_tiny


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("single"), "qwen3", tied=True, dtype="bf16")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny(tmp_path_factory.mktemp("sharded"), "llama", max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def export(source: Path, target: Path, dtype: torch.dtype | None = None, **options: int) -> dict[str, torch.Tensor]:
    """Copy a model through reader and writer."""
    shapes = load_map(source).hf_shapes
    with HFReader(source) as reader, HFWriter(target, source, shapes, **options) as writer:
        for name in shapes:
            writer.write(name, reader.read(name).to(dtype or reader.dtype(name)))
    return contents(target)


def test_one_file_and_shards_read_alike(single: Path, sharded: Path) -> None:
    for path, dtype in ((single, torch.bfloat16), (sharded, torch.float32)):
        expected = contents(path)
        with HFReader(path) as reader:
            assert reader.names == sorted(expected)
            for name, tensor in expected.items():
                assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == dtype
                assert same_bits(reader.read(name), tensor)


def test_a_tensor_without_dimensions(tmp_path: Path) -> None:
    """Such as a scale."""
    save_file({"scale": torch.tensor(2.5, dtype=torch.bfloat16), "row": torch.arange(3.0)}, tmp_path / SINGLE)
    with HFReader(tmp_path) as reader:
        assert reader.shape("scale") == () and same_bits(reader.read("scale"), torch.tensor(2.5, dtype=torch.bfloat16))
        assert reader.read("row").tolist() == [0, 1, 2]


def test_a_checkpoint_of_a_hundred_files_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index and headers are read once, however often it is loaded; each file is then mapped once by a reader."""
    path = tmp_path / "many"
    export(make_tiny(tmp_path / "one", "qwen3", layers=10, hidden=16, intermediate=16), path, max_shard_bytes=1)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 100
    opened: list[tuple[str, str]] = []
    real, read_text = hf_headers.safe_open, Path.read_text
    texts: list[Path] = []
    monkeypatch.setattr(hf_headers, "safe_open", lambda path, framework: opened.append((framework, path.name)) or real(path, framework))
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: texts.append(self) or read_text(self, *a, **k))
    shapes = load_map(path).hf_shapes
    for _ in range(2):
        with HFReader(path) as reader:
            for name in shapes:
                reader.read(name)
            first = opened[:]
    assert texts.count(path / INDEX) == 1
    assert sorted(name for kind, name in opened if kind == "numpy") == files
    assert sorted(name for kind, name in first if kind == "pt")[::2] == files, "once by each of the two readers"


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    for size in (2, 3):
        save_file({"a": torch.ones(size)}, tmp_path / SINGLE)
        with HFReader(tmp_path) as reader:
            assert reader.shape("a") == (size,) and reader.read("a").tolist() == [1] * size


def test_files_are_mapped_anew_after_a_window(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, mapped = contents(sharded), []
    real = hf_files.open_safetensors
    monkeypatch.setattr(hf_files, "open_safetensors", lambda path, framework: mapped.append(path.name) or real(path, framework))
    monkeypatch.setattr(hf_files, "WINDOW_BYTES", 30_000)
    with HFReader(sharded) as reader:
        read = {name: reader.read(name) for name in reader.names}
        total = sum(tensor.nbytes for tensor in read.values())
        assert all(same_bits(read[name], expected[name]) for name in expected)
    assert total / 30_000 < len(mapped) <= 2 * len(expected)


def test_a_file_ends_where_a_tensor_would_lie_badly_or_the_header_is_full(single: Path, tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3).to(torch.bfloat16),
        "wide": torch.arange(3.0),  # cannot begin after 6 bytes
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "n" * 70_000: torch.ones(2),
        "m" * 70_000: torch.zeros(2),  # a second name of this length does not fit
    }
    with HFWriter(tmp_path, single) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    written = contents(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert written.keys() == tensors.keys() and all(torch.equal(tensors[name], written[name]) for name in tensors)


def test_config_says_the_dtype_of_most_weights(single: Path, tmp_path: Path) -> None:
    with HFWriter(tmp_path, single) as writer:
        writer.write("bias", torch.zeros(3))
        writer.write("weight", torch.zeros(4, 4, dtype=torch.float16))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_blocks_of_any_shape(tmp_path: Path) -> None:
    tensor = torch.arange(60, dtype=torch.float32).view(6, 10)
    save_file({"first": torch.zeros(3), "w": tensor, "b": tensor.view(-1).clone()}, tmp_path / SINGLE)
    blocks = [
        Block(0, (60,), (1,)),
        Block(23, (14,), (1,)),  # begins and ends within rows
        Block(12, (3, 4), (10, 1)),  # columns
        Block(10, (2, 5), (20, 1)),  # stretches of every other row
        Block(7, (2, 2, 3), (20, 10, 1)),
    ]
    with HFReader(tmp_path) as reader:
        for block in blocks:
            expected = block.view(tensor.numpy().reshape(-1))
            for name in ("w", "b"):
                assert reader.read_block(name, block).tolist() == expected.tolist(), (name, block)


def test_an_export_is_the_same_model(single: Path, tmp_path: Path) -> None:
    written = export(single, tmp_path / "hf")
    expected = contents(single)
    assert set(written) == set(expected) and all(same_bits(written[name], expected[name]) for name in expected)
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert names == {SINGLE, *(p.name for p in single.iterdir())} and ".export" not in names
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((single / "config.json").read_text())
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (single / "tokenizer.json").read_bytes()


def test_transformers_loads_a_sharded_export(sharded: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export(sharded, tmp_path / "hf", max_shard_bytes=60_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in contents(sharded).values())
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load_hf_model(tmp_path / "hf")(tokens).logits, load_hf_model(sharded)(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("12+3=15")["input_ids"]) == "12+3=15"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False, add_generation_prompt=True)
        == "<user>1<assistant>"
    )


def test_config_says_the_dtype_that_was_written(single: Path, tmp_path: Path) -> None:
    export(single, tmp_path / "hf", torch.float32)
    assert json.loads((single / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"


def test_an_export_replaces_an_earlier_one(single: Path, sharded: Path, tmp_path: Path) -> None:
    export(sharded, tmp_path, max_shard_bytes=60_000)
    written = export(single, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == [SINGLE] and set(written) == set(contents(single))


def test_a_failed_export_leaves_the_directory_as_it_was(single: Path, tmp_path: Path) -> None:
    export(single, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="rank died"), HFWriter(tmp_path, single, max_shard_bytes=10) as writer:
        writer.write("a", torch.zeros(8))
        writer.write("b", torch.zeros(8))
        raise RuntimeError("rank died")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_export_that_is_not_whole_is_not_published(single: Path, tmp_path: Path) -> None:
    writer = HFWriter(tmp_path, single, {"a": (2,), "b": (2,)})
    with pytest.raises(AssertionError, match="'a', \\(3,\\)"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="'c', \\(2,\\)"):
        writer.write("c", torch.zeros(2))
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="a is written twice"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"lacks \['b'\]"):
        writer.close()
    assert [p.name for p in tmp_path.iterdir()] == [".export"]
    HFWriter(tmp_path, single).discard()
    assert not list(tmp_path.iterdir())


def test_tensors_are_written_at_once(single: Path, tmp_path: Path) -> None:
    """Gather buffers are reused, and views of one buffer share storage."""
    buffer = torch.arange(6, dtype=torch.float32)
    with HFWriter(tmp_path, single) as writer:
        writer.write("even", buffer[::2])
        writer.write("all", buffer)
        buffer.zero_()
    written = contents(tmp_path)
    assert written["even"].tolist() == [0, 2, 4] and written["all"].tolist() == [0, 1, 2, 3, 4, 5]


def test_places_an_export_cannot_go_to(single: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an export cannot overwrite the model it came from; write to another directory"):
        HFWriter(single, single)
    with pytest.raises(ValueError, match=r"config.json: missing; an export takes config.json and tokenizer from there"):
        HFWriter(tmp_path / "hf", tmp_path)


def test_a_name_that_is_not_there(single: Path) -> None:
    with HFReader(single) as reader, pytest.raises(ValueError, match=r"no tensor lm_head.weight in its safetensors"):
        reader.read("lm_head.weight")


def test_directories_without_whole_safetensors(tmp_path: Path) -> None:
    def refused(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            HFReader(tmp_path)

    refused(r"neither model.safetensors nor model.safetensors.index.json there; give the directory of a model in safetensors")
    index = tmp_path / INDEX
    index.write_text("{}")
    refused(r"index.json: not an index of safetensors \(KeyError: 'weight_map'\); download the model again")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}))
    refused(r"index.json: names model-1.safetensors, which is not there; download the model again")
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    refused(r"index.json: places b in model-1.safetensors, which does not hold it; download the model again")
    (tmp_path / SINGLE).write_bytes((tmp_path / "model-1.safetensors").read_bytes()[:-3])
    refused(r"model.safetensors: not a whole safetensors file \(.*\); download the model again")
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    refused(r"model.safetensors: a is F8_E4M3, but only F32, BF16, F16 can be trained; use the model's unquantized checkpoint")
