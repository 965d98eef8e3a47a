"""The rule by which FP8 engines' codes and scales are made: SGLang's own function, and what happens at the edges."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime.sync import fp8
from slime.sync.records import ModelSpec, TensorSpec

SHAPES = [(128, 128), (256, 384), (130, 200), (1, 5), (576, 256)]


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """bfloat16 of very different sizes, with zeros, subnormals and a block of nothing but small numbers."""
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=g) * torch.exp(4 * torch.randn(shape, generator=g))
    made[torch.rand(shape, generator=g) < 0.1] = 0
    made[:128, :128] *= 1e-7
    return made.bfloat16()


def sglangs_rule() -> Any:
    """`per_block_cast_to_fp8` of the installed SGLang, with scales that are not rounded to powers of two."""
    [folder] = importlib.util.find_spec("sglang").submodule_search_locations  # type: ignore[union-attr, misc]
    source = (Path(folder) / "srt" / "layers" / "quantization" / "fp8_utils.py").read_text()
    [found] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "per_block_cast_to_fp8"]
    names = {"torch": torch, "Tuple": tuple, "ceil_to_ue8m0": lambda scale: scale, "ceil_align": lambda n, of: -(-n // of) * of}
    exec(compile(ast.Module([found], []), "fp8_utils.py", "exec"), names)
    return names["per_block_cast_to_fp8"]


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_sglangs_own_function(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    codes, scales, _ = fp8.quantise(weight.view(torch.int16).numpy().view(np.uint16).reshape(-1), fp8.Blocks.of(shape))
    meant_codes, meant_scales = sglangs_rule()(weight)
    assert np.array_equal(codes, meant_codes.view(torch.uint8).numpy().reshape(-1))
    assert np.array_equal(scales.view(np.uint32), meant_scales.numpy().view(np.uint32).reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_divided_and_put_together(shape: tuple[int, int]) -> None:
    blocks, positions = fp8.Blocks.of(shape), np.arange(shape[0] * shape[1])
    block, place = blocks.split(positions)
    assert np.array_equal(blocks.joined(block, place), positions)
    which = np.arange(blocks.shape[0] * blocks.shape[1])
    gathered = blocks.gather(positions + 1, which)
    assert np.array_equal(gathered[block, place], positions + 1)
    assert (gathered > 0).sum() == len(positions)


def test_a_value_that_is_no_number_spoils_its_block_alone() -> None:
    weight = matrix((256, 128))
    weight[3, 3], weight[200, 7] = float("nan"), float("inf")
    codes, scales, _ = fp8.quantise(weight.view(torch.int16).numpy().view(np.uint16).reshape(-1), fp8.Blocks.of((256, 128)))
    assert not np.isfinite(scales).any()
    weight[200, 7] = 1.0
    codes, scales, _ = fp8.quantise(weight.view(torch.int16).numpy().view(np.uint16).reshape(-1), fp8.Blocks.of((256, 128)))
    assert np.isfinite(scales).tolist() == [False, True]
    assert torch.from_numpy(codes).view(torch.float8_e4m3fn).float().reshape(256, 128)[128:].isfinite().all()


def test_projections_and_experts_are_quantised_and_nothing_else() -> None:
    names = {
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
        "model.layers.0.input_layernorm.weight": False,
        "model.layers.0.self_attn.q_norm.weight": False,
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.q_proj.bias": False,
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": True,
        "model.layers.1.mlp.gate.weight": False,
        "model.layers.1.mlp.gate.e_score_correction_bias": False,
        "model.layers.1.mlp.experts.7.down_proj.weight": True,
        "model.layers.1.mlp.shared_experts.gate_proj.weight": True,
        "model.layers.1.block_sparse_moe.gate.weight": False,
        "model.layers.1.block_sparse_moe.experts.0.w2.weight": True,
    }
    found = {
        name: fp8.is_quantised(TensorSpec(name, (128,) if "norm" in name or "bias" in name else (256, 128), "bfloat16")) for name in names
    }
    assert found == names


def test_the_tensors_of_an_fp8_checkpoint() -> None:
    travels = ModelSpec(
        (
            TensorSpec("model.norm.weight", (300,), "bfloat16"),
            TensorSpec("model.layers.0.mlp.up_proj.weight", (300, 256), "bfloat16"),
        )
    )
    assert [(t.name, t.shape, t.dtype) for t in fp8.served(travels).tensors] == [
        ("model.norm.weight", (300,), "bfloat16"),
        ("model.layers.0.mlp.up_proj.weight", (300, 256), "float8_e4m3fn"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (3, 2), "float32"),
    ]


def test_other_than_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"up_proj\.weight is float32, not bfloat16: set model.dtype=bf16"):
        fp8.served(ModelSpec((TensorSpec("model.layers.0.mlp.up_proj.weight", (300, 256), "float32"),)))
