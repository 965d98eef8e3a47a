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
from slime.cluster.gpus import numbers_of
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.engine.agent import Assignment, EngineActor
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost
from slime.engine.health import State, Trouble, Turn
from slime.sync.inserver_client import RankError
from slime.sync.protocol import Adoption, Answer
from slime.sync.publication import Action
from slime.sync.records import ModelSpec

log = logging.getLogger(__name__)

SYNC_KNOB, START_KNOB = "sync.timeout_s", "rollout.start_timeout_s"
MOVES = 3  # times sync.timeout_s: longer than an agent takes to let its engines leave their devices, or come back
GRACE_S = 30.0  # beyond an agent's own deadline, which explains more
STOP_S = 20.0
ASK_S = 60.0
NEWS_S = 5.0  # a host agent with nothing to tell answers after so long
POLL_S = 0.2


class EngineFleet:
    """A plain object over the host agents; the weight channel's Receivers. Methods return when every engine is done.

    They raise what an agent raised (EngineError, EngineLost, StaleWeights, ValueError), TimeoutError naming the knob, ProcessLost where a
    host agent died.
    """

    def __init__(self, cfg: SlimeConfig, agents: list[Any], endpoints: list[list[Endpoint]]) -> None:
        """Takes over Ray handles of `EngineActor`, with the engines of each; see `start`."""
        self._cfg = cfg
        self._agents = agents
        self._endpoints = [endpoint for of_agent in endpoints for endpoint in of_agent]
        self._hosts = {e.name: agent for agent, of_agent in zip(agents, endpoints, strict=True) for e in of_agent}  # engine -> its agent
        self._heard = [0] * len(agents)  # number of the next turn of each
        self._asked: list[ray.ObjectRef | None] = [None] * len(agents)
        self._untold: list[Turn] = []
        self._late: dict[str, str] = {}  # url -> name of servers that were asked to join in vain, and may have joined since
        self._last: dict[str, Turn] = {}  # of every engine
        self._advancing: list[ray.ObjectRef] = []  # host copies that become a version, until somebody asks how that went

    @classmethod
    def start(cls, cfg: SlimeConfig, placement: RolePlacement | None, run_dir: Path, run_id: str, called: str = "engine") -> "EngineFleet":
        """Start rollout.engines servers on the placement's devices, or use rollout.external_urls. All answer when this returns. They are
        `called` engine 0, engine 1, ..."""
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
                    agents.append(_agent(cfg, run_dir, run_id, key, placement.strategy(bundles[0]), called))
                    starting.append(agents[-1].start.remote(assignments, placement.device, placement.cpus))
            timeout_s = cfg.rollout.start_timeout_s + GRACE_S
            started = deadline.get(starting, timeout_s, "the engines to start", START_KNOB)
        except BaseException:
            _stop(agents)
            raise
        return cls(cfg, agents, started)

    def endpoints(self) -> list[Endpoint]:
        return list(self._endpoints)

    def join(self) -> list[Endpoint]:
        """Take in servers that rollout.join lists and that are not known yet, each at the committed version, proven. One that cannot be
        taken in is warned of, and tried again at the next call."""
        joined: list[Endpoint] = []
        for url in _listed(self._cfg.rollout.join):
            if url in {endpoint.url for endpoint in self._endpoints}:
                continue
            name, what = self._late.get(url, f"engine {len(self._endpoints) + len(self._late)}"), f"{url} to join"
            try:
                call = self._agents[0].join.remote(url, _external_key(self._cfg), name)
                joined.append(deadline.get(call, self._cfg.sync.timeout_s, what, SYNC_KNOB))
            except (EngineError, PreflightError, RankError, TimeoutError, ValueError) as error:
                log.warning("%s does not join: %s", url, error)
                if isinstance(error, TimeoutError):  # its agent may still take it in, by this name, which is nobody else's
                    self._late[url] = name
                continue
            self._late.pop(url, None)
            self._endpoints.append(joined[-1])
            self._hosts[name] = self._agents[0]
        return joined

    # --- health -----------------------------------------------------------------------------------------------------

    def tend(self) -> list[Turn]:
        """What became of engines since the last call, in order; does not wait. To be called often while anything is waited for. Turns of a
        server whose agent took it in after `join` had given up wait until it is listed.

        Raises EngineLost where every engine is retired, ProcessLost where a host agent's process is gone.
        """
        for number, agent in enumerate(self._agents):
            asked = self._asked[number] or agent.health.remote(self._heard[number], NEWS_S)
            self._asked[number] = asked
            if ray.wait([asked], timeout=0)[0]:
                self._asked[number] = None
                self._hear(number, asked)
        self._check()
        told = [turn for turn in self._untold if turn.engine in self._hosts]
        self._untold = [turn for turn in self._untold if turn.engine not in self._hosts]
        return told

    def report(self, troubles: Sequence[Trouble]) -> None:
        """Let the host agents know what the client saw of their engines."""
        by_host: dict[Any, list[Trouble]] = {}
        for trouble in troubles:
            log.warning("%s (%s)", trouble.reason, trouble.kind)
            by_host.setdefault(self._hosts[trouble.engine], []).append(trouble)
        for agent, mine in by_host.items():
            agent.report.remote(mine)

    def wait_for_engines(self, timeout_s: float) -> None:
        """Returns once an engine is healthy; the next `tend` has the turns. Raises what `tend` raises, and TimeoutError saying in which
        state each engine is."""
        until = time.monotonic() + timeout_s
        while True:
            for number, agent in enumerate(self._agents):
                self._hear(number, agent.health.remote(self._heard[number], 0.0))
            self._check()
            if any(turn.state is State.HEALTHY for turn in self._now()):
                return
            if time.monotonic() > until:
                raise TimeoutError(
                    f"waiting for an engine to come back: none after {timeout_s:g} s (rollout.start_timeout_s + sync.timeout_s): "
                    f"{self._states()}"
                )
            time.sleep(POLL_S)

    def _hear(self, number: int, answer: "ray.ObjectRef") -> None:
        """Take the turns that a host agent tells, those that are new."""
        next_turn, turns = deadline.get(answer, ASK_S, f"the host agent of {self._names(number)}")
        new = min(len(turns), max(0, next_turn - self._heard[number]))
        for turn in turns[len(turns) - new :]:
            if turn.engine in self._last or turn.state is not State.HEALTHY:  # that it is well from the beginning is no news
                _tell(turn)
            self._last[turn.engine] = turn
            self._untold.append(turn)
        self._heard[number] = max(self._heard[number], next_turn)

    def _check(self) -> None:
        retired = [turn for turn in self._now() if turn.state is State.RETIRED]
        if len(retired) == len(self._endpoints):
            raise EngineLost("; ".join(f"{turn.engine} is given up: {turn.reason}{_log_of(turn)}" for turn in retired))

    def _now(self) -> list[Turn]:
        """The last turn of every engine that is listed and has had one."""
        return [turn for name, turn in self._last.items() if name in self._hosts]

    def _states(self) -> str:
        return "; ".join(f"{turn.engine} is {turn.state}: {turn.reason}" for turn in self._now())

    def _names(self, number: int) -> str:
        return ", ".join(name for name, agent in self._hosts.items() if agent is self._agents[number])

    # --- memory: cluster.tenancy.Tenant -----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Every engine gives up the memory of its devices, or is killed. Raises what `tend` raises."""
        timeout_s, what = self._cfg.sync.timeout_s, "every engine to give up its memory"
        self._all(lambda agent: agent.leave.remote(timeout_s), MOVES * timeout_s + 2 * GRACE_S, what)

    def enter(self) -> None:
        """Engines take their memory back and prove the committed weights. One is healthy when this returns; others may still be started
        anew. Raises what `wait_for_engines` raises."""
        timeout_s, what = self._cfg.sync.timeout_s, "every engine to take its memory back"
        self._advanced(timeout_s)
        self._all(lambda agent: agent.enter.remote(timeout_s), MOVES * timeout_s + 2 * GRACE_S, what)
        self.wait_for_engines(self._cfg.rollout.start_timeout_s + timeout_s)

    # --- weights: sync.protocol.Receivers -----------------------------------------------------------------------------

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        """Every engine is proven to hold the model directory's weights, and known tensor by tensor."""
        what = "every engine to prove its first weights"
        for warnings in self._all(lambda agent: agent.adopt.remote(spec.to_json(), run), timeout_s, what):
            for warning in warnings:
                log.warning("%s", warning)

    def engines(self) -> list[str]:
        """Names of the engines that take part in updates."""
        live = self._all(lambda agent: agent.live.remote(), ASK_S, "the host agents to name their engines")
        return [engine for of_agent in live for engine in of_agent]

    def offer(self, manifest: str, parts: "Sequence[ray.ObjectRef]", timeout_s: float) -> None:
        """A delta, to every host."""
        self._advanced(timeout_s)
        what = "every host to decode new weights"
        self._all(lambda agent: agent.offer.remote(manifest, *parts), timeout_s, what)

    def offer_bucket(self, bucket: "ray.ObjectRef", first: bool, timeout_s: float) -> int:
        """A part of a whole version, the `first` or a further one, to every host; returns its bytes, once for each host."""
        return sum(self._all(lambda agent: agent.offer_bucket.remote(bucket, first), timeout_s, "every host to take weights"))

    def offer_whole(self, label: str, timeout_s: float) -> None:
        """The buckets since the last offer are the version `label`."""
        self._advanced(timeout_s)
        self._all(lambda agent: agent.offer_whole.remote(label), timeout_s, f"every host to take weights {label}")

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        """Do these side by side. A host that does not answer in time has failed in all of its actions; ProcessLost where one is gone."""
        by_host: dict[Any, list[Action]] = {}
        for action in actions:
            by_host.setdefault(self._hosts[action.engine], []).append(action)
        refs = {agent: agent.perform.remote(mine, label, timeout_s) for agent, mine in by_host.items()}
        answers: list[Answer] = []
        until = time.monotonic() + timeout_s + GRACE_S
        for agent, mine in by_host.items():
            what = f"{', '.join(a.engine for a in mine)} to {mine[0].do} weights {label}"
            try:
                answers += deadline.get(refs[agent], max(0.1, until - time.monotonic()), what, SYNC_KNOB)
            except deadline.ProcessLost:
                raise
            except (TimeoutError, RuntimeError) as error:
                answers += [Answer(action, failed=str(error)) for action in mine]
        return answers

    def advance(self, label: str, timeout_s: float) -> None:
        """Host copies begin to become the version: engines go on meanwhile. What goes wrong there is raised by the next offer."""
        self._advanced(timeout_s)
        self._advancing = [agent.advance.remote(label) for agent in self._agents]

    def _advanced(self, timeout_s: float) -> None:
        """Host copies hold the version that they were to become last."""
        begun, self._advancing = self._advancing, []
        for warning in filter(None, deadline.get(begun, timeout_s, "every host to hold the last weights", SYNC_KNOB)):
            log.warning("%s", warning)

    def give_up(self, label: str, timeout_s: float) -> None:
        """The version that was offered is not published."""
        self._all(lambda agent: agent.give_up.remote(label), timeout_s, f"every host to let go of weights {label}")

    def write_anchor(self, manifest: str) -> None:
        """One host begins to write the version that it holds whole."""
        deadline.get(
            self._agents[0].write_anchor.remote(manifest), self._cfg.sync.timeout_s, "a host agent to begin with an anchor", SYNC_KNOB
        )

    def relabel(self, label: str, timeout_s: float) -> None:
        """Call the weights that the engines loaded themselves `label`."""
        self._all(lambda agent: agent.relabel.remote(label), timeout_s, f"every engine to hold weights {label}")

    def stop(self) -> None:
        """End the servers that were started here, and the agents. May be called again."""
        _stop(self._agents)
        self._agents = []

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _all(self, call: "Callable[[Any], ray.ObjectRef]", timeout_s: float, what: str) -> list[Any]:
        return deadline.get([call(agent) for agent in self._agents], timeout_s, what, SYNC_KNOB)


def _tell(turn: Turn) -> None:
    """Log what became of an engine."""
    level = logging.WARNING if turn.state in (State.SUSPECT, State.DEAD, State.RETIRED) else logging.INFO
    log.log(level, "%s is %s: %s%s", turn.engine, turn.state, turn.reason, _log_of(turn))


def _log_of(turn: Turn) -> str:
    return f"; the end of its log:\n{turn.tail}" if turn.tail else ""


def _external_key(cfg: SlimeConfig) -> str:
    """Of the user's servers."""
    name = cfg.rollout.external_key_env
    return os.environ[name] if name else ""


def _listed(path: str | None) -> list[str]:
    """The URLs in a file, one a line; none where there is no file yet."""
    if path is None or not Path(path).exists():
        return []
    return [line.strip().rstrip("/") for line in Path(path).read_text().splitlines() if line.strip() and not line.startswith("#")]


def _agent(cfg: SlimeConfig, run_dir: Path, run_id: str, key: str, where: Any, called: str = "engine") -> Any:
    """An agent takes no CPU of its bundle: those are its servers'."""
    actor = ray.remote(EngineActor).options(num_cpus=0, scheduling_strategy=where)
    return actor.remote(cfg, str(run_dir.resolve()), run_id, key, called)


def _by_host(cfg: SlimeConfig, placement: RolePlacement) -> list[tuple[list[int], list[Assignment]]]:
    """Servers by host: positions of the host's devices in the placement, and its servers. A server's devices are on one host."""
    nodes: dict[str, list[int]] = {}
    node_of = ray.util.placement_group_table(placement.group)["bundles_to_node_id"]
    for position, bundle in enumerate(placement.bundles):
        nodes.setdefault(node_of[bundle], []).append(position)
    size, wanted, hosts, index = cfg.rollout.tensor_parallel, cfg.rollout.engines, [], 0
    for positions in nodes.values():
        gpus = numbers_of(placement, positions)
        count = min(len(positions) // size, wanted - index)
        if count:
            mine = [Assignment(index + i, tuple(gpus[i * size : (i + 1) * size])) for i in range(count)]
            hosts.append((positions, mine))
            index += count
    if index < wanted:
        raise ValueError(
            f"rollout.engines={wanted} of rollout.tensor_parallel={size} devices do not fit the {len(placement.bundles)} devices of "
            f"cluster.roles.{placement.role} on {len(nodes)} hosts, as a server's devices are on one host; lower rollout.engines or add "
            "devices"
        )
    return hosts


def _stop(agents: list[Any]) -> None:
    """Let agents end their servers, then end them. An agent that does not answer takes its servers with it."""
    if agents:
        ray.wait([agent.stop.remote() for agent in agents], num_returns=len(agents), timeout=STOP_S)
    for agent in agents:
        ray.kill(agent)
