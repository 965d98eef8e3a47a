"""The resource plan's arithmetic against numbers worked out by hand."""

import io
import json
import struct
from pathlib import Path

import pytest
from rich.console import Console

from slime.config.exits import ConfigError
from slime.config.parallel import ParallelSizes
from slime.config.plan import MemoryPlan, plan
from slime.config.plan_memory import CHUNK_ELEMENTS, Parameters, RankMemory, count_parameters
from slime.config.plan_view import layout, show, size
from slime.trainer.kernels import vocabulary_chunks
from tests.config.composing import composed
from tests.config.conftest import MODEL

GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]", "data.max_prompt_tokens=24", "rollout.max_response_tokens=8"]
PARALLEL = [
    "cluster.roles.actor.devices=4",
    "trainer.tensor_parallel=2",
    "cluster.roles.rollout.devices=4",
    "rollout.engines=2",
    "rollout.tensor_parallel=2",
]


def test_parameters_are_counted_from_headers(workdir) -> None:
    assert count_parameters(workdir / "model", MODEL) == Parameters(0, 0, 0, 10 * 64 + 36, 0)


def test_batch_of_a_parallel_run(workdir) -> None:
    plan_of = plan(
        composed(
            *GOOD,
            *PARALLEL,
            "rollout.prompts_per_step=6",
            "rollout.samples_per_prompt=3",
            "trainer.updates_per_batch=2",
            "trainer.epochs_per_batch=3",
            "trainer.max_tokens_per_rank=70",
        )
    ).batch
    update = plan_of.update
    assert update is not None
    assert (plan_of.prompts, plan_of.samples, update.optimizer_steps, update.samples) == (6, 18, 6, 9)
    assert (update.data_parallel, update.samples_per_rank, update.tokens_per_rank) == (2, 5, 5 * 32)
    assert update.micro_batches == 3  # two samples of 32 tokens fit into 70


@pytest.mark.parametrize(("dtype", "width", "optimizer"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_memory_by_the_documented_formula(dtype: str, width: int, optimizer: int, workdir) -> None:
    memory = plan(composed(*GOOD, *PARALLEL, f"model.dtype={dtype}", "trainer.max_tokens_per_rank=100")).memory
    assert memory is not None and memory.parameters == 676
    rank, engine = memory.rank, memory.engine
    assert rank is not None and engine is not None
    assert (rank.weights, rank.gradients, rank.optimizer) == (338 * width, 338 * 4, 338 * optimizer // 2)
    assert rank.activations == 17 * width * 64 * 2 * 100 // 2
    assert rank.logits == 2 * width * 50 * 100  # and their gradient; half of 100 ids
    assert rank.logprobs == 3 * 4 * 50 * 100  # one chunk holds all rows
    assert rank.snapshot == 338 * width // 2 and rank.critic == rank.frozen == 0
    assert rank.total == rank.weights + rank.gradients + rank.optimizer + rank.snapshot + rank.activations + rank.logits + rank.logprobs
    assert engine.weights == 338 * width
    assert engine.kv_per_token == 2 * 2 * 16 * width * 1  # two KV heads over two devices
    assert engine.kv_wanted == engine.kv_per_token * 128 * 32  # half of 256 samples, 32 tokens each


def test_an_fp8_engine_holds_a_byte_for_all_but_embedding_and_head(workdir) -> None:
    cfg = composed(*GOOD, *PARALLEL)
    cfg.rollout.quantization = "fp8"
    memory = plan(cfg).memory
    assert memory is not None and memory.engine is not None
    assert memory.engine.weights == (676 + 2 * 100 * 64) // 2


SPARSE = {
    **MODEL,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
DIVIDED = ["cluster.roles.actor.devices=8", "trainer.tensor_parallel=2", "trainer.pipeline_parallel=2", "trainer.max_tokens_per_rank=100"]
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10}


def write_model(workdir: Path, config: dict, tied: bool = False) -> None:
    """4 layers, the first of them dense, the others with 4 experts, and a head for further tokens."""
    layers = {f"model.layers.{layer}.self_attn.q_proj.weight": [64, 64] for layer in range(5)}
    experts = {f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": [32, 64] for layer in range(1, 5) for expert in range(4)}
    ends = {"model.embed_tokens.weight": [100, 64], "lm_head.weight": [100, 64]}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in {**layers, **experts, **ends}.items()}).encode()
    (workdir / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (workdir / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))


def memory_of(*overrides: str) -> MemoryPlan:
    memory = plan(composed(*GOOD, *overrides)).memory
    assert memory is not None
    return memory


def rank_of(*overrides: str) -> RankMemory:
    rank = memory_of(*overrides).rank
    assert rank is not None
    return rank


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_by_what_divides_them(tied: bool, workdir) -> None:
    write_model(workdir, SPARSE, tied)
    found = count_parameters(workdir / "model", {**SPARSE, "tie_word_embeddings": tied})
    assert found == Parameters(6400, 0 if tied else 6400, 3 * 4 * 2048, 4 * 4096, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_memory_of_experts_in_pipeline_stages(tied: bool, workdir) -> None:
    """Both stages hold equally much, a tied output layer too; the first holds activations of two micro-batches, the last has logits."""
    write_model(workdir, SPARSE, tied)
    rank = rank_of(*DIVIDED, "trainer.expert_parallel=2", "trainer.megatron.expert_tensor_parallel_size=1")
    plain, experts = (2 * 4096 + 6400) // 2, 3 * 4 * 2048 // 2 // 2
    assert (rank.weights, rank.gradients) == (2 * (plain + experts), 4 * (plain + experts))
    assert rank.optimizer == 12 * (plain // 2 + experts // 2)  # two copies of either on 8 ranks
    dense, sparse = 34 * 64 // 2, (15 * 64 + 2 * (2 * (2 * 64 + 3 * 16) + 3 * 16)) // 2
    assert rank.activations == (dense + 3 * sparse) // 4 * 2 * 100 * 2  # on average, 2 layers, 100 tokens
    assert rank.logits == rank.logprobs == 0


def test_memory_of_experts_that_are_split_themselves(workdir) -> None:
    """Each of two ranks holds half of every expert, and every token of both that goes there."""
    write_model(workdir, SPARSE)
    rank = rank_of("cluster.roles.actor.devices=2", "trainer.tensor_parallel=2", "trainer.max_tokens_per_rank=100")
    assert rank.weights == 2 * (4 * 4096 + 2 * 6400 + 3 * 4 * 2048) // 2
    dense, sparse = 34 * 64 // 2, (15 * 64 + 2 * (2 * (2 * 2 * 64 + 3 * 16) + 3 * 16)) // 2
    assert rank.activations == (dense + 3 * sparse) * 100


def test_memory_of_interleaved_stages(workdir) -> None:
    """Five of the 2 x 2 chunks are in flight on the first stage, each of one layer."""
    (workdir / "model" / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 4}))
    rank = rank_of(*DIVIDED, "trainer.tensor_parallel=1", "trainer.megatron.virtual_pipeline_model_parallel_size=2")
    assert rank.activations == 34 * 64 * 100 * 5


def test_memory_of_uneven_stages(workdir) -> None:
    """The last of two stages has 3 of 4 layers, and the logits."""
    write_model(workdir, SPARSE)
    first = "trainer.megatron.num_layers_in_first_pipeline_stage=1"
    rank = rank_of("cluster.roles.actor.devices=2", "trainer.pipeline_parallel=2", "model.dtype=fp32", first)
    assert rank.weights == 4 * (3 * (4 * 4096 + 3 * 4 * 2048) // 4 + 6400)
    assert rank.logits == 2 * 4 * 100 * 8192


def test_memory_with_whole_rows_on_tensor_parallel_ranks(workdir) -> None:
    rank = rank_of(*PARALLEL, "trainer.max_tokens_per_rank=100", "trainer.megatron.sequence_parallel=false")
    assert rank.activations == (10 + 24 // 2) * 64 * 2 * 100


@pytest.mark.parametrize(("config", "gathered"), [(MODEL, 2 * 2 * 16), (MODEL | LATENT, 4 * (6 + 8 + 10))])
def test_memory_of_shared_sequences(config: dict, gathered: int, workdir) -> None:
    """A rank's half of the longest sequence, 32 tokens, and the keys and values of the other half."""
    (workdir / "model" / "config.json").write_text(json.dumps(config))
    rank = rank_of("cluster.roles.actor.devices=4", "trainer.context_parallel=2", "trainer.max_tokens_per_rank=10")
    assert rank.activations == (34 * 64 + 2 * gathered) * 2 * 16
    assert rank.logits == 2 * 2 * 100 * 16
    assert rank.optimizer == 12 * 676 // 4  # over data and context


def test_cache_of_latent_attention_is_whole_on_every_device(workdir) -> None:
    (workdir / "model" / "config.json").write_text(json.dumps(MODEL | LATENT))
    engine = memory_of(*PARALLEL).engine
    assert engine is not None and engine.kv_per_token == 2 * (12 + 8) * 2


def test_micro_batches_of_shared_sequences_in_interleaved_stages(workdir) -> None:
    (workdir / "model" / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 4}))
    cfg = composed(*GOOD, *DIVIDED, "trainer.tensor_parallel=1", "trainer.context_parallel=2", "trainer.max_tokens_per_rank=64",
                             "rollout.samples_per_prompt=9", "trainer.megatron.virtual_pipeline_model_parallel_size=2")  # fmt: skip
    update = plan(cfg).batch.update
    assert update is not None and (update.data_parallel, update.samples_per_rank) == (2, 144)
    assert update.micro_batches == 36  # four sequences in two ranks' 128 tokens
    cfg.rollout.samples_per_prompt = 8
    cfg.rollout.prompts_per_step = 33
    assert (update := plan(cfg).batch.update) is not None and update.samples_per_rank == 132
    assert update.micro_batches == 34  # 33, in rounds of two


def test_stages_that_do_not_divide(workdir) -> None:
    with pytest.raises(ConfigError, match=r"^the model's 2 layers do not divide into trainer\.pipeline_parallel=4 stages: "):
        rank_of("cluster.roles.actor.devices=4", "trainer.pipeline_parallel=4")


@pytest.mark.parametrize(
    ("sizes", "data", "words"),
    [
        ((1, 1, 1, 1, 1, 1), 1, "1 data"),
        ((2, 1, 1, 1, 2, 1), 4, "4 data x 2 tensor"),
        ((2, 2, 2, 1, 2, 2), 1, "1 data x 2 tensor x 2 pipeline (x 2 virtual) x 2 context"),
        ((2, 2, 1, 4, 1, 1), 2, "2 data x 2 tensor x 2 pipeline; experts over 4"),
        ((1, 1, 4, 2, 2, 1), 1, "1 data x 4 context; experts over 2 x 2 tensor"),
    ],
)
def test_layout_in_words(sizes: tuple[int, ...], data: int, words: str) -> None:
    assert layout(ParallelSizes(*sizes, sequence=False), data) == words


def test_log_probs_are_computed_in_chunks(workdir) -> None:
    memory = plan(composed(*GOOD, "trainer.max_tokens_per_rank=1000000")).memory
    assert memory is not None and memory.rank is not None
    assert memory.rank.logprobs == 3 * 4 * (CHUNK_ELEMENTS // 100) * 100
    assert CHUNK_ELEMENTS == vocabulary_chunks.CHUNK_ELEMENTS


@pytest.mark.parametrize("role", [["~cluster.roles.actor"], ["trainer.tensor_parallel=4"]])
def test_no_arithmetic_of_a_trainer_where_there_is_none(role: list[str], workdir) -> None:
    cfg = composed(*GOOD, "run.only=rollout", "rollout.dump=true", *role)
    made = plan(cfg)
    assert made.batch.update is None and made.memory is not None and made.memory.rank is None and made.memory.engine is not None
    shown = io.StringIO()
    show(cfg, made, Console(file=shown, width=120))
    assert "32 prompts, 256 samples" in shown.getvalue() and "rank" not in shown.getvalue()


def test_no_arithmetic_of_engines_where_there_are_none(workdir) -> None:
    made = plan(composed(*GOOD, "algorithm.name=functions:imitate", "~cluster.roles.rollout"))
    assert tuple(made.roles) == ("actor",) and made.batch.samples == 32
    assert made.memory is not None and made.memory.engine is None


def test_shown_plan(workdir) -> None:
    shown = io.StringIO()
    cfg = composed(*GOOD, "algorithm.name=sft")
    show(cfg, plan(cfg), Console(file=shown, width=120))
    text = shown.getvalue()
    assert "1 data" in text and "none needed" in text
    assert "32 prompts, 32 samples" in text and "676 parameters, bf16" in text
    assert "about 32 samples, 1024 tokens at full length, 1 micro-batches" in text and "engine" not in text


def test_shown_plan_of_pipeline_stages(workdir) -> None:
    write_model(workdir, SPARSE)
    cfg = composed(*GOOD, *DIVIDED, "trainer.expert_parallel=2")
    show(cfg, plan(cfg), Console(file=(shown := io.StringIO()), width=160))
    text = shown.getvalue()
    assert "2 data x 2 tensor x 2 pipeline; experts over 2 x 2 tensor" in text
    assert "rank: activations of micro-batches in flight" in text and "logits" not in text
    assert "rank: together, on pipeline stage 1 of 2, which takes the most" in text


def test_model_config_without_sizes(workdir) -> None:
    (workdir / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model.path=model: its config.json has no num_hidden_layers$"):
        plan(composed(*GOOD))


def test_hub_model_has_no_memory_estimate_yet(workdir) -> None:
    cfg = composed(*GOOD, "model.path=Qwen/Qwen3-0.6B")
    assert plan(cfg).memory is None


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")])
def test_sizes_in_words(count: int, words: str) -> None:
    assert size(count) == words


def test_memory_of_a_critic_on_the_actor_s_ranks(workdir) -> None:
    """Of 8 ranks in two stages; neither a tied nor an untied output layer is a critic's."""
    for tied in (False, True):
        write_model(workdir, SPARSE, tied)
        rank, without = rank_of(*DIVIDED, "algorithm.name=ppo"), rank_of(*DIVIDED)
        layers = 2 * 4096 // 2 + (3 * 4 * 2048 // 2) // 2
        first, last = layers + 6400 // 2, layers + 64 // 2
        copies = 2  # of the layers and of the experts, which the tensor-parallel ranks divide
        bytes_of = {stage: 6 * held + 12 * held // copies for stage, held in ((0, first), (1, last))}
        assert rank.critic == bytes_of[rank.stage] and without.critic == 0
        assert rank.total == rank.held + rank.critic + rank.snapshot + rank.activations + rank.logits + rank.logprobs


def test_memory_of_a_critic_on_ranks_of_its_own(workdir) -> None:
    write_model(workdir, SPARSE)
    own = ["algorithm.name=ppo", "cluster.roles.critic.devices=4"]
    memory = memory_of(*DIVIDED, "trainer.pipeline_parallel=1", *own)
    critic, rank = memory.critic, memory.rank
    assert critic is not None and rank is not None and rank.critic == 0
    held = (4 * 4096 + 6400 + 64) // 2 + 3 * 4 * 2048 // 2
    assert (critic.weights, critic.gradients, critic.optimizer) == (2 * held, 4 * held, 12 * held // 2)  # two copies on 4 ranks
    assert critic.logits == critic.logprobs == critic.critic == 0 and critic.activations == rank.activations


def test_a_critic_s_own_model_is_counted(workdir) -> None:
    write_model(workdir, SPARSE)
    (workdir / "model").rename(workdir / "small")
    (workdir / "model").mkdir()
    write_model(workdir, {**SPARSE, "hidden_size": 128})
    rank = rank_of("algorithm.name=ppo", "critic.path=small", "model.dtype=fp32")
    assert rank.critic == 16 * (4 * 4096 + 6400 + 64 + 3 * 4 * 2048)
    assert plan(composed(*GOOD, "algorithm.name=ppo", "critic.path=Qwen/Qwen3-0.6B")).memory is None


@pytest.mark.parametrize(
    ("roles", "words"),
    [([], "rank: weights, gradients and optimizer state of the critic"), (["cluster.roles.critic.devices=2"], "critic's rank: together")],
)
def test_a_shown_critic(roles: list[str], words: str, workdir) -> None:
    shown = io.StringIO()
    cfg = composed(*GOOD, "algorithm.name=ppo", *roles)
    show(cfg, plan(cfg), Console(file=shown, width=120))
    assert words in shown.getvalue() and ("2 data" in shown.getvalue()) == bool(roles)


TEACHERS = ["algorithm.name=opd", "algorithm.teachers.big.path=big", "algorithm.teachers.big.sources=[a]",
            "algorithm.teachers.same.path=model", "algorithm.teachers.same.sources=[b]"]  # fmt: skip


def write_two(workdir: Path) -> None:
    """model/, and big/ with 8 layers instead of 4 and twice the vocabulary."""
    write_model(workdir, SPARSE)
    (workdir / "model").rename(workdir / "small")
    (workdir / "model").mkdir()
    write_model(workdir, {**SPARSE, "num_hidden_layers": 8, "vocab_size": 200})
    (workdir / "model").rename(workdir / "big")
    (workdir / "small").rename(workdir / "model")


@pytest.mark.parametrize("knobs", [["algorithm.kl_loss_coef=0.1"], ["algorithm.name=ppo", "algorithm.kl_reward_coef=0.1"]])
def test_memory_of_a_reference(knobs: list[str], workdir) -> None:
    """As much as the policy's own weights, on every stage."""
    write_model(workdir, SPARSE)
    rank, without = rank_of(*DIVIDED, *knobs), rank_of(*DIVIDED, *knobs[:-1])
    assert rank.frozen == rank.weights and without.frozen == 0 and rank.total == without.total + rank.frozen


@pytest.mark.parametrize("distill", ["sampled", "topk"])
def test_memory_of_teachers_that_ranks_hold(distill: str, workdir) -> None:
    """One of 5 layers of the file (the fifth, of the smaller model, is a head for further tokens), one as large as the student."""
    write_two(workdir)
    rank = rank_of("trainer.max_tokens_per_rank=100", *TEACHERS, f"algorithm.distill={distill}")
    small, big = 4 * 4096 + 2 * 6400 + 3 * 4 * 2048, 5 * 4096 + 2 * 6400 + 4 * 4 * 2048
    assert rank.frozen == 2 * (small + big)
    assert rank.logits == (2 if distill == "sampled" else 3) * 2 * 100 * 100


def test_memory_of_whole_distributions(workdir) -> None:
    """The student's logits with two gradients, and those of the teacher with the larger vocabulary."""
    write_two(workdir)
    rank = rank_of("trainer.max_tokens_per_rank=100", *TEACHERS, "algorithm.distill=full")
    assert rank.logits == 3 * 2 * 100 * 100 + 2 * 200 * 100


def test_teachers_that_are_served_elsewhere_take_no_memory(workdir) -> None:
    write_two(workdir)
    urls = ["algorithm.teachers.big.url=http://h:1", "algorithm.teachers.same.url=http://h:2"]
    assert rank_of(*TEACHERS, "algorithm.distill=topk", *urls).frozen == 0
    with pytest.raises(
        ConfigError, match=r"^algorithm\.teachers\.big\.path=no: no config\.json there; give a Hugging Face model directory$"
    ):
        rank_of(*TEACHERS, "algorithm.distill=topk", "algorithm.teachers.big.path=no")
    on_hub = ["algorithm.teachers.big.path=Qwen/Qwen3-0.6B", "algorithm.distill=topk"]
    assert plan(composed(*GOOD, *TEACHERS, *on_hub)).memory is None


@pytest.mark.parametrize("knob", ["sync.snapshot=host", "sync.mode=full", "algorithm.name=functions:imitate"])
def test_a_snapshot_that_lies_elsewhere_or_is_none(knob: str, workdir) -> None:
    assert rank_of().snapshot == 2 * 676 and rank_of(knob).snapshot == 0


def test_frozen_models_and_the_snapshot_are_shown(workdir) -> None:
    shown = io.StringIO()
    cfg = composed(*GOOD, "algorithm.kl_loss_coef=0.1")
    show(cfg, plan(cfg), Console(file=shown, width=120))
    assert "rank: weights of the reference and of teachers" in shown.getvalue()
    assert "rank: snapshot of the weights that engines have" in shown.getvalue()
