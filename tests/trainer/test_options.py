from fnmatch import fnmatchcase

import pytest

from slime.trainer.options import DECIDED, INERT, KINDS, TAKEN, refusal_of, sort_options

FIELDS = sorted({name for cls in KINDS.values() for name in cls.__dataclass_fields__})


def test_options_go_to_the_dataclass_that_has_them():
    options = sort_options({"recompute_granularity": "selective", "overlap_grad_reduce": True, "apply_wd_to_qk_layernorm": True})
    assert options.model == {"recompute_granularity": "selective"}
    assert options.ddp == {"overlap_grad_reduce": True}
    assert options.optimizer == {"apply_wd_to_qk_layernorm": True}


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"did you mean trainer\.megatron\.recompute_granularity"):
        sort_options({"recompute_granularty": "full"})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_layers", 3, "trainer.megatron.num_layers is decided by slime: config.json in model.path says it"),
        ("recompute_granularity", "ful", "trainer.megatron.recompute_granularity=ful: takes full or selective or null"),
    ],
)
def test_what_a_refusal_says(name, value, text):
    with pytest.raises(ValueError) as raised:
        sort_options({name: value})
    assert str(raised.value) == text


def test_every_field_of_megatron_core_is_in_one_table():
    for name in FIELDS:
        reasons = [
            reason
            for table in (DECIDED, INERT)
            for reason, names in table.items()
            if any(fnmatchcase(name, pattern) for pattern in names.split())
        ]
        assert len(reasons) + (name in TAKEN) == 1, f"{name}: {reasons}"


def test_every_name_in_the_tables_is_a_field():
    for pattern in [*TAKEN, *(pattern for table in (DECIDED, INERT) for names in table.values() for pattern in names.split())]:
        assert any(fnmatchcase(name, pattern) for name in FIELDS), pattern


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("lr", 1.0, r"is decided by slime: use trainer\.lr"),
        ("decoupled_lr", 1.0, r"is decided by slime: use trainer\.lr"),
        ("rotary_interleaved", True, "is decided by slime: config.json"),
        ("softmax_scale", 0.1, "is decided by slime: config.json"),
        ("mtp_num_layers", 1, "is decided by slime: config.json"),
        ("num_moe_experts", 8, "is decided by slime: config.json"),
        ("moe_permute_fusion", True, "has no effect in slime: experts are torch's"),
        ("moe_aux_loss_coeff", 0.1, "balancing losses would change what algorithm.name minimises"),
        ("moe_token_dispatcher_type", "allgather", "by all-to-all"),
        ("pipeline_model_parallel_size", 2, r"use trainer\.pipeline_parallel"),
        ("expert_model_parallel_size", 2, r"use trainer\.expert_parallel"),
        ("perform_initialization", False, "weights come from model.path"),
        ("init_method_std", 0.1, "weights come from model.path"),
        ("sgd_momentum", 0.5, "Adam"),
        ("loss_scale", 2.0, "has no effect in slime: bf16 needs no loss scaling"),
        ("log_num_zeros_in_grad", True, "has no effect in slime"),
        ("masked_softmax_fusion", True, "has no effect in slime: attention is slime's own"),
        ("tp_comm_overlap", True, "has no effect in slime: it is Transformer Engine's"),
        ("grad_scale_func", None, "has no effect in slime: it takes a Python object"),
    ],
)
def test_an_option_that_slime_decides_or_that_does_nothing_is_refused(name, value, why):
    with pytest.raises(ValueError, match=rf"^trainer\.megatron\.{name} .*{why}"):
        sort_options({name: value})


def test_what_is_taken_can_be_written_in_a_recipe():
    for name in TAKEN:
        assert refusal_of(name) is None
        with pytest.raises(ValueError, match=rf"^trainer\.megatron\.{name}=.*: takes (true or false|a .*number|full|uniform|a list)"):
            sort_options({name: {}})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bucket_size": 1000}, "bucket_size=1000 has no effect without trainer.megatron.overlap_grad_reduce=true: set it, or remove"),
        ({"recompute_modules": ["mlp"]}, "has no effect without trainer.megatron.recompute_granularity=selective"),
        ({"recompute_granularity": "full"}, "needs trainer.megatron.recompute_method .* and trainer.megatron.recompute_num_layers"),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "moe cannot be recomputed here; choose of core_attn, mlp"),
    ],
)
def test_options_that_need_another(options, why):
    with pytest.raises(ValueError, match=why):
        sort_options(options)


def test_options_with_what_they_need():
    assert sort_options({"bucket_size": None}).ddp == {"bucket_size": None}
    assert sort_options({"bucket_size": 1000, "overlap_grad_reduce": True}).ddp["bucket_size"] == 1000
    sort_options({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    sort_options({"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]})
