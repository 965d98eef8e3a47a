"""Rotary position embedding: from config.json's several spellings to what megatron-core's GPTModel takes."""

from typing import Any

from slime.models.config_json import ConfigJson

# megatron.core RotaryEmbedding._apply_scaling takes the factor only; these are its constants.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope(config: ConfigJson) -> dict[str, Any]:
    """Keyword values for GPTModel. Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). Raises ValueError
    for a scaling that megatron-core cannot express."""
    field, rope = _spelled(config)
    theta = rope.pop("rope_theta", 10000.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise config.error(field, f"rope_theta={theta!r}: a positive number is needed")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise config.error(field, "only rotary embeddings over the whole head are mapped (partial_rotary_factor 1)")
    values = {"position_embedding_type": "rope", "rotary_base": theta, "rotary_percent": 1.0}
    if kind == "llama3":
        values |= {"rope_scaling": True, "rope_scaling_factor": _llama3_factor(config, field, rope)}
    elif kind != "default":
        raise config.error(field, f"rotary scaling of type {kind!r} is not mapped to megatron-core (default and llama3 are)")
    if rope:
        raise config.error(field, f"unknown rotary parameter(s) {', '.join(sorted(rope))} for type {kind!r}")
    return values


def _spelled(config: ConfigJson) -> tuple[str, dict[str, Any]]:
    """The field to name in errors, and its parameters with rope_theta among them."""
    parameters, scaling, theta = (config.raw(name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    if parameters is not None and scaling is not None and parameters != scaling:
        raise config.error("rope_scaling", "contradicts rope_parameters; keep one of them")
    field = "rope_parameters" if parameters is not None else "rope_scaling"
    rope = config.values.get(field) or {}
    if not isinstance(rope, dict):
        raise config.error(field, "an object of rotary parameters is needed")
    rope = dict(rope)
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise config.error("rope_theta", f"contradicts {field}; keep one of them")
    return field, rope


def _llama3_factor(config: ConfigJson, field: str, rope: dict[str, Any]) -> float:
    for name, fixed in LLAMA3.items():
        value = rope.pop(name, None)
        if value != fixed:
            raise config.error(field, f"megatron-core's llama3 scaling has {name}={fixed} built in, config.json says {value}")
    factor = rope.pop("factor", None)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
        raise config.error(field, f"llama3 scaling needs a factor, a positive number; found {factor!r}")
    return float(factor)
