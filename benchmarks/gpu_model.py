"""A checkpoint of Qwen3-4B's shape with random weights and a tokenizer of printable characters, made on a GPU in a few seconds:
`python -m benchmarks.gpu_model DIRECTORY [--scaled]`."""

import json
import math
import string
import sys
from pathlib import Path

import torch

from benchmarks.sync_gpu import GROUPS, HEAD_DIM, HEADS, HIDDEN, INNER, LAYERS, VOCAB, hf_shapes

SPECIAL = ("<pad>", "<end>", "<unk>")


def write_model(path: Path, layers: int = LAYERS, vocab: int = VOCAB, longest: int = 40960, scaled: bool = False) -> None:
    """Write it where it is not there yet. Matrices have a standard deviation of 0.02; with `scaled`, as megatron-core makes them, those
    that write into the stream of residuals have that over the root of twice the layers."""
    if (path / "config.json").exists():
        return
    from safetensors.torch import save_file

    def deviation(name: str) -> float:
        writes = scaled and name.endswith(("o_proj.weight", "down_proj.weight"))
        return 0.02 / math.sqrt(2 * layers) if writes else 0.02

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {
        name: (torch.ones(shape) if "norm" in name else torch.randn(shape, device="cuda") * deviation(name)).to(torch.bfloat16).cpu()
        for name, shape in hf_shapes(layers, vocab).items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<end>"),
        "pad_token_id": SPECIAL.index("<pad>"),
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))


def write_tokenizer(path: Path) -> None:
    """One token a character; the ids above have no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>").save_pretrained(path)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), scaled="--scaled" in sys.argv)
