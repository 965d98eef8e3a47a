"""Rotary position embedding: from config.json's several spellings to one record."""

import math
from dataclasses import dataclass
from typing import Any

from slime.models.config_json import ConfigJson


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (kaiokendev 2023; Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1's model card and code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int  # positions that the model was first trained on


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): by parts, ramped between the frequencies that turn `beta_fast` and `beta_slow` times."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the ramp's ends rounded outwards to whole frequencies


@dataclass(frozen=True)
class Rope:
    """The rotation of query and key heads. Frequency i of `dim / 2` is theta^(-2i/dim), changed by `scaling`."""

    dim: int  # channels of a head that rotate, the first ones
    theta: float
    interleaved: bool  # pairs are channels (2i, 2i + 1); else (i, i + dim/2)
    scaling: Linear | Llama3 | Yarn | None
    attention_factor: float  # what cosines and sines are multiplied by
    mscale_all_dim: float  # DeepSeek's: 0, or the softmax scale is multiplied by mscale(factor, mscale_all_dim)^2


@dataclass(frozen=True)
class RopeForm:
    """What a family's code fixes about its rotary embedding."""

    interleaved: bool = False
    partial: float = 1.0  # share of a head that rotates, where config.json names none; 1: it cannot name one
    theta: float = 10000.0  # where config.json names none
    nests_mscale: bool = False  # reads mscale_all_dim as DeepSeek does


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature of attention, equation 22 of the paper with DeepSeek's weight."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(config: ConfigJson, head_dim: int, form: RopeForm) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and `partial_rotary_factor` (before). Raises ValueError for
    a scaling that is not known, and for a parameter that a scaling does not have."""
    field, rope = _spelled(config)
    reader = _Reader(config, field, rope)
    theta = reader.number("rope_theta", form.theta)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    partial = reader.number("partial_rotary_factor", form.partial)
    scaling: Linear | Llama3 | Yarn | None = None
    factor, weight = 1.0, 0.0
    if kind == "linear":
        scaling = Linear(reader.number("factor"))
    elif kind == "llama3":
        scaling = Llama3(
            reader.number("factor"), reader.number("low_freq_factor"), reader.number("high_freq_factor"), reader.original_length()
        )
    elif kind == "yarn":
        scaling, factor, weight = reader.yarn(form.nests_mscale)
    elif kind != "default":
        raise config.error(field, f"rotary scaling of type {kind!r} is not mapped (default, linear, llama3 and yarn are)")
    if rope:
        raise config.error(field, f"unknown rotary parameter(s) {', '.join(sorted(rope))} for type {kind!r}")
    dim = int(head_dim * partial)
    if form.partial == 1 and partial != 1:  # engines and transformers do not agree on what it means
        raise config.error(field, f"partial_rotary_factor={partial:g}: heads of this family rotate whole")
    if partial > 1 or dim < 2 or dim % 2:
        raise config.error(field, f"partial_rotary_factor={partial:g} of head size {head_dim}: an even number of channels has to rotate")
    return Rope(dim, theta, form.interleaved, scaling, factor, weight)


def rope_field(config: ConfigJson) -> str:
    """The field that a model's rotary parameters are in."""
    return "rope_parameters" if config.raw("rope_parameters") is not None else "rope_scaling"


class _Reader:
    """Takes parameters out of a rotary dict, so that what is left is unknown."""

    def __init__(self, config: ConfigJson, field: str, rope: dict[str, Any]) -> None:
        self.config, self.field, self.rope = config, field, rope

    def number(self, name: str, default: float | None = None) -> float:
        value = self.rope.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.config.error(self.field, f"{name}={value!r}: a positive number is needed")
        return value

    def weight(self, name: str) -> float:
        """A number that may be 0, which is what its absence means."""
        if self.rope.get(name) in (None, 0):
            self.rope.pop(name, None)
            return 0.0
        return self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.rope.pop(name, default)
        if not isinstance(value, bool):
            raise self.config.error(self.field, f"{name}={value!r}: true or false is needed")
        return value

    def original_length(self) -> int:
        """Where the scaling names none it is max_position_embeddings, as in transformers."""
        name, longest = "original_max_position_embeddings", self.config.integer("max_position_embeddings")
        outer = self.config.integer(name, longest) if self.config.raw(name) is not None else None
        inner = self.number(name, longest)
        if int(inner) != inner:
            raise self.config.error(self.field, f"{name}={inner!r}: a positive whole number is needed")
        return outer or int(inner)

    def yarn(self, nests_mscale: bool) -> tuple[Yarn, float, float]:
        """The scaling, the attention factor, and the weight of the softmax scale's own factor."""
        original = self.original_length()
        factor = self.number("factor", self.config.integer("max_position_embeddings") / original)
        weight, weight_all = self.weight("mscale"), self.weight("mscale_all_dim")
        scaling = Yarn(factor, original, self.number("beta_fast", 32.0), self.number("beta_slow", 1.0), self.flag("truncate", True))
        usual = mscale(factor, weight) / mscale(factor, weight_all) if weight and weight_all else mscale(factor)
        return scaling, float(self.number("attention_factor", usual)), float(weight_all) if nests_mscale else 0.0


def _spelled(config: ConfigJson) -> tuple[str, dict[str, Any]]:
    """The field to name in errors, and its parameters with those that stand outside it among them."""
    parameters, scaling = config.raw("rope_parameters"), config.raw("rope_scaling")
    if parameters is not None and scaling is not None and parameters != scaling:
        raise config.error("rope_scaling", "contradicts rope_parameters; keep one of them")
    field = rope_field(config)
    rope = config.values.get(field) or {}
    if not isinstance(rope, dict):
        raise config.error(field, "an object of rotary parameters is needed")
    rope = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        outer = config.raw(name)
        if outer is not None and rope.setdefault(name, outer) != outer:
            raise config.error(name, f"contradicts {field}; keep one of them")
    return field, rope
