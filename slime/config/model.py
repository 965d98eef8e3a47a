"""model: what is trained."""

from dataclasses import dataclass

from slime.config.fields import choice


@dataclass
class ModelConfig:
    path: str = "???"
    """Hugging Face directory (config.json, safetensors, tokenizer), or a hub id to download."""
    family: str = choice("auto", "llama", "qwen3")
    """Map between Hugging Face and megatron-core names; auto reads model_type from config.json."""
    dtype: str = choice("bf16", "fp32")
    """Parameters and compute; with bf16 the optimizer keeps fp32 main weights."""
