"""What servers are started with."""

import json
from pathlib import Path

import pytest

from slime.config import EvalSet, SlimeConfig
from slime.config.plan_memory import kv_bytes_per_token
from slime.cpu import serving
from slime.engine.settings import (
    FIXED,
    POOL_BYTES,
    check_deterministic,
    cpu_pool,
    longest_request,
    server_arguments,
    server_environment,
)


@pytest.fixture
def cfg(tmp_path: Path) -> SlimeConfig:
    heads = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, **heads}))
    made = SlimeConfig()
    made.model.path, made.model.dtype = str(tmp_path), "fp32"
    made.data.max_prompt_tokens, made.rollout.max_response_tokens = 31, 8
    made.rollout.prompts_per_step, made.rollout.samples_per_prompt = 64, 8
    return made


def read(cfg: SlimeConfig) -> dict:
    return json.loads((Path(cfg.model.path) / "config.json").read_text())


def test_the_pool_holds_every_running_request_at_its_longest(cfg: SlimeConfig) -> None:
    assert longest_request(cfg) == 40
    assert cpu_pool(cfg) == {"max_running_requests": 256, "max_total_tokens": 10240}
    cfg.rollout.engines = 4
    assert cpu_pool(cfg) == {"max_running_requests": 128, "max_total_tokens": 5120}
    cfg.rollout.max_in_flight = 40
    assert cpu_pool(cfg) == {"max_running_requests": 10, "max_total_tokens": 1024}
    cfg.data.eval = {"heldout": EvalSet("x", max_response_tokens=500)}
    assert longest_request(cfg) == 532


def test_the_pool_stays_within_its_memory(cfg: SlimeConfig) -> None:
    assert kv_bytes_per_token(cfg, read(cfg)) == 2 * 4 * 2 * 32 * 4
    cfg.rollout.max_response_tokens = 100_000
    pool = cpu_pool(cfg)
    assert pool["max_running_requests"] == POOL_BYTES // (longest_request(cfg) * 2048) < 256
    cfg.rollout.max_response_tokens = 10_000_000
    assert cpu_pool(cfg)["max_running_requests"] == 1


def test_a_pool_too_small_is_refused(cfg: SlimeConfig) -> None:
    cfg.rollout.sglang = {"max_total_tokens": 39}
    with pytest.raises(ValueError, match=r"rollout.sglang.max_total_tokens=39: too few for one request, of 40 tokens"):
        server_arguments(cfg, "cpu")
    cfg.rollout.sglang = {"max_total_tokens": 4000}
    assert server_arguments(cfg, "cpu")["max_total_tokens"] == 4000
    cfg.run.deterministic = True
    with pytest.raises(ValueError, match=r"too few for 256 requests at once, as run.deterministic needs.*10240 are needed"):
        server_arguments(cfg, "cpu")
    cfg.rollout.sglang["max_running_requests"] = 100
    server_arguments(cfg, "cpu")


def test_a_pool_that_sglang_sizes_is_refused_in_deterministic_mode_alone(cfg: SlimeConfig) -> None:
    for name in ("max_running_requests", "max_total_tokens"):
        cfg.run.deterministic, cfg.rollout.sglang = False, {name: None}
        assert server_arguments(cfg, "cpu")[name] is None
        cfg.run.deterministic = True
        with pytest.raises(ValueError, match=rf"rollout.sglang.{name}=null with run.deterministic=true: SGLang would choose it"):
            server_arguments(cfg, "cpu")


def test_an_answer_of_an_evaluation_that_does_not_fit_is_named(cfg: SlimeConfig) -> None:
    cfg.data.eval = {"heldout": EvalSet("x", max_response_tokens=500)}
    cfg.rollout.sglang = {"max_total_tokens": 400}
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens \+ data.eval.heldout.max_response_tokens \+ 1"):
        server_arguments(cfg, "cpu")


@pytest.mark.parametrize("name", FIXED)
def test_what_deterministic_mode_fixes_is_not_the_users(cfg: SlimeConfig, name: str) -> None:
    cfg.run.deterministic, cfg.rollout.sglang = True, {name: FIXED[name][0]}
    check_deterministic(cfg)
    cfg.rollout.sglang = {name: "other"}
    with pytest.raises(ValueError, match=rf"^rollout.sglang.{name}=other with run.deterministic=true, which fixes it at .*; remove it$"):
        server_arguments(cfg, "cpu")
    cfg.run.deterministic = False
    check_deterministic(cfg)


def test_the_fixed_arguments_are_those_that_the_cpu_is_given() -> None:
    given, plain = serving.arguments(True), serving.arguments(False)
    assert {name for name in given if given[name] != plain.get(name)} <= FIXED.keys()
    assert all(FIXED[name][0] == value for name, value in given.items() if name in FIXED)


def test_what_the_user_says_comes_last(cfg: SlimeConfig) -> None:
    cfg.rollout.sglang = {"attention_backend": "intel_amx", "dtype": "float16"}
    chosen = server_arguments(cfg, "cpu")
    assert (chosen["attention_backend"], chosen["dtype"], chosen["device"]) == ("intel_amx", "float16", "cpu")


def test_nothing_of_the_cpu_on_cuda(cfg: SlimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    chosen = server_arguments(cfg, "cuda")
    assert "attention_backend" not in chosen and "max_total_tokens" not in chosen
    environment = server_environment(cfg, "cuda", 4.0)
    assert "SGLANG_USE_CPU_ENGINE" not in environment
    assert [path.name for path in Path(environment["PYTHONPATH"]).iterdir()] == ["slime"], "the loader's package, nothing of the CPU"
    assert chosen["custom_weight_loader"] == ["slime.sync.inserver.load"]


def test_loaders_of_the_user_stay(cfg: SlimeConfig) -> None:
    cfg.rollout.sglang = {"custom_weight_loader": ["mine.load"]}
    assert server_arguments(cfg, "cpu")["custom_weight_loader"] == ["slime.sync.inserver.load", "mine.load"]


def test_environment_of_a_cpu_server(cfg: SlimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    cfg.rollout.tensor_parallel, cfg.run.deterministic = 2, True
    environment = server_environment(cfg, "cpu", 2.9)
    shims, mine, package = environment["PYTHONPATH"].split(":")
    assert (Path(package) / "slime" / "sync" / "inserver.py").exists()
    assert mine == "/mine" and (Path(shims) / "sitecustomize.py").exists()
    assert environment["OMP_NUM_THREADS"] == "2" and environment["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert environment["SLIME_CPU_BATCH_INVARIANT"] == "1" and environment["CUDA_VISIBLE_DEVICES"] == ""


def test_engines_of_a_mixture_of_experts_say_which_they_chose(cfg: SlimeConfig) -> None:
    assert "enable_return_routed_experts" not in server_arguments(cfg, "cpu")
    config = Path(cfg.model.path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen3_moe"}))
    assert server_arguments(cfg, "cpu")["enable_return_routed_experts"] is True
    cfg.rollout.replay_experts = False
    assert "enable_return_routed_experts" not in server_arguments(cfg, "cpu")


def test_the_pool_of_latent_attention_holds_latents(cfg: SlimeConfig) -> None:
    config = Path(cfg.model.path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kv_lora_rank": 24, "qk_rope_head_dim": 8}))
    assert kv_bytes_per_token(cfg, read(cfg)) == 4 * (24 + 8) * 4


def test_engines_that_swap_can_give_up_their_memory(cfg: SlimeConfig) -> None:
    assert "enable_memory_saver" not in server_arguments(cfg, "cuda")
    cfg.cluster.share = "swap"
    assert server_arguments(cfg, "cuda")["enable_memory_saver"] is True
    cfg.run.only = "rollout"
    assert "enable_memory_saver" not in server_arguments(cfg, "cuda"), "there is no trainer"
