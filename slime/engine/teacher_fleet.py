"""The servers of teachers: those that slime starts, as engines that get no weights, and those of the user's."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.roles import teacher_role, tensor_parallel
from slime.engine.endpoint import Endpoint
from slime.engine.fleet import EngineFleet

ROOM = 16  # tokens by which a cache is larger than what is read: SGLang takes no input that fills it
NEVER_CHANGES = "teacher"  # what its servers call their weights


def start_teacher(cfg: SlimeConfig, name: str, placement: RolePlacement, run_dir: Path, run_id: str) -> EngineFleet:
    """The servers of one teacher, on the devices of its role. They are looked after: one that ends is started anew, up to
    rollout.max_restarts times. Raises what EngineFleet.start raises, naming the teacher."""
    at = f"algorithm.teachers.{name}"
    try:
        fleet = EngineFleet.start(serving(cfg, name), placement, run_dir, run_id, called=f"teacher {name}")
    except ValueError as error:
        said = str(error)
        for of_rollout, own in (
            ("model.path", f"{at}.path"),
            ("rollout.tensor_parallel", f"{at}.tensor_parallel"),
            ("rollout.engines=", "servers="),
            ("lower rollout.engines or add devices", "change the devices"),
        ):
            said = said.replace(of_rollout, own)
        raise ValueError(f"{at}: {said}") from error
    try:
        fleet.relabel(NEVER_CHANGES, cfg.rollout.start_timeout_s)
    except BaseException:
        fleet.stop()
        raise
    return fleet


def serving(cfg: SlimeConfig, name: str) -> SlimeConfig:
    """The recipe by which a teacher's servers are started: the rollout's, with the teacher for a model."""
    role = teacher_role(name)
    _, width = tensor_parallel(cfg, role)
    model = replace(cfg.model, path=cfg.algorithm.teachers[name].path, family="auto")
    rollout = replace(
        cfg.rollout,
        engines=cfg.cluster.roles[role].devices // width,
        tensor_parallel=width,
        max_response_tokens=cfg.rollout.max_response_tokens + ROOM,
        external_urls=[],
        external_key_env=None,
        join=None,
        quantization="none",
        replay_experts=False,
    )
    cluster = replace(cfg.cluster, share="none")  # its devices are its own
    return replace(cfg, model=model, rollout=rollout, cluster=cluster, data=replace(cfg.data, eval={}))


def endpoints(cfg: SlimeConfig, own: Mapping[str, EngineFleet]) -> dict[str, list[Endpoint]]:
    """Where each served teacher answers; `own` are the fleets of those that slime serves."""
    theirs = {
        name: [Endpoint(teacher.url.rstrip("/"), os.environ[teacher.key_env] if teacher.key_env else "", f"teacher {name}")]
        for name, teacher in cfg.algorithm.teachers.items()
        if teacher.url is not None
    }
    return theirs | {name: fleet.endpoints() for name, fleet in own.items()}
