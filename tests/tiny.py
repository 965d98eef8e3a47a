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

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "glm": "Glm",
    "glm4": "Glm4",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "mixtral": "Mixtral",
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 1.5}
HUB = {"moe_layer_freq": 1}  # which SGLang reads, as the models on the hub name it
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SOFTMAX = {"topk_method": "group_limited_greedy", "scoring_func": "softmax"}
# What a family's config class is given beside the common sizes; head_dim None leaves it to the class. The first layer is dense if it can.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": None},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "glm4_moe": {**EXPERTS, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "glm4_moe_lite": {
        **{name: value for name, value in EXPERTS.items() if name != "first_k_dense_replace"},
        **LATENT,
        "head_dim": None,
        "mlp_layer_types": ["dense", "sparse"],
        "first_k_dense_replace": 1,  # which SGLang reads
    },
    "deepseek_v2": {**EXPERTS, **LATENT, **GROUPS, **HUB, **SOFTMAX, "head_dim": None},
    "deepseek_v3": {**EXPERTS, **LATENT, **GROUPS, **HUB, **SIGMOID, "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
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
    """Write a model directory of a family through transformers and return its path. Norms, biases and the routers' choosing biases are
    random too, so that none can be mistaken for another or be left out. `config` goes to the family's config class, e.g.
    rope_parameters=LLAMA3. The tokenizer knows the first characters of CHARACTERS that fit the vocabulary beside SPECIAL; the default
    vocabulary holds all of them."""
    import_torchvision()
    import transformers

    name = CLASSES[family]
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
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
        **SETTINGS.get(family, {}),
    }
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    chosen = {name: value for name, value in {**settings, **config}.items() if value is not None or name not in ("head_dim",)}
    model = model_class(config_class(**chosen))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith(("bias", "correction_bias")):
                tensor.add_(torch.randn_like(tensor) * 0.1)
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
