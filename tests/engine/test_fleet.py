"""Host agents over real Ray: servers of two ranks, the weight channel, engines of the user's, and what goes wrong at the start."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from slime.cluster.deadline import ProcessLost
from slime.cluster.placement import RolePlacement
from slime.config import SyncConfig
from slime.config.exits import PreflightError
from slime.engine.client import EngineClient, Generation
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineLost, StaleWeights
from slime.engine.fleet import EngineFleet
from slime.engine.health import State, Turn
from slime.engine.server import Server
from slime.sync.channel import Channel, NotProven
from slime.sync.protocol import Answer
from slime.sync.publication import Action, Do
from slime.sync.records import ModelSpec, TensorSpec
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.test_server import distance, tensors
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
FULL = SyncConfig(mode="full")
PROMPT = list(range(5, 25))
SAMPLING = servers.Endless(max_new_tokens=10)


class Weights:
    """A publisher of files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def spec(self) -> ModelSpec:
        return ModelSpec(tuple(TensorSpec(name, tuple(t.shape), "float32") for name, t in tensors(self.path)))

    def weights(self, version: WeightVersion, bucket_bytes: int) -> Iterator[Any]:
        found = tensors(self.path)
        for at in range(0, len(found), 5):
            yield ray.put(found[at : at + 5])


def ask(fleet: EngineFleet, label: str) -> Generation:
    """The answer to PROMPT, in a batch with prompts of other lengths."""
    return answers(fleet.endpoints(), label, [PROMPT, PROMPT[:3], PROMPT * 3])[0]


def ask_one(endpoint: Endpoint, label: str) -> Generation:
    """The answer of this engine."""
    return answers([endpoint], label, [PROMPT])[0]


def answers(endpoints: list[Endpoint], label: str, prompts: list[list[int]]) -> list[Generation]:
    async def together() -> list[Generation]:
        async with EngineClient(endpoints, vocab_size=servers.VOCAB, timeout_s=60, max_in_flight=100) as client:
            await client.expect(label)
            return await asyncio.gather(*(client.generate(prompt, SAMPLING, session=1) for prompt in prompts))

    return asyncio.run(together())


def test_two_ranks_take_published_weights_and_their_end_is_noticed_and_mended(
    placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path
) -> None:
    cfg = servers.recipe(models[0], tensor_parallel=2)
    fleet = EngineFleet.start(cfg, placement, tmp_path, "run")
    try:
        publisher = Weights(models[0])
        channel = Channel(FULL, publisher, fleet, WeightVersion(0, 0, "run"))
        channel.open()
        with pytest.raises(StaleWeights, match="engine 0 holds weights run/loaded; expected run/0/0"):
            ask(fleet, "run/0/0")
        channel.publish(0)
        assert distance(models[0], ask(fleet, "run/0/0"), PROMPT) < 1e-5
        publisher.path = models[1]
        metrics = channel.publish(1)
        assert metrics["sync/wire_bytes"] == sum(tensor.nbytes for _, tensor in tensors(models[1]))
        answer = ask(fleet, "run/0/1")
        assert distance(models[1], answer, PROMPT) < 1e-5 and answer.versions[0].version == "run/0/1"
        fleet.wait_for_engines(1)
        assert [turn.state for turn in fleet.tend()] == [State.HEALTHY]
        kill_server(fleet)
        turns = wait_for_its_return(fleet)
        assert [turn.state for turn in turns] == [State.DEAD, State.RESTARTING, State.STALE, State.HEALTHY] and turns[-1].life == 1
        assert turns[0].tail, "the end of its log"
        assert distance(models[1], ask(fleet, "run/0/1"), PROMPT) < 1e-5, "it loaded model.path and did not catch up"
        assert fleet.engines() == ["engine 0"] and fleet.tend() == []
    finally:
        fleet.stop()
    assert not servers.processes_of(f"--model-path={models[0]}\0--dtype")


def kill_server(fleet: EngineFleet) -> None:
    port = fleet.endpoints()[0].url.rpartition(":")[2]
    main = min(servers.processes_of(f"--port\0{port}"))  # a child has its arguments until it has its name
    os.kill(main, signal.SIGKILL)


def wait_for_its_return(fleet: EngineFleet) -> list[Turn]:
    """Its turns from its death on: a probe may have suspected it before."""
    turns: list[Turn] = []
    give_up = time.monotonic() + 120
    while not turns or turns[-1].state is not State.HEALTHY:
        assert time.monotonic() < give_up, turns
        turns += [turn for turn in fleet.tend() if turn.state is not State.SUSPECT]
        time.sleep(0.2)
    return turns


def test_servers_of_the_user_are_used_and_left_alone(
    placement: RolePlacement, server: Server, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KEY", server.spec.endpoint.key)
    cfg = servers.recipe(models[0], external_urls=[server.spec.endpoint.url + "/"], external_key_env="ENGINE_KEY")
    fleet = EngineFleet.start(cfg, None, tmp_path, "run")
    assert fleet.endpoints()[0].sglang == "0.5.23"
    channel = Channel(FULL, Weights(models[1]), fleet, WeightVersion(3, 0, "run"))
    channel.open()
    channel.publish(9)
    assert distance(models[1], ask(fleet, "run/3/9"), PROMPT) < 1e-5
    Channel(SyncConfig(), None, fleet, WeightVersion(4, 0, "run")).publish(0)
    assert distance(models[1], ask(fleet, "run/4/0"), PROMPT) < 1e-5
    fleet.stop()
    assert server.alive
    cfg.model.path = str(make_tiny(tmp_path / "experts", "qwen3_moe"))
    with pytest.raises(PreflightError, match="does not say which experts tokens go to: start it with --enable-return-routed-experts"):
        EngineFleet.start(cfg, None, tmp_path, "run")
    cfg.model.path = str(models[0])
    monkeypatch.setenv("ENGINE_KEY", "wrong")
    with pytest.raises(PreflightError, match=r"engine 0 \(rollout.external_urls\) refused /server_info: 401"):
        EngineFleet.start(cfg, None, tmp_path, "run")
    cfg.rollout.external_urls = ["http://127.0.0.1:9"]
    with pytest.raises(PreflightError, match=r"engine 0 \(rollout.external_urls\) at http://127.0.0.1:9 was lost during /server_info"):
        EngineFleet.start(cfg, None, tmp_path, "run")


def test_a_server_that_comes_late_is_caught_up_proven_and_then_used(
    placement: RolePlacement,
    server: Server,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ENGINE_KEY", server.spec.endpoint.key)
    listed = tmp_path / "late.txt"
    cfg = servers.recipe(models[0], join=str(listed), external_key_env="ENGINE_KEY")
    fleet = EngineFleet.start(cfg, placement, tmp_path, "run")
    try:
        publisher = Weights(models[1])
        channel = Channel(FULL, publisher, fleet, WeightVersion(0, 0, "run"))
        channel.open()
        channel.publish(1)
        assert fleet.join() == [], "nobody is listed yet"
        listed.write_text(f"{server.spec.endpoint.url}/\n")
        it_joins_when_nobody_waits_any_more(fleet)
        listed.write_text(f"# of other people\nhttp://127.0.0.1:9\n{server.spec.endpoint.url}/\n")
        [late] = fleet.join()
        assert late.name == "engine 1" and "http://127.0.0.1:9 does not join: engine 2 (rollout.join)" in caplog.text
        assert [(turn.engine, turn.state) for turn in fleet.tend()] == [("engine 1", State.HEALTHY)]
        for label, path in (("run/0/1", models[1]), ("run/0/2", models[0])):
            if label == "run/0/2":
                publisher.path = path
                channel.publish(2)
            for endpoint in fleet.endpoints():
                assert distance(path, ask_one(endpoint, label), PROMPT) < 1e-5, f"{endpoint.name} at {label}"
        assert [url.url for url in fleet.endpoints()][1] == server.spec.endpoint.url and fleet.engines() == ["engine 0", "engine 1"]
    finally:
        fleet.stop()
    assert server.alive, "it is the user's"


def it_joins_when_nobody_waits_any_more(fleet: EngineFleet) -> None:
    """Its agent tells of an engine that the driver has not listed: who routes requests does not hear of it."""
    timeout_s, fleet._cfg.sync.timeout_s = fleet._cfg.sync.timeout_s, 0.01  # the driver's alone
    assert fleet.join() == []
    fleet._cfg.sync.timeout_s = timeout_s
    turns, until = [], time.monotonic() + 60
    while "engine 1" not in fleet._last and time.monotonic() < until:
        turns += fleet.tend()
        time.sleep(0.1)
    assert {turn.engine for turn in turns} == {"engine 0"} and len(fleet.endpoints()) == 1


@pytest.mark.slow
def test_an_agent_that_is_lost_amid_a_publication_is_lost_to_the_run(
    placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is ProcessLost, which a run survives, and this channel publishes nothing any more."""
    fleet = EngineFleet.start(servers.recipe(models[0]), placement, tmp_path, "run")
    perform = EngineFleet.perform

    def struck(fleet: EngineFleet, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        if actions[0].do is Do.COMMIT:
            ray.kill(fleet._agents[0])
        return perform(fleet, actions, label, timeout_s)

    try:
        channel = Channel(FULL, Weights(models[1]), fleet, WeightVersion(0, 0, "run"))
        channel.open()
        channel.publish(0)
        monkeypatch.setattr(EngineFleet, "perform", struck)
        with pytest.raises(ProcessLost, match="waiting for engine 0 to commit weights run/0/1: a process died or was lost"):
            channel.publish(1)
        with pytest.raises(NotProven, match="run/0/1 was interrupted; start the run again"):
            channel.publish(1)
    finally:
        fleet.stop()


@pytest.mark.parametrize(
    ("knobs", "model", "message"),
    [
        ({}, "/no/such/model", "model.path=/no/such/model: no such directory on .*, where engines run"),
        ({}, "/tmp", "model.path=/tmp: no config.json there"),
        ({"engines": 2, "tensor_parallel": 2}, None, "rollout.engines=2 of rollout.tensor_parallel=2 devices do not fit the 2 devices"),
        ({"sglang": {"max_totl_tokens": 1}}, None, "rollout.sglang.max_totl_tokens: SGLang 0.5.23 has no such server argument"),
        ({"engine_python": "/no/python"}, None, "rollout.engine_python=/no/python: cannot be run"),
    ],
)
def test_what_cannot_be_started(
    knobs: dict[str, Any], model: str | None, message: str, placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path
) -> None:
    cfg = servers.recipe(Path(model) if model else models[0], **knobs)
    with pytest.raises(ValueError, match=message):
        EngineFleet.start(cfg, placement, tmp_path, "run")
    assert not list(tmp_path.rglob("*.log"))


@pytest.mark.slow
def test_a_server_that_ends_is_noticed_at_once_with_its_log(placement: RolePlacement, models: tuple[Path, Path], tmp_path: Path) -> None:
    """A model that SGLang does not know. Where a run starts again, it is a loss like others."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "unheard_of", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}'
    )
    with pytest.raises(
        EngineLost, match=r"engine 0 ended with exit code \d+ while it started; the end of .*engine_0.log(.|\n)*unheard_of"
    ) as ended:
        EngineFleet.start(servers.recipe(tmp_path), placement, tmp_path, "run")
    assert str(ended.value).count("the end of") == 1
    assert not servers.processes_of(f"--model-path={tmp_path}\0")
