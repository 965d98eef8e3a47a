"""Which divisions of a model are refused, and that pipeline stages are megatron-core's."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from slime.config import ModelConfig, RoleConfig, RunConfig, SlimeConfig, TrainerConfig
from slime.config.exits import ConfigError
from slime.config.parallel import EMBEDDING, EXPERT_TENSOR, FIRST, LAST, LOSS, VIRTUAL, parallel_sizes, stage_layers
from slime.models.check_layout import check_layout, check_model
from slime.models.config_json import ConfigJson
from slime.models.registry import FAMILIES
from tests.tiny import make_tiny

SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
MODELS = {
    "qwen3": {**SIZES, "head_dim": 16},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 16, "num_experts": 6, "norm_topk_prob": True},
    "deepseek_v3": {
        **SIZES,
        **EXPERTS,
        **LATENT,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "n_group": 1,
        "topk_group": 1,
    },
}


def check(folder: Path, family: str, tensor: int = 1, pipeline: int = 1, expert: int = 1, **megatron: object) -> None:
    (folder / "config.json").write_text(json.dumps(MODELS[family]))
    trainer = TrainerConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, expert_parallel=expert, megatron=megatron)
    check_layout(FAMILIES[family].build(ConfigJson(folder), tensor), parallel_sizes(trainer), trainer)


@pytest.mark.parametrize(
    ("family", "sizes", "text"),
    [
        (
            "qwen3",
            {"pipeline": 4},
            "the model's 6 layers do not divide into trainer.pipeline_parallel=4 stages: choose another number, or name the layers of the "
            "outer ones by trainer.megatron.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage",
        ),
        (
            "qwen3",
            {"pipeline": 3, FIRST: 1},
            "the model's 6 layers do not divide into trainer.pipeline_parallel=3 stages with trainer.megatron."
            "num_layers_in_first_pipeline_stage=1, which leaves 5 for 2 others: change one of them",
        ),
        (
            "qwen3",
            {"pipeline": 2, FIRST: 4, LAST: 4},
            "the model's 6 layers do not divide into trainer.pipeline_parallel=2 stages with trainer.megatron."
            "num_layers_in_first_pipeline_stage=4, trainer.megatron.num_layers_in_last_pipeline_stage=4, which leaves -2 for 0 others: "
            "change one of them",
        ),
        (
            "qwen3",
            {"pipeline": 2, EMBEDDING: True},
            "the model's 6 layers do not divide into trainer.pipeline_parallel=2 stages with trainer.megatron."
            "account_for_embedding_in_pipeline_split=true, which makes them 7: change one of them",
        ),
        (
            "qwen3",
            {"pipeline": 2, VIRTUAL: 2},
            "trainer.megatron.virtual_pipeline_model_parallel_size=2 does not divide the 3 layers of a pipeline stage "
            "(of the model's 6, with trainer.pipeline_parallel=2): choose one that does",
        ),
        (
            "qwen3",
            {"pipeline": 2, VIRTUAL: 2, LAST: 3},
            "trainer.megatron.virtual_pipeline_model_parallel_size=2 does not divide the 3 layers of a pipeline stage (of the model's 6, "
            "with trainer.pipeline_parallel=2, trainer.megatron.num_layers_in_last_pipeline_stage=3): choose one that does",
        ),
        ("qwen3", {"expert": 2}, "trainer.expert_parallel=2: qwen3 has no experts to divide; set it to 1"),
        (
            "qwen3",
            {"tensor": 2, EXPERT_TENSOR: 2},
            "trainer.megatron.expert_tensor_parallel_size=2: qwen3 has no experts to divide; remove it",
        ),
        ("qwen3_moe", {"expert": 4}, "trainer.expert_parallel=4 does not divide the model's 6 experts: choose one that does"),
        (
            "qwen3_moe",
            {"expert": 2, EXPERT_TENSOR: 5},
            "trainer.megatron.expert_tensor_parallel_size=5 does not divide the 24 channels of the model's experts: choose one that does",
        ),
        (
            "qwen3_moe",
            {"tensor": 2, "sequence_parallel": False},
            "trainer.megatron.sequence_parallel=false with trainer.tensor_parallel=2: qwen3_moe needs activations that are split along the "
            "sequence, for its router; remove it",
        ),
        (
            "qwen3",
            {"moe_router_bias_update_rate": 1e-3},
            "trainer.megatron.moe_router_bias_update_rate=0.001 has no effect: qwen3 has no router with a bias; remove it",
        ),
        (
            "qwen3_moe",
            {"moe_router_bias_update_rate": 1e-3},
            "trainer.megatron.moe_router_bias_update_rate=0.001 has no effect: qwen3_moe has no router with a bias; remove it",
        ),
        (
            "deepseek_v3",
            {"moe_router_bias_update_rate": -1e-3},
            "trainer.megatron.moe_router_bias_update_rate=-0.001: a negative rate sends tokens to the busiest experts; take one >= 0",
        ),
    ],
)
def test_what_is_refused(family: str, sizes: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        check(tmp_path, family, **sizes)
    assert str(raised.value) == text


def test_narrow_experts_on_many_tensor_parallel_ranks(tmp_path: Path) -> None:
    """A width that tensor_parallel does not divide: the option that splits experts otherwise is named."""
    odd = {**MODELS["qwen3_moe"], "moe_intermediate_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    trainer = TrainerConfig(tensor_parallel=2, expert_parallel=2)
    with pytest.raises(ValueError, match=r"^trainer\.tensor_parallel=2 does not divide the 9 channels .*, or set trainer\.megatron\."):
        check_layout(FAMILIES["qwen3_moe"].build(ConfigJson(tmp_path), 2), parallel_sizes(trainer), trainer)


def test_latent_attention_without_experts_needs_split_activations(tmp_path: Path) -> None:
    """With experts their router is named first."""
    with pytest.raises(ValueError, match="deepseek_v3 needs activations that are split along the sequence, for its router"):
        check(tmp_path, "deepseek_v3", tensor=2, sequence_parallel=False)
    model = FAMILIES["deepseek_v3"].build(ConfigJson(tmp_path), 2)
    del model.transformer["num_moe_experts"]
    trainer = TrainerConfig(tensor_parallel=2, megatron={"sequence_parallel": False})
    with pytest.raises(ValueError, match="for the down-projections of its latent attention"):
        check_layout(model, parallel_sizes(trainer), trainer)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", {"tensor": 2, "sequence_parallel": False}),
        ("qwen3", {"pipeline": 3, VIRTUAL: 2}),
        ("qwen3", {"pipeline": 4, EMBEDDING: True, LOSS: True}),
        ("qwen3", {"pipeline": 2, FIRST: 2}),
        ("qwen3", {"pipeline": 3, VIRTUAL: 2, FIRST: 2, LAST: 2}),
        ("qwen3_moe", {"tensor": 2, "expert": 3}),
        ("qwen3_moe", {"tensor": 2, "expert": 6, EXPERT_TENSOR: 1}),
        ("deepseek_v3", {"tensor": 2, "expert": 4, "pipeline": 2, "moe_router_bias_update_rate": 1e-3}),
    ],
)
def test_what_passes(family: str, sizes: dict, tmp_path: Path) -> None:
    check(tmp_path, family, **sizes)


def megatron_stages(layers: int, pipeline: int, virtual: int, options: dict) -> list[int] | None:
    """Layers that megatron-core builds on each rank of the pipeline; None where it refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pipeline,
            pipeline_dtype=torch.float32,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            **options,
        )
        stages = range(virtual) if virtual > 1 else [None]
        return [sum(get_num_layers_to_build(config, stage, rank) for stage in stages) for rank in range(pipeline)]
    except (ValueError, AssertionError):
        return None


def stages(layers: int, pipeline: int, virtual: int, options: dict) -> list[int] | None:
    try:
        return stage_layers(layers, TrainerConfig(pipeline_parallel=pipeline, megatron={**options, VIRTUAL: virtual}))
    except ConfigError:
        return None


OPTIONS = [
    *({FIRST: first, LAST: last} for first, last in itertools.product((None, 1, 2, 4), repeat=2)),
    *({EMBEDDING: embedding, LOSS: loss} for embedding, loss in ((True, False), (False, True), (True, True))),
]


@pytest.mark.e2e  # importing megatron-core takes longer than all of this file
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pipeline_stages_are_those_of_megatron_core(options: dict) -> None:
    """But where a stage would have a negative number of layers, which it does not always notice."""
    for layers, pipeline, virtual in itertools.product(range(1, 13), range(2, 5), (1, 2, 3)):
        theirs = megatron_stages(layers, pipeline, virtual, options)
        if theirs is not None and min(theirs) < 0:
            theirs = None
        assert stages(layers, pipeline, virtual, options) == theirs, (layers, pipeline, virtual)


def test_only_what_trains_is_divided(tmp_path: Path) -> None:
    """A recipe that only generates may have whatever the trainer's knobs say."""
    model = ModelConfig(path=str(make_tiny(tmp_path, layers=2)))
    cfg = SlimeConfig(model=model, trainer=TrainerConfig(tensor_parallel=3, pipeline_parallel=3))
    cfg.cluster.roles = {"actor": RoleConfig(devices=9), "rollout": RoleConfig(devices=1)}
    cfg.run = RunConfig(only="rollout")
    check_model(cfg)
    cfg.run, cfg.trainer.tensor_parallel = RunConfig(), 1
    with pytest.raises(ValueError, match=r"2 layers do not divide into trainer\.pipeline_parallel=3"):
        check_model(cfg)
    cfg.trainer.pipeline_parallel = 2
    check_model(cfg)
    cfg.model.family = "qwen4"
    with pytest.raises(ValueError, match=r"^model\.family=qwen4: no such family; known are auto, "):
        check_model(cfg)


def test_replay_of_experts_is_of_models_that_have_some(tmp_path: Path) -> None:
    cfg = SlimeConfig()
    cfg.model.path, cfg.rollout.replay_experts = str(make_tiny(tmp_path / "dense", "qwen3")), False
    with pytest.raises(ValueError, match=r"^rollout\.replay_experts=false has no effect: qwen3 has no experts; remove it$"):
        check_model(cfg)
    cfg.model.path = str(make_tiny(tmp_path / "sparse", "qwen3_moe"))
    check_model(cfg)


def test_a_family_that_no_engine_serves_learns_from_demonstrations_only(tmp_path: Path) -> None:
    cfg = SlimeConfig()
    cfg.model.path = str(make_tiny(tmp_path, "glm"))
    refusal = r"model.path=.*: glm can be trained but not served \(SGLang has no GlmForCausalLM.*algorithm.name=sft"
    with pytest.raises(ValueError, match=refusal):
        check_model(cfg)
    cfg.algorithm.name = "sft"
    check_model(cfg)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "glm4_moe_lite", "mixtral"])
def test_an_output_layer_that_an_engine_would_not_tie_is_not_served(family: str, tmp_path: Path) -> None:
    cfg = SlimeConfig()
    cfg.model.path = str(make_tiny(tmp_path / "tied", family, tied=True))
    with pytest.raises(ValueError, match=rf"{family} can be trained but not served \(tie_word_embeddings=true, and SGLang has an output"):
        check_model(cfg)
    cfg.model.path = str(make_tiny(tmp_path / "untied", family))
    check_model(cfg)
    for ties in ("qwen3", "deepseek_v3"):
        cfg.model.path = str(make_tiny(tmp_path / ties, ties, tied=True))
        check_model(cfg)
