"""A Ray cluster for one run: joined, or started on this host and ended with the run.

Joined where `cluster.address` or RAY_ADDRESS names one (a Ray job sets RAY_ADDRESS for its driver), else started here. A Ray that we
start names its node by a loopback address, so that engines and ranks bind there; its sockets lie in a short directory below /tmp (a
socket's path has at most 107 bytes), its logs in the run's `logs/ray/`. Its processes end with the driver, however that ends: the kernel
kills them with the thread that called `connect` (call it from the main thread), and a reaper sees to the rest.
"""

import logging
import math
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil
import ray

from slime.cluster import deadline
from slime.cluster.local import Scratch
from slime.config import SlimeConfig
from slime.config.exits import ConfigError, PreflightError
from slime.config.roles import role_needs

log = logging.getLogger(__name__)

PROBE_S = 5.0  # for a TCP connection to a cluster's address
DAEMONS = {"raylet", "gcs_server"}
NODE = "127.0.0.2"  # Ray replaces 127.0.0.1 by the host's outward address


@dataclass
class Cluster:
    """A connected Ray. `device` is what ranks and engines compute on."""

    address: str
    device: Literal["cpu", "cuda"]
    scratch: Scratch | None  # of a Ray that we started
    _daemons: list[psutil.Process] = field(default_factory=list)  # its own processes, which it cannot lose
    _watching: ExitStack = field(default_factory=ExitStack)

    @property
    def local(self) -> bool:
        return self.scratch is not None

    def watch(self) -> None:
        """From here on, every wait notices when a process of the Ray that we started has ended: Ray itself says so late, or never."""
        children = psutil.Process().children(recursive=True) if self.local else []
        self._daemons = [child for child in children if _name(child) in DAEMONS]
        assert not self.local or {_name(child) for child in self._daemons} == DAEMONS, "a Ray that has just started"
        self._watching.enter_context(deadline.watch(self.check))

    def check(self) -> None:
        """Raises deadline.ClusterLost where a process of the Ray that we started has ended."""
        for daemon in self._daemons:
            if not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE:
                raise deadline.ClusterLost(f"Ray's own process {daemon.pid} has ended; its log is in the run's logs/ray")

    def stop(self) -> None:
        """Disconnect; end a Ray that we started, and with it everything that runs in it."""
        self._watching.close()
        ray.shutdown()
        if self.scratch is not None:
            self.scratch.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def connect(cfg: SlimeConfig, run_dir: Path) -> Cluster:
    """Join or start Ray for this run.

    Raises ConfigError for an address that Ray does not join, PreflightError where nothing answers there or a CUDA device is asked for
    and the cluster has none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", message=".*accelerator visible devices.*", category=FutureWarning)
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    scratch = None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with _without_warnings():
        if address:
            _join(address)
        else:
            scratch = Scratch(run_dir / "logs" / "ray")
            try:
                _start(cfg, scratch)
            except BaseException:
                scratch.collect()
                raise
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray installs its own
    ray._private.worker._worker_logs_enabled = False  # Ray's reports of dead workers go to stdout, log_to_driver or not
    cluster = Cluster(ray.get_runtime_context().gcs_address, "cpu", scratch)
    try:
        cluster.device = _device(cfg.cluster.device, ray.cluster_resources().get("GPU", 0))
        cluster.watch()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Processes that are started inside do not get SIGUSR1, which would end them: a scheduler may send its warning to all of a job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # one that came meanwhile arrives now


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _join(address: str) -> None:
    """Join the cluster at `address` (host:port, or auto)."""
    if "://" in address:
        raise ConfigError(f"cluster.address={address}: slime runs inside the cluster; give the head's host:port, or submit it as a Ray job")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"cluster.address={address}: not host:port; Ray's default port is 6379")
        try:
            socket.create_connection((host, int(port)), PROBE_S).close()
        except OSError as error:
            raise PreflightError(
                f"cluster.address={address}: nothing answers there ({error}); "
                "start Ray, or unset cluster.address and RAY_ADDRESS to start one here"
            ) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise PreflightError(f"cluster.address={address}: Ray does not answer as a cluster there ({error})") from error


def _start(cfg: SlimeConfig, scratch: Scratch) -> None:
    """Start Ray on this host with at least the CPUs that the roles ask for."""
    cpus = math.ceil(sum(need.devices * need.cpus for need in role_needs(cfg).values()))
    if cpus > (os.cpu_count() or 1):
        log.warning("ranks and engines ask for %d CPUs and this host has %d: they share them", cpus, os.cpu_count())
    with scratch.marked():
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            num_gpus=0 if cfg.cluster.device == "cpu" else None,
            object_store_memory=cfg.cluster.object_store_mb << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=NODE,
            _temp_dir=str(scratch.path),
        )
    scratch.link()


def _device(asked: str, gpus: float) -> Literal["cpu", "cuda"]:
    if asked == "cuda" and not gpus:
        raise PreflightError(
            "cluster.device=cuda and the cluster has no GPU: set cluster.device=cpu, or join a cluster that has them (cluster.address)"
        )
    return "cuda" if asked != "cpu" and gpus else "cpu"
