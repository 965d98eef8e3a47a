"""Where an engine answers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Endpoint:
    """One SGLang server. `key` is both its API key and its admin key, `sglang` its version."""

    url: str  # http://host:port
    key: str = field(repr=False)
    name: str = "engine"  # in messages and traces: engine 0, engine 1, ...
    sglang: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}
