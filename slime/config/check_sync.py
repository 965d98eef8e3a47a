"""The weight channel's knobs against one another."""

import os

from slime.config import SlimeConfig
from slime.config.check_inert import changed, setting
from slime.config.exits import ConfigError

ONLY_STORE = ("url", "anchor_every", "keep")
ONLY_DELTA = ("codec", "transport", "snapshot", "key_env", *ONLY_STORE)
KEY_BYTES = 16


def check_sync(cfg: SlimeConfig) -> None:
    """Raise ConfigError for a knob without effect, a key that is not there, and buckets that do not fit."""
    sync = cfg.sync
    for knob in ONLY_DELTA:
        if sync.mode == "full" and changed(sync, knob):
            raise ConfigError(f"{setting(cfg, f'sync.{knob}')} has no effect with sync.mode=full: set sync.mode=delta, or remove it")
    for knob in ONLY_STORE:
        if sync.transport != "store" and changed(sync, knob):
            raise ConfigError(
                f"{setting(cfg, f'sync.{knob}')} has no effect with sync.transport={sync.transport}: set sync.transport=store, or remove it"
            )
    if sync.key_env is not None:
        _key(sync.key_env)
    if cfg.cluster.address is None and sync.bucket_mb > cfg.cluster.object_store_mb:
        raise ConfigError(
            f"sync.bucket_mb={sync.bucket_mb} does not fit into cluster.object_store_mb={cfg.cluster.object_store_mb}: "
            "lower the one or raise the other"
        )


def _key(name: str) -> None:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"sync.key_env={name}: no such environment variable; export it, or unset sync.key_env")
    if len(value.encode()) < KEY_BYTES:
        raise ConfigError(f"sync.key_env={name}: its value has fewer than {KEY_BYTES} bytes; use a longer random one")
