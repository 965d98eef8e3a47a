"""Whether a model can be divided as the recipe asks: what megatron-core would refuse in every rank, or get wrong."""

from pathlib import Path

from slime.config import SlimeConfig, TrainerConfig
from slime.config.parallel import EXPERT_TENSOR, SEQUENCE, ParallelSizes, parallel_sizes, stage_layers, whole
from slime.config.roles import generates, needed_roles
from slime.models.map import ModelMap
from slime.models.registry import load_map, read_map

BIAS_RATE = "moe_router_bias_update_rate"


def check_model(cfg: SlimeConfig, headers: bool = True) -> None:
    """Read the model in model.path, a directory (config.json and the headers of its weights, or not), and check how the recipe divides
    it, where it trains.

    Raises ValueError for what `load_map` and `check_layout` refuse.
    """
    trains = "actor" in needed_roles(cfg)
    read = load_map if headers else read_map
    model = read(Path(cfg.model.path), cfg.model.family, cfg.trainer.tensor_parallel if trains else 1)
    if model.unserved and generates(cfg):
        raise ValueError(
            f"model.path={cfg.model.path}: {model.family} can be trained but not served ({model.unserved}): train on demonstrations "
            "(algorithm.name=sft), or take a later model of its line"
        )
    if not (cfg.rollout.replay_experts or model.has_experts):
        raise ValueError(f"rollout.replay_experts=false has no effect: {model.family} has no experts; remove it")
    if trains:
        check_layout(model, parallel_sizes(cfg.trainer), cfg.trainer)


def check_teacher(cfg: SlimeConfig, name: str) -> None:
    """Read a teacher that the actor's ranks hold, and check that their layout divides it too. Raises ValueError naming it."""
    teacher, trainer, at = cfg.algorithm.teachers[name], cfg.trainer, f"algorithm.teachers.{name}"
    model = _divided(teacher.path, "auto", trainer, at)
    student = load_map(cfg.model.path, cfg.model.family, trainer.tensor_parallel)
    if cfg.algorithm.distill == "full" and trainer.tensor_parallel > 1 and model.gpt["vocab_size"] != student.gpt["vocab_size"]:
        raise ValueError(
            f"{at}.path={teacher.path} has {model.gpt['vocab_size']} rows of vocabulary and the student {student.gpt['vocab_size']} (with "
            f"padding), which trainer.tensor_parallel={trainer.tensor_parallel} divides differently: choose algorithm.distill=topk, or set "
            "trainer.tensor_parallel=1"
        )


def check_critic(cfg: SlimeConfig) -> None:
    """Read the model in critic.path, and check that the actor's layout divides it too. Raises ValueError naming it."""
    assert cfg.critic.path is not None, "model.path is checked itself"
    _divided(cfg.critic.path, cfg.model.family, cfg.trainer, "critic")


def _divided(path: str, family: str, trainer: TrainerConfig, at: str) -> ModelMap:
    """A model beside the policy, in its layout; `at` is the group of its knobs."""
    try:
        model = load_map(path, family, trainer.tensor_parallel)
        stage_layers(model.transformer["num_layers"], trainer)
        if model.has_experts:
            _experts(model, parallel_sizes(trainer), trainer)
    except ValueError as error:
        raise ValueError(f"{at}: {str(error).replace('model.path', f'{at}.path')}") from error
    return model


def check_layout(model: ModelMap, sizes: ParallelSizes, trainer: TrainerConfig) -> None:
    """Raises ValueError for sizes that do not divide the model's layers or experts, that its layers cannot be computed with, or that
    have nothing to divide. `load_map` checks what tensor parallelism divides."""
    stage_layers(model.transformer["num_layers"], trainer)
    _balancing(model, trainer)
    if model.has_experts:
        _experts(model, sizes, trainer)
    else:
        _no_experts(model, sizes, trainer)
    if sizes.tensor > 1 and not sizes.sequence:
        _whole_rows(model, sizes)


def _experts(model: ModelMap, sizes: ParallelSizes, trainer: TrainerConfig) -> None:
    count, inner = model.transformer["num_moe_experts"], model.transformer["moe_ffn_hidden_size"]
    if count % sizes.expert:
        raise ValueError(f"trainer.expert_parallel={sizes.expert} does not divide the model's {count} experts: choose one that does")
    if inner % sizes.expert_tensor:
        knob = f"trainer.megatron.{EXPERT_TENSOR}" if whole(trainer, EXPERT_TENSOR) else "trainer.tensor_parallel"
        mend = "choose one that does" + ("" if whole(trainer, EXPERT_TENSOR) else f", or set trainer.megatron.{EXPERT_TENSOR}")
        raise ValueError(f"{knob}={sizes.expert_tensor} does not divide the {inner} channels of the model's experts: {mend}")


def _no_experts(model: ModelMap, sizes: ParallelSizes, trainer: TrainerConfig) -> None:
    if sizes.expert > 1:
        raise ValueError(f"trainer.expert_parallel={sizes.expert}: {model.family} has no experts to divide; set it to 1")
    if (given := whole(trainer, EXPERT_TENSOR)) is not None:
        raise ValueError(f"trainer.megatron.{EXPERT_TENSOR}={given}: {model.family} has no experts to divide; remove it")


def _balancing(model: ModelMap, trainer: TrainerConfig) -> None:
    """The option that balances the load of experts: a rate, of a bias that the router has."""
    rate = trainer.megatron.get(BIAS_RATE)
    if rate and not model.transformer.get("moe_router_enable_expert_bias", False):
        raise ValueError(f"trainer.megatron.{BIAS_RATE}={rate} has no effect: {model.family} has no router with a bias; remove it")
    if isinstance(rate, int | float) and rate < 0:
        raise ValueError(f"trainer.megatron.{BIAS_RATE}={rate}: a negative rate sends tokens to the busiest experts; take one >= 0")


def _whole_rows(model: ModelMap, sizes: ParallelSizes) -> None:
    """Parts that all tensor-parallel ranks hold whole: each must see its own tokens, or its gradient would be counted several times."""
    parts = {
        "its router": model.has_experts,
        "the down-projections of its latent attention": model.transformer.get("multi_latent_attention", False),
    }
    for part, there in parts.items():
        if there:
            raise ValueError(
                f"trainer.megatron.{SEQUENCE}=false with trainer.tensor_parallel={sizes.tensor}: {model.family} needs activations that are "
                f"split along the sequence, for {part}; remove it"
            )
