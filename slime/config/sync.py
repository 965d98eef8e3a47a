"""sync: how weights reach the engines."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class SyncConfig:
    mode: str = choice("delta", "full")
    """delta sends what changed and writes it in place; full sends every tensor through stock SGLang's tensor update. Both are proven."""
    codec: str = choice("steps", "exponent")
    """How a delta is coded: steps is fast, exponent a third smaller and slower, for slow links."""
    transport: str = choice("ray", "host", "store")
    """How a delta travels: as Ray objects, in this host's shared memory, or as files of sync.url, which keep the history of weights."""
    snapshot: str = choice("device", "host")
    """Where trainer ranks keep the weights that engines have, 2 bytes a parameter over all replicas: on the device, or in host memory."""
    url: str | None = None
    """With sync.transport=store: a directory or an fsspec URL such as s3://bucket/path; by default weights/ in the run's directory."""
    pause: str = choice("drain", "retract", "in_place")
    """What a sync does to running requests: waits for them; retracts them, to be computed again; or goes on in place with old prefixes."""
    on_mismatch: str = choice("stop", "heal")
    """When an engine fails its proof: stop the run, or load everything into that engine anew and prove it again."""
    bucket_mb: int = number(256, low=1)
    """Weights encoded, gathered or loaded at a time, in MiB of host memory."""
    anchor_every: int = number(25, low=1)
    """With sync.transport=store: versions between two that are kept whole."""
    keep: int = number(50, low=1)
    """With sync.transport=store: versions that stay readable before the newest."""
    key_env: str | None = None
    """Name of the environment variable whose value signs manifests; by default a key is drawn for each start."""
    timeout_s: float = number(300.0, above=0)
    """Deadline for every engine to hold a published version."""
