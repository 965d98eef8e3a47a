"""The resource plan's arithmetic against numbers worked out by hand."""

import io

import pytest
from rich.console import Console

from slime.config.exits import ConfigError
from slime.config.load import compose
from slime.config.plan import count_parameters, plan
from slime.config.plan_view import show, size

GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]", "data.max_prompt_tokens=24", "rollout.max_response_tokens=8"]
PARALLEL = [
    "cluster.roles.actor.devices=4",
    "trainer.tensor_parallel=2",
    "cluster.roles.rollout.devices=4",
    "rollout.engines=2",
    "rollout.tensor_parallel=2",
]


def test_parameters_are_counted_from_headers(workdir) -> None:
    assert count_parameters(workdir / "model") == 10 * 64 + 36


def test_batch_of_a_parallel_run(workdir) -> None:
    batch = plan(
        compose(
            overrides=[
                *GOOD,
                *PARALLEL,
                "rollout.prompts_per_step=6",
                "rollout.samples_per_prompt=3",
                "trainer.updates_per_batch=2",
                "trainer.epochs_per_batch=3",
                "trainer.max_tokens_per_rank=70",
            ]
        ).cfg
    ).batch
    assert (batch.prompts, batch.samples, batch.updates, batch.samples_per_update) == (6, 18, 6, 9)
    assert (batch.data_parallel, batch.samples_per_rank, batch.tokens_per_rank) == (2, 5, 5 * 32)
    assert batch.micro_batches == 3  # two samples of 32 tokens fit into 70


@pytest.mark.parametrize(("dtype", "width", "optimizer"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_memory_by_the_documented_formula(dtype: str, width: int, optimizer: int, workdir) -> None:
    memory = plan(compose(overrides=[*GOOD, *PARALLEL, f"model.dtype={dtype}", "trainer.max_tokens_per_rank=100"]).cfg).memory
    assert memory is not None and memory.parameters == 676
    assert (memory.rank_weights, memory.rank_gradients, memory.rank_optimizer) == (338 * width, 338 * 4, 338 * optimizer // 2)
    assert memory.rank_activations == 17 * width * 64 * 2 * 100 // 2
    assert memory.rank_total == sum((memory.rank_weights, memory.rank_gradients, memory.rank_optimizer, memory.rank_activations))
    assert memory.engine_weights == 338 * width
    assert memory.engine_kv_per_token == 2 * 2 * 16 * width * 1  # two KV heads over two devices
    assert memory.engine_kv_wanted == memory.engine_kv_per_token * 128 * 32  # half of 256 samples, 32 tokens each


def test_shown_plan(workdir) -> None:
    shown = io.StringIO()
    cfg = compose(overrides=[*GOOD, "algorithm.name=sft"]).cfg
    show(cfg, plan(cfg), Console(file=shown, width=120))
    text = shown.getvalue()
    assert "1 data-parallel x 1 tensor-parallel ranks" in text and "none needed" in text
    assert "32 prompts, 32 samples" in text and "676 parameters, bf16" in text


def test_model_config_without_sizes(workdir) -> None:
    (workdir / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model.path=model: its config.json has no num_hidden_layers$"):
        plan(compose(overrides=GOOD).cfg)


def test_hub_model_has_no_memory_estimate_yet(workdir) -> None:
    cfg = compose(overrides=[*GOOD, "model.path=Qwen/Qwen3-0.6B"]).cfg
    assert plan(cfg).memory is None


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")])
def test_sizes_in_words(count: int, words: str) -> None:
    assert size(count) == words
