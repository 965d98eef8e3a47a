"""Servers of teachers: the recipe by which they start, and what becomes of one that ends."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slime.cluster.placement import RolePlacement
from slime.config import RoleConfig, SlimeConfig
from slime.config.algorithm import TeacherConfig
from slime.engine import settings
from slime.engine.endpoint import Endpoint
from slime.engine.teacher_client import TeacherClient, Vocabulary
from slime.engine.teacher_fleet import ROOM, endpoints, serving, start_teacher
from slime.types import TeacherSignal
from tests.engine import servers
from tests.engine.test_fleet import kill_server


def recipe(student: Path, teacher: Path, devices: int = 1) -> SlimeConfig:
    cfg = servers.recipe(student, sglang={"log_requests": False}, quantization="fp8", engines=3, join="file")
    cfg.algorithm.teachers = {"math": TeacherConfig(str(teacher)), "code": TeacherConfig("c", url="http://h:1/", key_env="TEACHER_KEY")}
    cfg.cluster.roles["teacher/math"] = RoleConfig(devices)
    return cfg


def test_a_teacher_starts_as_the_rollout_s_engines_do_but_for_its_model(models: tuple[Path, Path]) -> None:
    cfg = recipe(*models, devices=4)
    cfg.algorithm.teachers["math"].tensor_parallel = 2
    own = serving(cfg, "math")
    assert (own.rollout.engines, own.rollout.tensor_parallel, own.rollout.quantization, own.rollout.join) == (2, 2, "none", None)
    chosen = settings.server_arguments(own, "cpu")
    assert (chosen["model_path"], chosen["dtype"], chosen["tp_size"], chosen["log_requests"]) == (str(models[1]), "float32", 2, False)
    assert "enable_return_routed_experts" not in chosen
    assert settings.longest_request(own) == cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens + ROOM + 1
    assert cfg == replace(recipe(*models, devices=4), algorithm=cfg.algorithm), "the run's own recipe is left as it is"


def test_where_teachers_answer(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    found = endpoints(recipe(*models), {})
    assert found == {"code": [Endpoint("http://h:1", "secret", "teacher code")]} and "secret" not in repr(found)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_teacher_that_ends_is_started_anew_and_says_the_same(placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = recipe(*models)
    role = RolePlacement("teacher/math", placement.group, [0], placement.device, placement.cpus)
    fleet = start_teacher(cfg, "math", role, tmp_path, "run")

    async def read(client: TeacherClient) -> TeacherSignal:
        return await client.read(list(range(5, 60)), 3, 4)

    async def before_and_after() -> tuple[TeacherSignal, TeacherSignal]:
        client = TeacherClient(fleet.endpoints(), Vocabulary(80, 80), timeout_s=60, wait_s=120, max_in_flight=4)
        before = await read(client)
        kill_server(fleet)
        after = await read(client)
        await client.close()
        return before, after

    try:
        assert fleet.endpoints()[0].name == "teacher math 0"
        before, after = asyncio.run(before_and_after())
    finally:
        fleet.stop()
    np.testing.assert_allclose(before.logprobs, after.logprobs, atol=1e-5)
    assert not servers.processes_of(f"--model-path={models[1]}\0--dtype")


@pytest.mark.e2e
def test_a_teacher_that_is_not_there_is_named(placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = recipe(models[0], tmp_path / "nowhere", devices=4)
    with pytest.raises(ValueError, match=r"^algorithm\.teachers\.math: algorithm\.teachers\.math\.path=\S+/nowhere: no such directory on "):
        start_teacher(replace(cfg, cluster=replace(cfg.cluster, roles={"teacher/math": RoleConfig(1)})), "math", placement, tmp_path, "run")
    says = r"servers=4 of algorithm\.teachers\.math\.tensor_parallel=1 devices do not fit the 2 devices of cluster\.roles\.teacher/math on "
    with pytest.raises(ValueError, match=says):
        start_teacher(cfg, "math", replace(placement, role="teacher/math"), tmp_path, "run")
