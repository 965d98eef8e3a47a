"""Every family against transformers: the same logits from the same checkpoint, and the checkpoint again, bit for bit, on the way out."""

from pathlib import Path

import pytest
import torch

from slime.models.hf_files import HFReader
from slime.models.registry import FAMILIES
from tests.tiny import LLAMA3, YARN, make_tiny
from tests.trainer.ranks import make_cfg, weights

pytestmark = pytest.mark.e2e
VOCAB = 77  # of which megatron-core's padding makes 80
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
# What a family can be beside what tests/tiny.py makes of it.
VARIANTS = {
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}),
    "qwen3, linear rope": ("qwen3", {"rope_parameters": LINEAR}),
    "qwen3, tied": ("qwen3", {"tied": True}),
    "glm4, tied": ("glm4", {"tied": True}),
    "qwen3_moe, weights not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "glm4_moe, no norms on heads": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "deepseek_v2, as V2-Lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3, yarn rope": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
}
CASES = {**{family: (family, {}) for family in FAMILIES}, **VARIANTS}


def logits(place, cfg, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, transformers'), fp32 [tokens, vocabulary]."""
    from slime.trainer import proof

    model = place.trainer(cfg).model
    rows = proof.sequences(VOCAB, 512)
    ours = proof.megatron_logits(model.stages[0].module, model.config, rows, VOCAB)
    return ours, proof.transformers_logits(path, rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(ranks, tmp_path: Path, case: str, record_property) -> None:
    family, config = CASES[case]
    path = make_tiny(tmp_path, family, vocab=VOCAB, seed=1, **config)
    ours, theirs = ranks.run(logits, 1, make_cfg(path), path)[0]
    difference = float((ours - theirs).abs().max())
    record_property("max abs", difference)
    assert difference <= 1e-4 and float(theirs.abs().max()) > 0.5


def exported(place, cfg) -> dict[str, torch.Tensor]:
    return weights(place.trainer(cfg))


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_bit_for_bit(ranks, tmp_path: Path, family: str, dtype: str) -> None:
    """Whole, dtypes included; routers hold their bias in fp32 in between."""
    path = make_tiny(tmp_path, family, vocab=VOCAB, seed=1, dtype=dtype)
    found = ranks.run(exported, 1, make_cfg(path, dtype))[0]
    with HFReader(path) as reader:
        assert set(found) == set(reader.names)
        for name, tensor in found.items():
            expected = reader.read(name)
            assert tensor.dtype == expected.dtype and torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
