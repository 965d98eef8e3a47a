"""Ranks that work together, as the driver holds them: started side by side, called all at once, ended all at once."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ray

from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB, ClusterLost, ProcessLost
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.exits import GateStopped, GraceOver, SavedRunAgain
from slime.trainer.rank import THREADS, Rank
from slime.trainer.saving import lost_rank, settle
from slime.trainer.where import where

log = logging.getLogger(__name__)

START_KNOB = "cluster.start_timeout_s"


def launch(cfg: SlimeConfig, placement: RolePlacement, roles: tuple[str, ...]) -> list[Any]:
    """Start one rank on every device of the placement; Ray handles of `Rank`."""
    threads, world = max(1, int(placement.cpus)), len(placement.bundles)
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    actor = ray.remote(concurrency_groups=THREADS)(Rank)  # type: ignore[call-overload]
    return [
        actor.options(**placement.options(rank, env)).remote(cfg, roles, rank, world, placement.device, threads) for rank in range(world)
    ]


class Ranks:
    """All ranks of one role.

    Methods raise what a rank raised, TimeoutError when cluster.step_timeout_s has passed, ProcessLost naming a rank whose process died. A
    failure that leaves ranks waiting for one another ends them all, and where each of them waited is told.
    """

    NAME: ClassVar[str]

    def __init__(self, cfg: SlimeConfig, ranks: list[Any]) -> None:
        """Takes over Ray handles of `Rank`; see `launch`."""
        self.cfg = cfg
        self.ranks = ranks  # the first is the leader
        self.names = [f"{self.NAME} rank {rank}" for rank in range(len(ranks))]

    def begin_build(self) -> "list[ray.ObjectRef]":
        """Let the ranks meet and build what they hold; to be given to `built`."""
        timeout_s = self.cfg.cluster.start_timeout_s
        address, port = deadline.get(self.ranks[0].open_store.remote(), timeout_s, f"{self.names[0]} to start", START_KNOB)
        return [rank.build.remote(address, port) for rank in self.ranks]

    def built(self, refs: "list[ray.ObjectRef]") -> None:
        """Wait for what `begin_build` began. Raises ValueError for a model, algorithm or option that cannot be used, TimeoutError after
        cluster.start_timeout_s."""
        self.together(refs, f"the {self.NAME} ranks to build the model", self.cfg.cluster.start_timeout_s, START_KNOB)

    def stop(self) -> None:
        """End every rank at once. May be called again."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks.clear()

    def together(
        self,
        refs: "list[ray.ObjectRef]",
        what: str,
        timeout_s: float | None = None,
        knob: str = STEP_KNOB,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Results of a call on several ranks. After a failure, ranks that go on waiting for one another are ended; where they were
        stands in a file of the run's logs."""
        beside: list[Exception] = []

        def look() -> None:
            try:
                meanwhile()
            except Exception as error:
                beside.append(error)
                raise

        try:
            return deadline.get(refs, timeout_s or self.cfg.cluster.step_timeout_s, what, knob, look)
        except (SavedRunAgain, GraceOver, ClusterLost):
            raise  # of the run, which is about to end; the ranks do as they were asked
        except Exception as error:
            if error in beside:
                raise
            self._after(error, refs, what)
            raise

    def _after(self, error: Exception, refs: "list[ray.ObjectRef]", what: str) -> None:
        """A call has failed on a rank. Raises what says more than `error`."""
        seen = self._where(what) if isinstance(error, TimeoutError) else ""
        waiting, dead = settle(refs)
        if waiting or dead:
            seen = seen or self._where(what)
            log.error("%d of %d %s ranks do not answer; ending them all. %s", len(waiting) + len(dead), len(refs), self.NAME, seen)
            self.stop()
        if dead and not isinstance(error, ProcessLost):
            raise lost_rank(what, self.names[dead[0]]) from error
        if waiting and isinstance(error, RuntimeError) and not isinstance(error, ProcessLost | GateStopped):  # a collective broke
            raise ProcessLost(f"waiting for {what}: {error}; {self.names[waiting[0]]} does not answer. {seen}") from error
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{error}: {seen}") from error

    def _where(self, what: str) -> str:
        return where(self.ranks, what, Path(self.cfg.run.dir).resolve() / str(self.cfg.run.name) / "logs")
