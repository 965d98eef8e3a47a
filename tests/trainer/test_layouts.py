"""Every family in every layout that applies: the loss and the gradient of one process.

Most tokens of the models with experts replay recorded ones, the others choose their own."""

from pathlib import Path

import numpy as np
import pytest

from slime.models.parts.feed_forward import Experts
from slime.models.registry import FAMILIES, load_map
from tests.tiny import CLASSES, make_tiny
from tests.trainer.gradients import assert_same, gradient, grpo_cfg, log_probs, noisy_old
from tests.trainer.ranks import make_batch, with_experts

pytestmark = pytest.mark.e2e

SPARSE = {name for name, family in FAMILIES.items() if isinstance(family.feed_forward, Experts)}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
# name -> ranks, knobs of trainer
LAYOUTS = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor_parallel": 2, "megatron": {"sequence_parallel": False}}),
    "TP2+SP": (2, {"tensor_parallel": 2}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "PP2 x VPP2": (2, {"pipeline_parallel": 2, "megatron": VIRTUAL}),
    "CP2": (2, {"context_parallel": 2}),
    "EP2": (2, {"expert_parallel": 2}),
    "ETP2": (4, {"tensor_parallel": 2, "expert_parallel": 2, "megatron": {"expert_tensor_parallel_size": 2}}),
    "TP2 x EP2 x ETP1": (2, {"tensor_parallel": 2, "expert_parallel": 2, "megatron": {"expert_tensor_parallel_size": 1}}),
    "TP2 x PP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
}


# Of two families: further products, on 4 ranks, and stages of unequal length.
PRODUCTS = {
    "TP2 x CP2": (4, {"tensor_parallel": 2, "context_parallel": 2}),
    "PP2 x CP2": (4, {"pipeline_parallel": 2, "context_parallel": 2}),
    "TP2 x PP2 x VPP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "megatron": VIRTUAL}),
    "PP2 x EP2": (4, {"pipeline_parallel": 2, "expert_parallel": 2}),
    "CP2 x EP2 x DP2": (4, {"context_parallel": 2, "expert_parallel": 2}),
    "PP2, 1 + 3 layers": (2, {"pipeline_parallel": 2, "megatron": {"num_layers_in_first_pipeline_stage": 1}}),
}


def applies(family: str, layout: str) -> bool:
    if "EP2" in layout or "ETP2" in layout:
        return family in SPARSE
    return layout != "TP2" or family not in SPARSE  # experts and latent attention need SP beside TP


# Tested in every run of the suite: dense and tied, softmax and sigmoid routers, latent attention, norms after attention and MLP.
ALWAYS = {
    *((family, layout) for family in ("qwen3", "deepseek_v3") for layout in LAYOUTS),
    *(("qwen3_moe", layout) for layout in ("DP2", "TP2+SP", "EP2")),
    ("glm4", "TP2+SP"),
    ("glm4", "PP2"),
}


def case(family: str, layout: str) -> object:
    marks = () if (family, layout) in ALWAYS else pytest.mark.slow
    return pytest.param(family, layout, id=f"{family}-{layout}", marks=marks)


CASES = [case(family, layout) for family in CLASSES for layout in LAYOUTS if applies(family, layout)]
CASES += [case(family, layout) for family in ("qwen3", "deepseek_v3") for layout in PRODUCTS if applies(family, layout)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four layers, the first dense; a vocabulary that no layout divides; qwen3 tied, so that two stages hold the embedding."""
    root = tmp_path_factory.mktemp("deep")
    types = {"glm4_moe_lite": {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "first_k_dense_replace": 1}}
    return {f: make_tiny(root / f, f, tied=f == "qwen3", vocab=77, layers=4, seed=i, **types.get(f, {})) for i, f in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def alone(ranks, deep) -> dict[str, tuple]:
    """Old log-probs and the update of one process, by family, as they are asked for."""
    batch, found = make_batch(samples=8, vocab=77), {}

    def of(family: str) -> tuple:
        if family not in found:
            cfg = grpo_cfg(deep[family])
            routing = load_map(deep[family]).routing
            routed = with_experts(batch, routing) if routing else batch
            old = noisy_old(routed, ranks.run(log_probs, 1, cfg, routed)[0])
            found[family] = (routed, old, ranks.run(gradient, 1, cfg, routed, old)[0])
        return found[family]

    return of


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_layout_gives_the_gradient_of_one_process(ranks, deep, alone, family: str, layout: str, record_property) -> None:
    batch, old, expected = alone(family)
    world, knobs = {**LAYOUTS, **PRODUCTS}[layout]
    found = ranks.run(gradient, world, grpo_cfg(deep[family], max_tokens_per_rank=60, **knobs), batch, old)
    record_property("worst gradient", assert_same(found[0], expected))
    record_property("loss", abs(found[0][0] / expected[0] - 1))
    assert len({(loss, norm) for loss, _, norm in found}) == 1, "ranks report different losses"
    assert not any(hf for _, hf, _ in found[1:])


def test_log_probs_reach_every_rank(ranks, deep) -> None:
    batch = make_batch(samples=8, vocab=77)
    expected = ranks.run(log_probs, 1, grpo_cfg(deep["llama"]), batch)[0]
    for layout in ("PP2 x VPP2", "CP2", "TP2 x PP2"):
        world, knobs = LAYOUTS[layout]
        for found in ranks.run(log_probs, world, grpo_cfg(deep["llama"], **knobs), batch):
            assert np.abs(found - expected).max() <= 1e-5


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3_moe", "DP2"), ("deepseek_v3", "PP2 x VPP2"), pytest.param("deepseek_v3", "TP2 x EP2 x ETP1", marks=pytest.mark.slow)],
)
def test_recomputed_layers_replay_the_experts_of_their_own_micro_batch(ranks, deep, alone, family: str, layout: str) -> None:
    batch, old, expected = alone(family)
    world, knobs = LAYOUTS[layout]
    knobs = {**knobs, "megatron": {**knobs.get("megatron", {}), **RECOMPUTE}}
    found = ranks.run(gradient, world, grpo_cfg(deep[family], max_tokens_per_rank=60, **knobs), batch, old)
    assert_same(found[0], expected)
