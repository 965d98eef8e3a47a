"""Everything that a rank of the actor holds: the policy, the reference and the teachers that the recipe asks for."""

from slime.algorithms.registry import build_algorithm
from slime.config import SlimeConfig
from slime.config.roles import served_teachers
from slime.observe.trace import Tracer
from slime.trainer.device import Device
from slime.trainer.distributed import Parallel
from slime.trainer.export import make_atlas
from slime.trainer.frozen import build_frozen
from slime.trainer.model import build_model
from slime.trainer.state import Trainer


def build_trainer(cfg: SlimeConfig, device: Device, parallel: Parallel, tracer: Tracer) -> Trainer:
    """All ranks call it together. Raises ValueError for a model, an algorithm or an option that cannot be used."""
    algorithm = build_algorithm(cfg.algorithm)
    model = build_model(cfg, parallel)
    return Trainer(
        cfg=cfg,
        device=device,
        parallel=parallel,
        model=model,
        atlas=make_atlas(model, parallel),
        algorithm=algorithm,
        tracer=tracer,
        reference=build_frozen(cfg.model.path, cfg.model.family, cfg, parallel) if algorithm.uses_reference else None,
        teachers={
            position: build_frozen(teacher.path, "auto", cfg, parallel)
            for position, (name, teacher) in enumerate(cfg.algorithm.teachers.items())
            if name not in served_teachers(cfg)
        },
    )
