"""Tiny Hugging Face checkpoints for everybody's tests: real names and files, random weights, a character tokenizer made on the spot."""

import string
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, UNK, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
SPECIAL = (PAD, EOS, UNK, USER, ASSISTANT)
CHARACTERS = string.digits + "+-*/=().,?! \n" + string.ascii_lowercase + string.ascii_uppercase
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_tiny(
    path: str | Path,
    family: str = "qwen3",
    tied: bool = False,
    vocab: int = 80,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    intermediate: int = 96,
    dtype: str = "fp32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a model directory (qwen3 or llama) through transformers and return its path. Norms are random too, so that none can be
    mistaken for another. `config` goes to the family's config class, e.g. rope_parameters=LLAMA3. The tokenizer knows the first
    characters of CHARACTERS that fit the vocabulary beside SPECIAL; the default vocabulary holds all of them."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = classes[family]
    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index(EOS),
        "pad_token_id": SPECIAL.index(PAD),
        "initializer_range": 0.1,
    }
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.random.set_rng_state(before)
    model.to(DTYPES[dtype]).save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path, vocab)
    return Path(path)


def make_tokenizer(path: str | Path, vocab: int) -> None:
    """Write a tokenizer of one token a character, with a chat template, of at most `vocab` tokens."""
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *CHARACTERS][:vocab]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)
    fast.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def load_hf_model(path: str | Path, dtype: str = "fp32") -> Any:
    """The model of a directory as transformers loads it, in eval mode."""
    import_torchvision()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()


def import_torchvision() -> None:
    """transformers' model classes import torchvision; where its wheel was built for another torch, its operators are missing and the import
    fails unless their signatures are declared first."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # operators live as long as the library that declares them
