"""The maps of all families: what they place, and that nothing is lost on the way through shards and back."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.models.hf_files import HFReader
from slime.models.map import ModelMap, padded_vocab
from slime.models.registry import load_map
from tests.layouts import check_layout, export, load
from tests.tiny import LLAMA3, make_tiny

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
CASES = [(family, tied, dtype) for family in ("qwen3", "llama") for tied in (False, True) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, str], Path]:
    """A vocabulary of 77 is padded to 80; 8 heads in 4 groups of head_dim 8 split over TP 4."""
    root = tmp_path_factory.mktemp("tiny")
    return {
        (family, tied, dtype): make_tiny(
            root / f"{family}-{tied}-{dtype}", family, tied, vocab=77, hidden=32, heads=8, kv_heads=4, head_dim=8, dtype=dtype, seed=i
        )
        for i, (family, tied, dtype) in enumerate(CASES)
    }


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(BITS[tensor.dtype]).numpy()


def load_shards(model: ModelMap, hf: dict[str, np.ndarray], tp: int) -> dict[tuple[str, int], np.ndarray]:
    kind = next(iter(hf.values())).dtype
    shards = {(name, rank): np.zeros(model.local_shape(name, tp), kind) for name in model.parameters() for rank in range(tp)}
    for (name, rank), shard in shards.items():
        load(model.moves(name, rank, tp), hf, shard)
    return shards


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hf_to_shards_to_hf_is_bit_exact(tiny: dict, case: tuple[str, bool, str], tp: int) -> None:
    model = load_map(tiny[case], tp_size=tp)
    with HFReader(tiny[case]) as reader:
        assert set(model.hf_shapes) == set(reader.names)
        hf = {name: to_bits(reader.read(name)) for name in reader.names}
    shards = load_shards(model, hf, tp)
    out = {name: np.full_like(bits, -1) for name, bits in hf.items()}
    for (name, rank), shard in shards.items():
        export(model.moves(name, rank, tp), shard, out)
    for name in hf:
        np.testing.assert_array_equal(out[name], hf[name], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading_by_blocks_gives_the_same_shards(tiny: dict, case: tuple[str, bool, str]) -> None:
    model, tp = load_map(tiny[case], tp_size=2), 2
    with HFReader(tiny[case]) as reader:
        shards = load_shards(model, {name: to_bits(reader.read(name)) for name in reader.names}, tp)
        for (name, rank), shard in shards.items():
            for move in model.moves(name, rank, tp):
                block = reader.read_block(move.hf, move.source)
                assert tuple(block.shape) == move.source.shape
                np.testing.assert_array_equal(to_bits(block), move.target.view(shard.reshape(-1)), err_msg=f"{name} {rank}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_layout_of_a_map_is_a_tiling(tiny: dict, family: str, tied: bool) -> None:
    model = load_map(tiny[family, tied, "fp32"], tp_size=4)
    for layout in model.parameters().values():
        for tp in (1, 2, 4):
            check_layout(layout, tp)
    sources = [t.name for layout in model.parameters().values() for t in layout.sources]
    assert len(sources) == len(set(sources)), "two parameters own one HF tensor"


def test_fused_parameters_are_what_megatron_core_expects(tiny: dict) -> None:
    """The rules of the fused tensors, written with concatenations: qkv per query group, gate and up split apart."""
    path, tp = tiny["qwen3", False, "fp32"], 2
    model = load_map(path, tp_size=tp)
    with HFReader(path) as reader:
        hf = {name: reader.read(name).numpy() for name in reader.names}
    shards = load_shards(model, hf, tp)
    parts = [hf[f"model.layers.1.self_attn.{x}_proj.weight"].reshape(4, -1, 8, 32) for x in "qkv"]  # groups, heads, head_dim, hidden
    qkv = np.concatenate(parts, 1).reshape(-1, 32)
    gate, up = (hf[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for rank in range(tp):
        assert np.array_equal(shards["decoder.layers.1.self_attention.linear_qkv.weight", rank], np.split(qkv, tp)[rank])
        halves = np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
        assert np.array_equal(shards["decoder.layers.1.mlp.linear_fc1.weight", rank], halves)
        down = np.split(hf["model.layers.1.mlp.down_proj.weight"], tp, 1)[rank]
        assert np.array_equal(shards["decoder.layers.1.mlp.linear_fc2.weight", rank], down)
    embedding = np.concatenate([shards["embedding.word_embeddings.weight", r] for r in range(tp)])
    assert embedding.shape == (80, 32) and np.array_equal(embedding[:77], hf["model.embed_tokens.weight"]) and not embedding[77:].any()


def test_the_values_for_megatron_core(tiny: dict) -> None:
    model = load_map(tiny["qwen3", True, "fp32"])
    assert model.family == "qwen3" and model.vocab_size == 77 and model.hf_config["model_type"] == "qwen3"
    assert model.gpt == {
        "vocab_size": 80,
        "max_sequence_length": 512,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
    }
    expected = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8}
    assert expected.items() <= model.transformer.items() and model.transformer["qk_layernorm"] is True
    assert load_map(tiny["llama", True, "fp32"]).transformer["qk_layernorm"] is False


def test_a_tied_output_layer_is_placed_but_owns_nothing(tiny: dict) -> None:
    """On the last pipeline stage a tied model holds a copy of the embedding as its output layer."""
    tied, untied = load_map(tiny["qwen3", True, "fp32"]), load_map(tiny["qwen3", False, "fp32"])
    assert "output_layer.weight" not in tied.parameters() and "lm_head.weight" not in tied.hf_shapes
    assert tied.moves("output_layer.weight", 0, 1) == tied.moves("embedding.word_embeddings.weight", 0, 1)
    assert untied.moves("output_layer.weight", 0, 1)[0].hf == "lm_head.weight" and not untied.shared
    with pytest.raises(ValueError, match=r"model.family=qwen3: .*'decoder.layers.9.x' that the family's map does not place"):
        tied.moves("decoder.layers.9.x", 0, 1)


def test_a_map_travels_between_processes(tiny: dict) -> None:
    model = load_map(tiny["llama", False, "bf16"])
    assert pickle.loads(pickle.dumps(model)) == model


def test_llama3_rope_scaling(tmp_path: Path) -> None:
    model = load_map(make_tiny(tmp_path, "llama", rope_parameters=LLAMA3))
    assert (model.gpt["rotary_base"], model.gpt["rope_scaling"], model.gpt["rope_scaling_factor"]) == (500000.0, True, 8.0)


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"),
    [(80, 1, 80), (77, 1, 80), (77, 4, 80), (77, 3, 96), (151936, 8, 151936), (128256, 8, 128256), (151669, 1, 151680), (50257, 2, 50304)],
)
def test_padded_vocab(vocab: int, tp: int, padded: int) -> None:
    assert padded_vocab(vocab, tp) == padded
