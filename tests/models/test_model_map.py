"""The maps of all families: what they place, and that nothing is lost on the way through shards and back."""

import pickle
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.models.hf_files import HFReader
from slime.models.map import ModelMap, padded_vocab
from slime.models.registry import FAMILIES, load_map
from tests.layouts import check_layout, export, load

Tiny = Callable[..., Path]
Shards = dict[tuple[str, int], np.ndarray]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
SIZES = [(1, 1), (2, 1), (4, 2), (2, 4)]  # ranks that divide a layer, ranks that divide an expert


@pytest.fixture(params=[(family, tied, dtype) for family in FAMILIES for tied in (False, True) for dtype in ("fp32", "bf16")], ids=str)
def path(request: pytest.FixtureRequest, tiny: Tiny) -> Path:
    return tiny(*request.param)


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(BITS[tensor.dtype]).numpy()


def read_bits(path: Path) -> dict[str, np.ndarray]:
    with HFReader(path) as reader:
        return {name: to_bits(reader.read(name)) for name in reader.names}


def ranks(model: ModelMap, tp: int, expert_tp: int) -> Iterator[tuple[str, int, int]]:
    """Every shard: parameter, rank, ranks."""
    for name in model.parameters():
        size = expert_tp if model.is_expert(name) else tp
        yield from ((name, rank, size) for rank in range(size))


def load_shards(model: ModelMap, hf: dict[str, np.ndarray], tp: int, expert_tp: int = 1) -> Shards:
    shards = {}
    for name, rank, size in ranks(model, tp, expert_tp):
        kind = hf[model.layout(name).sources[0].name].dtype
        shards[name, rank] = np.zeros(model.local_shape(name, size), kind)
        load(model.moves(name, rank, size), hf, shards[name, rank])
    return shards


@pytest.mark.thorough
def test_hf_to_shards_to_hf_is_bit_exact(path: Path) -> None:
    hf = read_bits(path)
    for tp, expert_tp in SIZES:
        model = load_map(path, tp_size=tp)
        shards = load_shards(model, hf, tp, expert_tp)
        out = {name: np.full_like(hf[name], -1) for name in model.hf_shapes}
        for name, rank, size in ranks(model, tp, expert_tp):
            export(model.moves(name, rank, size), shards[name, rank], out)
        assert all(np.array_equal(out[name], hf[name]) for name in out), (tp, expert_tp)


def test_every_tensor_of_the_file_is_accounted_for(path: Path) -> None:
    model, hf = load_map(path), read_bits(path)
    rest = set(hf) - set(model.hf_shapes)
    assert not model.kept_shapes
    assert all(any(fnmatchcase(name, pattern) for pattern in model.spare) for name in rest), rest
    assert {name: bits.shape for name, bits in hf.items() if name not in rest} == model.hf_shapes
    sources = [t.name for layout in model.parameters().values() for t in layout.sources]
    assert len(sources) == len(set(sources)), "two parameters own one HF tensor"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_a_map_is_a_tiling(tiny: Tiny, family: str) -> None:
    for layout in load_map(tiny(family), tp_size=4).parameters().values():
        for tp in (1, 2, 4):
            check_layout(layout, tp)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_by_blocks_gives_the_same_shards(tiny: Tiny, family: str) -> None:
    path = tiny(family, False, "bf16")
    model, hf = load_map(path, tp_size=2), read_bits(path)
    shards = load_shards(model, hf, 2, 4)
    with HFReader(path) as reader:
        for name, rank, size in ranks(model, 2, 4):
            for move in model.moves(name, rank, size):
                block = reader.read_block(move.hf, move.source)
                assert tuple(block.shape) == move.source.shape
                np.testing.assert_array_equal(to_bits(block), move.target.view(shards[name, rank].reshape(-1)), err_msg=f"{name} {rank}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_travels_between_processes(tiny: Tiny, family: str) -> None:
    model = load_map(tiny(family))
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_stage_of_a_tied_model_holds_a_copy_that_owns_nothing(tiny: Tiny, family: str) -> None:
    tied, untied = load_map(tiny(family, True)), load_map(tiny(family, False))
    assert "output_layer.weight" not in tied.parameters() and "lm_head.weight" not in tied.hf_shapes
    assert tied.gpt["share_embeddings_and_output_weights"] and not untied.gpt["share_embeddings_and_output_weights"]
    assert tied.moves("output_layer.weight", 0, 1) == tied.moves("embedding.word_embeddings.weight", 0, 1)
    assert untied.moves("output_layer.weight", 0, 1)[0].hf == "lm_head.weight" and not untied.shared
    with pytest.raises(ValueError, match=rf"model.family={family}: .*'decoder.layers.9.x' that the family's map does not place"):
        tied.moves("decoder.layers.9.x", 0, 1)


def test_fused_parameters_are_what_megatron_core_expects(tiny: Tiny) -> None:
    """The rules of the fused tensors, written with concatenations: qkv per query group, gate and up split apart."""
    tp = 2
    path = tiny("qwen3")
    hf, fused = read_bits(path), read_bits(tiny("glm4"))
    shards = load_shards(load_map(path, tp_size=tp), hf, tp)
    fused_shards = load_shards(load_map(tiny("glm4"), tp_size=tp), fused, tp)
    parts = [hf[f"model.layers.1.self_attn.{x}_proj.weight"].reshape(4, -1, 8, 32) for x in "qkv"]  # groups, heads, head_dim, hidden
    qkv = np.concatenate(parts, 1).reshape(-1, 32)
    gate, up = (hf[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    gate2, up2 = np.split(fused["model.layers.1.mlp.gate_up_proj.weight"], 2)
    for rank in range(tp):
        assert np.array_equal(shards["decoder.layers.1.self_attention.linear_qkv.weight", rank], np.split(qkv, tp)[rank])
        halves = np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
        assert np.array_equal(shards["decoder.layers.1.mlp.linear_fc1.weight", rank], halves)
        halves = np.concatenate([np.split(gate2, tp)[rank], np.split(up2, tp)[rank]])
        assert np.array_equal(fused_shards["decoder.layers.1.mlp.linear_fc1.weight", rank], halves)
        down = np.split(hf["model.layers.1.mlp.down_proj.weight"], tp, 1)[rank]
        assert np.array_equal(shards["decoder.layers.1.mlp.linear_fc2.weight", rank], down)
    embedding = np.concatenate([shards["embedding.word_embeddings.weight", r] for r in range(tp)])
    assert embedding.shape == (80, 32) and np.array_equal(embedding[:77], hf["model.embed_tokens.weight"]) and not embedding[77:].any()


def test_experts_are_divided_in_their_own_way(tiny: Tiny) -> None:
    model = load_map(tiny("mixtral"), tp_size=2)
    expert, dense = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", "decoder.layers.1.self_attention.linear_proj.weight"
    assert model.is_expert(expert) and not model.is_expert(dense) and model.has_experts
    assert (model.local_shape(expert, 1), model.local_shape(expert, 4)) == ((192, 32), (48, 32))
    gate_up = [f"model.layers.1.block_sparse_moe.experts.3.{x}.weight" for x in ("w1", "w3")]
    assert [move.hf for move in model.moves(expert, 0, 2)] == gate_up
    shared = load_map(tiny("deepseek_v3"))
    assert not shared.is_expert("decoder.layers.1.mlp.shared_experts.linear_fc1.weight")
    assert shared.is_router_bias("decoder.layers.1.mlp.router.expert_bias")
    assert not shared.is_router_bias("decoder.layers.1.mlp.router.weight") and not load_map(tiny("llama")).has_experts


def test_the_values_for_megatron_core(tiny: Tiny) -> None:
    model = load_map(tiny("qwen3", True))
    assert model.family == "qwen3" and model.vocab_size == 77 and model.hf_config["model_type"] == "qwen3"
    assert model.gpt == {
        "vocab_size": 80,
        "max_sequence_length": 512,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
    }
    expected = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8}
    assert expected.items() <= model.transformer.items() and model.transformer["qk_layernorm"] is True
    assert load_map(tiny("llama", True)).transformer["qk_layernorm"] is False
    assert load_map(tiny("glm4")).gpt["rotary_percent"] == 0.5 and load_map(tiny("glm4")).sandwich
    assert load_map(tiny("qwen2")).transformer["add_qkv_bias"] is True


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"),
    [(80, 1, 80), (77, 1, 80), (77, 4, 80), (77, 3, 96), (151936, 8, 151936), (128256, 8, 128256), (151669, 1, 151680), (50257, 2, 50304)],
)
def test_padded_vocab(vocab: int, tp: int, padded: int) -> None:
    assert padded_vocab(vocab, tp) == padded
