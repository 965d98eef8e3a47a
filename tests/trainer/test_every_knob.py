"""Every knob of trainer and critic: a change of it shows in something that real ranks do. A new knob has to be put into one of the tables.

What is refused because it would do nothing: tests/config/test_bad_recipes.py. That layouts change no gradient: test_layouts.py."""

from dataclasses import fields

import pytest

from slime.config import CriticConfig, TrainerConfig
from tests.tiny import make_tiny
from tests.trainer.ranks import make_batch, make_cfg, weights

pytestmark = pytest.mark.e2e
COSINE, WSD, SEVERAL = {"schedule": "cosine"}, {"schedule": "wsd"}, {"updates_per_batch": 3}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# knob -> (what else the recipe says, another value than it has there, what shows it: see `seen`)
TRAINER = {
    "lr": [({}, 2e-3, "policy")],
    "schedule": [({}, "cosine", "policy"), ({}, "wsd", "policy")],
    "warmup_steps": [({}, 2, "policy")],
    "decay_steps": [(COSINE, 1, "policy"), (WSD, 3, "policy")],
    "min_lr": [(COSINE, 5e-4, "policy"), (WSD, 5e-4, "policy")],
    "weight_decay": [({}, 0.1, "policy")],
    "beta1": [({}, 0.5, "policy")],
    "beta2": [({}, 0.5, "policy")],
    "eps": [({}, 1e-2, "policy")],
    "clip_grad": [({}, 1e-3, "policy"), ({"clip_grad": 1e-3}, 0.0, "policy")],
    "tensor_parallel": [({}, 2, "parameters")],
    "pipeline_parallel": [({}, 2, "parameters")],
    "context_parallel": [({}, 2, "sequences")],
    "expert_parallel": [({}, 2, "parameters")],
    "max_tokens_per_rank": [({}, 40, "micro_batches")],
    "updates_per_batch": [({}, 3, "steps"), ({}, 3, "policy")],
    "epochs_per_batch": [({}, 2, "steps"), ({}, 2, "policy")],
    "megatron": [({}, RECOMPUTE, "forwards")],  # each option: test_options.py
}
CRITIC = {
    "path": [({}, "another", "critic")],
    "lr": [({}, 2e-2, "critic")],
    "value_clip": [(SEVERAL, 1e-4, "critic"), (SEVERAL, None, "critic")],
    "warmup_steps": [({}, 1, "steps"), ({}, 1, "policy")],
}
LAYOUTS = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")  # on two ranks
STEPS = 3


def seen(place, cfg) -> dict:
    """What a few batches leave behind, on this rank."""
    from slime.trainer import critic, step

    trainer = place.trainer(cfg)
    judge = place.critic(cfg, trainer) if trainer.algorithm.uses_critic else None
    batches = [make_batch(vocab=77, seed=seed) for seed in range(STEPS)]
    micro_batches = trainer.micro_batches(batches[0])
    forwards: list[int] = []
    for layer in trainer.model.stages[0].module.decoder.layers:
        layer.register_forward_hook(lambda *_: forwards.append(1))
    for batch in batches:
        values = None if judge is None else critic.values(judge, batch)
        learns = judge is None or judge.version >= cfg.critic.warmup_steps  # as TrainerGroup.update says
        _, returns = step.train_beside(trainer, batch, values, learns)
        if judge is not None:
            critic.learn(judge, batch, values, returns)
    return {
        "policy": {name: tensor.numpy() for name, tensor in weights(trainer).items()},
        "critic": {name: tensor.numpy() for name, tensor in weights(judge).items()} if judge else {},
        "steps": trainer.optimizer_steps,
        "parameters": sum(parameter.numel() for _, parameter in trainer.model.parameters()),
        "micro_batches": len(micro_batches),
        "sequences": len({batches[0].sample_of_token[at] for m in micro_batches for at in m.source if at >= 0}),
        "forwards": len(forwards),
    }


@pytest.fixture(scope="module")
def run(ranks, models, tmp_path_factory):
    """What `seen` sees of a recipe, once for each."""
    sparse, found = make_tiny(tmp_path_factory.mktemp("sparse"), "qwen3_moe", vocab=77), {}

    def of(group: str, knob: str, knobs: dict, given: dict) -> dict:
        path = sparse if knob == "expert_parallel" else models["qwen3"]
        world = 2 if knob in LAYOUTS else 1
        key = (group, str(path), world, str(knobs), str(given))
        if key not in found:
            cfg = make_cfg(path, **({**given, **knobs} if group == "trainer" else given))
            cfg.run.steps = STEPS
            if group == "critic":
                cfg.algorithm.name, cfg.critic.lr = "ppo", 1e-2
                for name, value in knobs.items():
                    setattr(cfg.critic, name, str(models["llama"]) if value == "another" else value)
            found[key] = ranks.run(seen, world, cfg)[0]
        return found[key]

    return of


def different(one, other) -> bool:
    if not isinstance(one, dict):
        return one != other
    return one.keys() != other.keys() or any(one[name].shape != other[name].shape or (one[name] != other[name]).any() for name in one)


CASES = [
    pytest.param(group, knob, given, value, what, id=f"{group}.{knob}={value if not isinstance(value, dict) else 'recompute'}-{what}")
    for group, table in (("trainer", TRAINER), ("critic", CRITIC))
    for knob, changes in table.items()
    for given, value, what in changes
]


@pytest.mark.parametrize(("group", "knob", "given", "value", "what"), CASES)
def test_a_change_shows(run, group, knob, given, value, what) -> None:
    before, after = run(group, knob, {}, given), run(group, knob, {knob: value}, given)
    assert different(before[what], after[what])


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_without_a_change_nothing_shows(ranks, models, name) -> None:
    cfg = make_cfg(models["qwen3"], **SEVERAL)
    cfg.run.steps, cfg.algorithm.name = STEPS, name
    first, second = (ranks.run(seen, 1, cfg)[0] for _ in range(2))
    assert not [what for what in first if different(first[what], second[what])]


def test_every_knob_is_changed() -> None:
    assert TRAINER.keys() == {field.name for field in fields(TrainerConfig)}
    assert CRITIC.keys() == {field.name for field in fields(CriticConfig)}
    for table, group in ((TRAINER, TrainerConfig), (CRITIC, CriticConfig)):
        for field in fields(group):
            tried = {value for _, value, _ in table[field.name] if not isinstance(value, dict)} | {field.default}
            assert tried >= set(field.metadata.get("choices", ())), field.name
