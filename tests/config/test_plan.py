"""The resource plan's arithmetic against numbers worked out by hand."""

import io

import pytest
from rich.console import Console

from slime.config.exits import ConfigError
from slime.config.load import compose
from slime.config.plan import CHUNK_ELEMENTS, count_parameters, plan
from slime.config.plan_view import show, size
from slime.trainer import logprobs

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
    plan_of = plan(
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
    update = plan_of.update
    assert update is not None
    assert (plan_of.prompts, plan_of.samples, update.optimizer_steps, update.samples) == (6, 18, 6, 9)
    assert (update.data_parallel, update.samples_per_rank, update.tokens_per_rank) == (2, 5, 5 * 32)
    assert update.micro_batches == 3  # two samples of 32 tokens fit into 70


@pytest.mark.parametrize(("dtype", "width", "optimizer"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_memory_by_the_documented_formula(dtype: str, width: int, optimizer: int, workdir) -> None:
    memory = plan(compose(overrides=[*GOOD, *PARALLEL, f"model.dtype={dtype}", "trainer.max_tokens_per_rank=100"]).cfg).memory
    assert memory is not None and memory.parameters == 676
    rank, engine = memory.rank, memory.engine
    assert rank is not None and engine is not None
    assert (rank.weights, rank.gradients, rank.optimizer) == (338 * width, 338 * 4, 338 * optimizer // 2)
    assert rank.activations == 17 * width * 64 * 2 * 100 // 2
    assert rank.logits == 2 * width * 50 * 100  # and their gradient; half of 100 ids
    assert rank.logprobs == 5 * 4 * 50 * 100  # one chunk holds all rows
    assert rank.total == rank.weights + rank.gradients + rank.optimizer + rank.activations + rank.logits + rank.logprobs
    assert engine.weights == 338 * width
    assert engine.kv_per_token == 2 * 2 * 16 * width * 1  # two KV heads over two devices
    assert engine.kv_wanted == engine.kv_per_token * 128 * 32  # half of 256 samples, 32 tokens each


def test_log_probs_are_computed_in_chunks(workdir) -> None:
    memory = plan(compose(overrides=[*GOOD, "trainer.max_tokens_per_rank=1000000"]).cfg).memory
    assert memory is not None and memory.rank is not None
    assert memory.rank.logprobs == 5 * 4 * (CHUNK_ELEMENTS // 100) * 100
    assert CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS


@pytest.mark.parametrize("role", [["~cluster.roles.actor"], ["trainer.tensor_parallel=4"]])
def test_no_arithmetic_of_a_trainer_where_there_is_none(role: list[str], workdir) -> None:
    cfg = compose(overrides=[*GOOD, "run.only=rollout", "rollout.dump=true", *role]).cfg
    made = plan(cfg)
    assert made.batch.update is None and made.memory is not None and made.memory.rank is None and made.memory.engine is not None
    shown = io.StringIO()
    show(cfg, made, Console(file=shown, width=120))
    assert "32 prompts, 256 samples" in shown.getvalue() and "rank" not in shown.getvalue()


def test_no_arithmetic_of_engines_where_there_are_none(workdir) -> None:
    made = plan(compose(overrides=[*GOOD, "algorithm.name=functions:imitate", "~cluster.roles.rollout"]).cfg)
    assert tuple(made.roles) == ("actor",) and made.batch.samples == 32
    assert made.memory is not None and made.memory.engine is None


def test_shown_plan(workdir) -> None:
    shown = io.StringIO()
    cfg = compose(overrides=[*GOOD, "algorithm.name=sft"]).cfg
    show(cfg, plan(cfg), Console(file=shown, width=120))
    text = shown.getvalue()
    assert "1 data-parallel x 1 tensor-parallel ranks" in text and "none needed" in text
    assert "32 prompts, 32 samples" in text and "676 parameters, bf16" in text
    assert "about 32 samples, 1024 tokens at full length, 1 micro-batches" in text and "engine" not in text


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
