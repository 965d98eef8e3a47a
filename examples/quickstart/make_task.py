"""The quickstart's task, its data files and its untrained model.

    python -m examples.quickstart.make_task OUT [--seed 0]

The task: sort six different digits, "sort 402715=" -> "012457". The demonstrations are careless in the way people are: four times
in five they drop a leading zero, "12457". A model that imitates them is right only where there is no zero, which is in two prompts
of five; a program that checks answers can teach it the rest.

OUT gets train.jsonl (prompts of the RL run), demos.jsonl (the warm start's demonstrations), heldout.jsonl (evaluation), no prompt
in two of them, and careful.jsonl: the demonstrations without their mistakes, from which a teacher learns. For a student of two
teachers there is a second task, to sort downwards, "turn 402715=" -> "754210", whose demonstrations drop the zero at the end: the files
turn_*.jsonl. And model/: a Hugging Face directory with a Qwen3 of about a million random parameters and a tokenizer of
characters. The same seed gives the same bytes.
"""

import argparse
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

ROWS = {"heldout": 512, "demos": 4096, "train": 4096}
DIGITS = 6
CARELESS = 0.8  # share of demonstrations that drop a leading zero

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNKNOWN, *string.ascii_lowercase, *string.digits, *" =+-*/?:."]


def make_task(out: Path, seed: int) -> None:
    """Write everything; files of an earlier call are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    tasks = make_rows(random.Random(seed), SORT), make_rows(random.Random(f"turn {seed}"), TURN)
    for prefix, files in zip(("", "turn_"), tasks, strict=True):
        for name, rows in files.items():
            (out / f"{prefix}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(out / "model", seed)


@dataclass(frozen=True)
class Task:
    """What a prompt asks for, the right answer to digits, and what people make of it."""

    verb: str
    answer: Callable[[str], str]
    careless: Callable[[str], str]


SORT = Task("sort", lambda digits: "".join(sorted(digits)), lambda right: right.removeprefix("0"))
TURN = Task("turn", lambda digits: "".join(sorted(digits, reverse=True)), lambda right: right.removesuffix("0"))


def make_rows(rng: random.Random, task: Task) -> dict[str, list[dict[str, str]]]:
    """{"prompt", "label"} rows by file; no prompt occurs twice, but that the careful demonstrations are those of the careless ones."""
    numbers: dict[str, None] = {}
    while len(numbers) < sum(ROWS.values()):
        numbers["".join(rng.sample(string.digits, DIGITS))] = None
    drawn = iter(numbers)
    files = {}
    for name, count in ROWS.items():
        files[name] = [{"prompt": f"{task.verb} {digits}=", "label": task.answer(digits)} for digits in islice(drawn, count)]
    files["careful"] = [dict(row) for row in files["demos"]]
    for row in files["demos"]:
        if (careless := task.careless(row["label"])) != row["label"] and rng.random() < CARELESS:
            row["label"] = careless
    return files


def write_model(path: Path, seed: int) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.save_pretrained(path)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_file(random_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, nothing added to a prompt."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def random_weights(config: Qwen3Config, seed: int) -> dict[str, np.ndarray]:
    """As transformers initialises a Qwen3: matrices from N(0, initializer_range), norms 1; the head is the embedding."""
    hidden, ffn, head, kv_heads = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
    assert head is not None and kv_heads is not None, "the configuration names both"
    q, kv = config.num_attention_heads * head, kv_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    rng = np.random.default_rng(seed)
    std = np.float32(config.initializer_range)
    return {n: np.ones(s, np.float32) if len(s) == 1 else std * rng.standard_normal(s, np.float32) for n, s in shapes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.make_task", description="Write the quickstart's task.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_task(args.out, args.seed)
    files = ", ".join(f"{count} {name}" for name, count in ROWS.items())
    print(f"{args.out}: sort {DIGITS} digits ({files} prompts), model/ with random weights (seed {args.seed})")


if __name__ == "__main__":
    main()
