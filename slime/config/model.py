"""model: what is trained."""

from dataclasses import dataclass

from slime.config.fields import choice


@dataclass
class ModelConfig:
    path: str = "???"
    """Hugging Face directory (config.json, safetensors, tokenizer), or a hub id to download."""
    family: str = "auto"
    """Map between Hugging Face and megatron-core names, a file of slime/models/families; auto reads model_type from config.json."""
    dtype: str = choice("bf16", "fp32")
    """Parameters and compute; with bf16 the optimizer keeps fp32 main weights."""
