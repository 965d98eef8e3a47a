"""Addresses that cannot be joined: refused before Ray is asked, quickly and by name."""

import socket
import time
from pathlib import Path

import pytest

from slime.cluster.session import connect
from slime.config import SlimeConfig
from slime.config.exits import ConfigError, PreflightError


def refused(address: str, tmp_path: Path) -> str:
    cfg = SlimeConfig()
    cfg.cluster.address = address
    with pytest.raises((ConfigError, PreflightError)) as raised:
        connect(cfg, tmp_path)
    return str(raised.value)


def test_client_address(tmp_path: Path) -> None:
    assert refused("ray://head:10001", tmp_path) == (
        "cluster.address=ray://head:10001: slime runs inside the cluster; give the head's host:port, or submit it as a Ray job"
    )


def test_address_without_port(tmp_path: Path) -> None:
    assert refused("head", tmp_path) == "cluster.address=head: not host:port; Ray's default port is 6379"


def test_address_where_nothing_answers(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    assert refused(address, tmp_path) == (
        f"cluster.address={address}: nothing answers there ([Errno 111] Connection refused); "
        "start Ray, or unset cluster.address and RAY_ADDRESS to start one here"
    )
    assert time.monotonic() - began < 10


def test_ray_address_of_the_environment_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head")
    with pytest.raises(ConfigError, match=r"^cluster.address=head: not host:port"):
        connect(SlimeConfig(), tmp_path)
