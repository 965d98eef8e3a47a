"""All engines as the driver sees them: host agents started where the placement has devices, and calls to all of them."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.cluster import deadline
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.engine.agent import Assignment, EngineActor
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost
from slime.sync.inserver_client import RankError
from slime.sync.protocol import Adoption, Answer
from slime.sync.publication import Action
from slime.sync.records import ModelSpec

log = logging.getLogger(__name__)

SYNC_KNOB, START_KNOB = "sync.timeout_s", "rollout.start_timeout_s"
GRACE_S = 30.0  # beyond an agent's own deadline, which explains more
STOP_S = 20.0
ASK_S = 60.0


class EngineFleet:
    """A plain object over the host agents; the weight channel's Receivers. Methods return when every engine is done.

    They raise what an agent raised (EngineError, EngineLost, StaleWeights, ValueError), TimeoutError naming the knob, RuntimeError where a
    host agent died.
    """

    def __init__(self, cfg: SlimeConfig, agents: list[Any], endpoints: list[Endpoint]) -> None:
        """Takes over Ray handles of `EngineActor`; see `start`."""
        self._cfg = cfg
        self._agents = agents
        self._endpoints = endpoints
        self._watches = [agent.watch.remote() for agent in agents]
        self._hosts: dict[str, Any] = {}  # engine -> its agent

    @classmethod
    def start(cls, cfg: SlimeConfig, placement: RolePlacement | None, run_dir: Path, run_id: str) -> "EngineFleet":
        """Start rollout.engines servers on the placement's devices, or use rollout.external_urls. All answer when this returns."""
        agents: list[Any] = []
        try:
            if cfg.rollout.external_urls:
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
                agents.append(_agent(cfg, run_dir, run_id, _external_key(cfg), here))
                starting = [agents[0].attach.remote(cfg.rollout.external_urls)]
            else:
                assert placement is not None, "engines need a placement"
                key, starting = secrets.token_hex(32), []
                for bundles, assignments in _by_host(cfg, placement):
                    agents.append(_agent(cfg, run_dir, run_id, key, placement.strategy(bundles[0])))
                    starting.append(agents[-1].start.remote(assignments, placement.device, placement.cpus))
            timeout_s = cfg.rollout.start_timeout_s + GRACE_S
            started = deadline.get(starting, timeout_s, "the engines to start", START_KNOB)
        except BaseException:
            _stop(agents)
            raise
        return cls(cfg, agents, [endpoint for endpoints in started for endpoint in endpoints])

    def endpoints(self) -> list[Endpoint]:
        return list(self._endpoints)

    def join(self) -> list[Endpoint]:
        """Take in servers that rollout.join lists and that are not known yet, each at the committed version, proven. One that cannot be
        taken in is warned of, and tried again at the next call."""
        joined: list[Endpoint] = []
        for url in _listed(self._cfg.rollout.join):
            if url in {endpoint.url for endpoint in self._endpoints}:
                continue
            name, what = f"engine {len(self._endpoints)}", f"{url} to join"
            try:
                call = self._agents[0].join.remote(url, _external_key(self._cfg), name)
                joined.append(deadline.get(call, self._cfg.sync.timeout_s, what, SYNC_KNOB))
            except (EngineError, PreflightError, RankError, TimeoutError, ValueError) as error:
                log.warning("%s does not join: %s", url, error)
                continue
            self._endpoints.append(joined[-1])
        return joined

    def check(self) -> None:
        """Raises EngineLost naming a server that ended, with the end of its log."""
        ended, _ = ray.wait(self._watches, timeout=0)
        if ended:
            raise EngineLost(deadline.get(ended[0], 1.0, "a host agent"))

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        """Every engine is proven to hold the model directory's weights, and known tensor by tensor."""
        what = "every engine to prove its first weights"
        for warnings in self._all(lambda agent: agent.adopt.remote(spec.to_json(), run), timeout_s, what):
            for warning in warnings:
                log.warning("%s", warning)

    def engines(self) -> list[str]:
        """Names of the engines that take part in updates."""
        live = self._all(lambda agent: agent.live.remote(), ASK_S, "the host agents to name their engines")
        self._hosts = {engine: agent for agent, engines in zip(self._agents, live, strict=True) for engine in engines}
        return list(self._hosts)

    def offer(self, manifest: str, parts: "Sequence[ray.ObjectRef]", timeout_s: float) -> None:
        """A delta, to every host."""
        what = "every host to decode new weights"
        self._all(lambda agent: agent.offer.remote(manifest, *parts), timeout_s, what)

    def offer_bucket(self, bucket: "ray.ObjectRef", first: bool, timeout_s: float) -> int:
        """A part of a whole version, the `first` or a further one, to every host; returns its bytes, once for each host."""
        return sum(self._all(lambda agent: agent.offer_bucket.remote(bucket, first), timeout_s, "every host to take weights"))

    def offer_whole(self, label: str, timeout_s: float) -> None:
        """The buckets since the last offer are the version `label`."""
        self._all(lambda agent: agent.offer_whole.remote(label), timeout_s, f"every host to take weights {label}")

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        """Do these side by side. A host that does not answer in time, or is gone, has failed in all of its actions."""
        by_host: dict[Any, list[Action]] = {}
        for action in actions:
            by_host.setdefault(self._hosts[action.engine], []).append(action)
        refs = {agent: agent.perform.remote(mine, label) for agent, mine in by_host.items()}
        answers: list[Answer] = []
        until = time.monotonic() + timeout_s
        for agent, mine in by_host.items():
            what = f"{', '.join(a.engine for a in mine)} to {mine[0].do} weights {label}"
            try:
                answers += deadline.get(refs[agent], max(0.1, until - time.monotonic()), what, SYNC_KNOB)
            except (TimeoutError, RuntimeError) as error:
                answers += [Answer(action, failed=str(error)) for action in mine]
        return answers

    def advance(self, label: str, timeout_s: float) -> None:
        """Host copies become the version."""
        for warning in filter(None, self._all(lambda agent: agent.advance.remote(label), timeout_s, f"every host to hold weights {label}")):
            log.warning("%s", warning)

    def write_anchor(self, manifest: str) -> None:
        """One host begins to write the version that it holds whole."""
        deadline.get(self._agents[0].write_anchor.remote(manifest), ASK_S, "a host agent to begin with an anchor")

    def relabel(self, label: str, timeout_s: float) -> None:
        """Call the weights that the engines loaded themselves `label`."""
        self._all(lambda agent: agent.relabel.remote(label), timeout_s, f"every engine to hold weights {label}")

    def restart_dead(self) -> list[str]:
        """Start servers that ended anew, with the committed weights. Returns their names."""
        timeout_s = self._cfg.rollout.start_timeout_s + self._cfg.sync.timeout_s
        what = "ended engines to start again"
        names = deadline.get([a.restart_dead.remote() for a in self._agents], timeout_s, what, START_KNOB)
        self._watches = [agent.watch.remote() for agent in self._agents]
        return [name for of_agent in names for name in of_agent]

    def stop(self) -> None:
        """End the servers that were started here, and the agents. May be called again."""
        _stop(self._agents)
        self._agents = []

    def _all(self, call: "Callable[[Any], ray.ObjectRef]", timeout_s: float, what: str) -> list[Any]:
        return deadline.get([call(agent) for agent in self._agents], timeout_s, what, SYNC_KNOB)


def _external_key(cfg: SlimeConfig) -> str:
    """Of the user's servers."""
    name = cfg.rollout.external_key_env
    return os.environ[name] if name else ""


def _listed(path: str | None) -> list[str]:
    """The URLs in a file, one a line; none where there is no file yet."""
    if path is None or not Path(path).exists():
        return []
    return [line.strip().rstrip("/") for line in Path(path).read_text().splitlines() if line.strip() and not line.startswith("#")]


def _agent(cfg: SlimeConfig, run_dir: Path, run_id: str, key: str, where: Any) -> Any:
    """An agent takes no CPU of its bundle: those are its servers'."""
    return ray.remote(EngineActor).options(num_cpus=0, scheduling_strategy=where).remote(cfg, str(run_dir.resolve()), run_id, key)


def _by_host(cfg: SlimeConfig, placement: RolePlacement) -> list[tuple[list[int], list[Assignment]]]:
    """Servers by host: positions of the host's devices in the placement, and its servers. A server's devices are on one host."""
    nodes: dict[str, list[int]] = {}
    node_of = ray.util.placement_group_table(placement.group)["bundles_to_node_id"]
    for position, bundle in enumerate(placement.bundles):
        nodes.setdefault(node_of[bundle], []).append(position)
    size, wanted, hosts, index = cfg.rollout.tensor_parallel, cfg.rollout.engines, [], 0
    for positions in nodes.values():
        gpus = _gpus(placement, positions)
        count = min(len(positions) // size, wanted - index)
        if count:
            mine = [Assignment(index + i, tuple(gpus[i * size : (i + 1) * size])) for i in range(count)]
            hosts.append((positions, mine))
            index += count
    if index < wanted:
        raise ValueError(
            f"rollout.engines={wanted} of rollout.tensor_parallel={size} devices do not fit the {len(placement.bundles)} devices of "
            f"cluster.roles.rollout on {len(nodes)} hosts, as a server's devices are on one host; lower rollout.engines or add devices"
        )
    return hosts


def _gpus(placement: RolePlacement, positions: list[int]) -> list[int]:
    """GPU numbers on their host of these devices; none on a CPU."""
    if placement.device == "cpu":
        return []
    ask = ray.remote(ray.get_gpu_ids)
    refs = [ask.options(num_cpus=0, num_gpus=1, scheduling_strategy=placement.strategy(p)).remote() for p in positions]
    return [int(ids[0]) for ids in deadline.get(refs, 60.0, "the rollout devices to name their GPUs", "cluster.start_timeout_s")]


def _stop(agents: list[Any]) -> None:
    """Let agents end their servers, then end them. An agent that does not answer takes its servers with it."""
    if agents:
        ray.wait([agent.stop.remote() for agent in agents], num_returns=len(agents), timeout=STOP_S)
    for agent in agents:
        ray.kill(agent)
