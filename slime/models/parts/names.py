"""HF names of one layer."""

from dataclasses import dataclass

from slime.layout import HFTensor


@dataclass(frozen=True)
class Names:
    """`names("self_attn.q_proj.weight", rows, columns)` is that tensor of the layer whose names begin with `prefix`."""

    prefix: str

    def __call__(self, name: str, *shape: int) -> HFTensor:
        return HFTensor(f"{self.prefix}{name}", shape)
