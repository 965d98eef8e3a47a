"""What GPUs of a cluster a recipe needs, before anything starts."""

import pytest

from slime.cluster.preflight import _check_gpus
from slime.config import CriticConfig, RoleConfig, SlimeConfig
from slime.config.algorithm import TeacherConfig
from slime.config.exits import PreflightError


def recipe(**roles: int) -> SlimeConfig:
    """Servers of eight GPUs, where any are needed."""
    cfg = SlimeConfig()
    cfg.rollout.tensor_parallel = 8
    cfg.cluster.roles = {role.replace("__", "/"): RoleConfig(devices=devices) for role, devices in roles.items()}
    return cfg


def test_a_server_stays_on_one_host() -> None:
    cfg = recipe(actor=8, rollout=8)
    _check_gpus(cfg, total=16, widest=8)
    with pytest.raises(PreflightError, match=r"rollout\.tensor_parallel=8: a server stays on one host and the largest has 4 GPUs"):
        _check_gpus(cfg, total=16, widest=4)


def test_a_teacher_s_server_too() -> None:
    cfg = recipe(actor=2, rollout=8, teacher__math=16)
    cfg.algorithm.distill, cfg.algorithm.teachers = "topk", {"math": TeacherConfig("t", tensor_parallel=16)}
    with pytest.raises(PreflightError, match=r"algorithm\.teachers\.math\.tensor_parallel=16: a server stays on one host"):
        _check_gpus(cfg, total=32, widest=8)


def test_ranks_may_lie_on_several_hosts() -> None:
    """Of an actor and a critic without engines nothing is a server."""
    cfg = recipe(actor=8, critic=8, rollout=8)
    cfg.algorithm.name, cfg.critic, cfg.run.only, cfg.run.replay = "ppo", CriticConfig(lr=1e-4), "train", "rollouts"
    _check_gpus(cfg, total=16, widest=4)


def test_shared_gpus_are_counted_once() -> None:
    cfg = recipe(actor=8, rollout=8)
    cfg.cluster.share = "split"
    _check_gpus(cfg, total=8, widest=8)
    with pytest.raises(PreflightError, match=r"asks for 8 GPUs \(actor and rollout 8\) and the cluster has 4"):
        _check_gpus(cfg, total=4, widest=8)
    cfg.cluster.share = "none"
    with pytest.raises(PreflightError, match=r"asks for 16 GPUs \(actor 8 \+ rollout 8\)"):
        _check_gpus(cfg, total=8, widest=8)
