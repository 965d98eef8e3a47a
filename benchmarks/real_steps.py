"""Consecutive optimizer steps of a real run, in bf16, for `benchmarks.sync_codec --pairs`.

    python -m benchmarks.real_steps --out DIR [--device cuda|cpu] [--algorithm grpo|sft] [--restart] [--steps 60] [--lr 1e-6]
    OMP_NUM_THREADS=1 python -m benchmarks.sync_codec --pairs DIR

slime's own trainer (megatron-core's distributed optimizer with fp32 masters, one rank) on a model of Qwen3-0.6B's shape that is made here.
It first learns a language for some supervised steps at a large rate, so that neither weights nor Adam's state are those of an
initialisation; `--restart` then begins from the bf16 weights with a fresh optimizer, as a run does that starts from a checkpoint. Then it
takes `--steps` steps at `--lr` on fresh batches, of which the last pairs are kept: old_*.npy and new_*.npy, uint16 bits of tensors of every
kind, one after the other, at most --elements a pair.

The language: each token has a few successors, some likelier; tokens follow Zipf's law; half of the sequences repeat their own beginning.
GRPO's answers are the language's continuations of a prompt with a random share of tokens replaced; the reward is the share that is left.
No engine draws them, so log-probs of a rollout are the trainer's own, as with one step a batch.

Prints what changed by step and by kind of tensor, and writes it to DIR/real_steps.json. On one H100 about two minutes; on a CPU take
--device cpu --layers 2 --hidden 128 --vocab 512 --batch 8 --warmup 10 --steps 4.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.sync_gpu import build_native

PROMPT, SUCCESSORS, GROUP = 16, 8, 8
KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm", "lm_head")
Weights = dict[str, np.ndarray]  # uint16 bits by HF name, flat


@dataclass
class Shape:
    """A Qwen3 model; Qwen3-0.6B's with a smaller vocabulary by default."""

    layers: int
    hidden: int
    vocab: int
    head_dim: int = 128
    scaled: bool = True  # whether what adds to the residual stream begins smaller with depth

    @property
    def heads(self) -> int:
        return max(2, self.hidden // 64)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor."""
        hidden, inner, q, kv = self.hidden, 3 * self.hidden, self.heads * self.head_dim, self.heads // 2 * self.head_dim
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden), "model.norm.weight": (hidden,)}
        for layer in range(self.layers):
            inside = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, q),
                "self_attn.q_norm": (self.head_dim,),
                "self_attn.k_norm": (self.head_dim,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        return found

    def write(self, path: Path) -> None:
        """A model directory, bf16, N(0, 0.02)."""
        torch.manual_seed(0)
        tensors = {}
        for name, shape in self.tensors().items():
            adds = self.scaled and ("o_proj" in name or "down_proj" in name)
            sigma = 0.02 / (2 * self.layers) ** 0.5 if adds else 0.02
            tensors[name] = (torch.ones(shape) if "norm" in name else torch.randn(shape) * sigma).to(torch.bfloat16)
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(self.config(), indent=1))


class Language:
    """See the module. Ids 0 to 3 are not used."""

    def __init__(self, vocab: int, seed: int = 1) -> None:
        self.g = np.random.default_rng(seed)
        ranks = 1 / np.arange(1, vocab - 3)
        self.zipf = np.cumsum(ranks / ranks.sum())
        self.successors = self.words((vocab, SUCCESSORS))
        likely = 0.5 ** np.arange(SUCCESSORS)
        self.likely = np.cumsum(likely / likely.sum())

    def words(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.minimum(np.searchsorted(self.zipf, self.g.random(shape)), len(self.zipf) - 1) + 4

    def sequences(self, beginnings: np.ndarray, length: int) -> np.ndarray:
        """int64 [n, length] that continue [n, b]."""
        found = np.empty((len(beginnings), length), np.int64)
        begun = beginnings.shape[1]
        found[:, :begun] = beginnings
        for at in range(begun, length):
            choice = np.minimum(np.searchsorted(self.likely, self.g.random(len(found))), SUCCESSORS - 1)
            found[:, at] = self.successors[found[:, at - 1], choice]
        half = length // 2
        again = self.g.random(len(found)) < 0.5
        found[again, half:] = found[again, : length - half]
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--algorithm", choices=("grpo", "sft"), default="grpo")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--warmup", type=int, default=100, help="supervised steps before")
    parser.add_argument("--warmup-lr", type=float, default=3e-4)
    parser.add_argument("--restart", action="store_true", help="masters and Adam's state begin anew after the warm-up")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--elements", type=int, default=48 << 20, help="of a pair, at most")
    args = parser.parse_args()
    build_native()
    args.out.mkdir(parents=True, exist_ok=True)
    from slime.trainer import device

    dev = device.set_up(args.device, 1 if args.device == "cpu" else 8)
    with tempfile.TemporaryDirectory() as scratch, dev.scope():
        shape = Shape(args.layers, args.hidden, args.vocab)
        shape.write(Path(scratch) / "model")
        return Run(args, dev, Path(scratch)).go(shape)


@dataclass
class Step:
    """One optimizer step after the warm-up."""

    number: int
    changed: float
    loss: float
    grad_norm: float


@dataclass
class Kind:
    """Tensors of one kind in one pair."""

    pair: str
    kind: str
    elements: int
    changed: float
    one_ulp: float  # of the changed ones, those that moved to a neighbour
    sigma: float  # of the old weights


@dataclass
class Run:
    """A trainer and what it is fed."""

    args: argparse.Namespace
    device: Any
    scratch: Path
    steps: list[Step] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def go(self, shape: Shape) -> int:
        args = self.args
        with self.timed("build, s"):
            self.build()
        self.facts |= {
            "parameters": sum(prod(shape) for shape in shape.tensors().values()),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "torch": torch.__version__,
            **{name: value for name, value in vars(args).items() if name != "out"},
        }
        with self.timed("warm-up, s"):
            self.warm_up()
        if args.restart:
            restart(self.trainer.model.optimizer)
        self.choose(args.algorithm, args.lr, 0)
        with self.timed("steps, s"):
            for number in range(args.steps):
                self.step(number)
        self.report()
        return 0

    def build(self) -> None:
        from slime.config import SlimeConfig
        from tests.trainer.ranks import Place

        args, cfg = self.args, SlimeConfig()
        cfg.model.path, cfg.model.dtype, cfg.cluster.device = str(self.scratch / "model"), "bf16", args.device
        cfg.rollout.max_response_tokens = args.length
        cfg.trainer.max_tokens_per_rank = 8192
        self.trainer = Place(self.device, 0, 1, str(self.scratch / "store")).trainer(cfg)
        self.language = Language(args.vocab)

    def choose(self, algorithm: str, lr: float, warmup_steps: int) -> None:
        """What the next steps are: learning rates count from here on."""
        from slime.algorithms.registry import build_algorithm

        cfg = self.trainer.cfg
        cfg.algorithm.name, cfg.trainer.lr, cfg.trainer.warmup_steps = algorithm, lr, warmup_steps
        self.trainer.algorithm, self.trainer.optimizer_steps = build_algorithm(cfg.algorithm), 0

    def warm_up(self) -> None:
        from slime.trainer.step import train_batch

        args = self.args
        self.choose("sft", args.warmup_lr, max(1, args.warmup // 5))
        for number in range(args.warmup):
            metrics = train_batch(self.trainer, self.batch(False))
            if number % max(1, args.warmup // 10) == 0 or number == args.warmup - 1:
                print(f"warm-up {number:4}   loss {metrics['train/loss']:.3f}   norm {metrics['train/grad_norm']:.2f}", flush=True)
                self.facts.setdefault("warm-up losses", []).append(metrics["train/loss"])

    def step(self, number: int) -> None:
        from slime.trainer.step import train_batch

        args = self.args
        kept = number >= args.steps - args.pairs
        old = self.weights() if kept else {}
        before = [bits_on_device(p).clone() for _, p in self.trainer.model.parameters()]
        metrics = train_batch(self.trainer, self.batch(args.algorithm == "grpo"))
        changed = total = 0
        for held, (_, p) in zip(before, self.trainer.model.parameters(), strict=True):
            changed += int((held != bits_on_device(p)).sum())
            total += held.numel()
        self.steps.append(Step(number, changed / total, metrics["train/loss"], metrics["train/grad_norm"]))
        if number % 10 == 0 or kept:
            print(f"step {number:4}   changed {changed / total:.3%}   loss {metrics['train/loss']:.4f}", flush=True)
        if kept:
            self.keep(f"{args.algorithm}_lr{args.lr:g}{'_restarted' if args.restart else ''}_step{number}", old, self.weights())

    def batch(self, rewarded: bool) -> Any:
        """Sequences with a prompt; with rewards in groups of one prompt, worsened at random."""
        from slime.types import Batch

        args, g = self.args, self.language.g
        group = GROUP if rewarded else 1
        prompts = self.language.sequences(self.language.words((args.batch // group, 1)), PROMPT)
        tokens = self.language.sequences(np.repeat(prompts, group, 0), args.length)
        rewards = np.zeros(len(tokens))
        if rewarded:
            wrong = g.random((len(tokens), args.length)) < g.random(len(tokens))[:, None] * 0.3
            wrong[:, :PROMPT] = False
            tokens = np.where(wrong, self.language.words(tokens.shape), tokens)
            rewards = 1 - wrong[:, PROMPT:].mean(1)
        mask = np.ones(tokens.shape, bool)
        mask[:, : PROMPT if rewarded else 1] = False
        return Batch(
            tokens=tokens.reshape(-1).astype(np.int32),
            cu_seqlens=np.arange(len(tokens) + 1, dtype=np.int64) * args.length,
            loss_mask=mask.reshape(-1),
            rollout_logprobs=np.zeros(tokens.size, np.float32),
            rewards=rewards,
            group=np.arange(len(tokens)) // group,
            version=np.full(len(tokens), self.trainer.version if rewarded else -1, np.int64),
        )

    def weights(self) -> Weights:
        from slime.engine.host_copy import bits_of
        from slime.trainer.export import gather_all

        buckets = gather_all(self.trainer.model, self.trainer.atlas, 256 << 20)
        return {name: bits_of(tensor).copy() for bucket in buckets for name, tensor in bucket}

    def keep(self, name: str, old: Weights, new: Weights) -> None:
        for kind in KINDS:
            names = [tensor for tensor in old if kind in tensor.split(".")[-2]]
            if names:
                a, b = (np.concatenate([weights[tensor] for tensor in names]) for weights in (old, new))
                self.kinds.append(compared(name, kind, a, b))
        places = chosen(old, self.args.elements)
        for which, weights in (("old", old), ("new", new)):
            np.save(self.args.out / f"{which}_{name}.npy", np.concatenate([weights[tensor][:size] for tensor, size in places]))
        self.facts["pair"] = [f"{tensor} {size}" for tensor, size in places]

    def report(self) -> None:
        print(f"{'pair':44} {'kind':14} {'elements':>11} {'changed':>9} {'one ulp':>9} {'sigma':>9}")
        for row in self.kinds:
            print(f"{row.pair:44} {row.kind:14} {row.elements:11} {row.changed:9.3%} {row.one_ulp:9.1%} {row.sigma:9.5f}")
        for name, fact in self.facts.items():
            print(f"{name:20} {fact if name != 'pair' else f'{len(fact)} tensors'}")
        found = {"facts": self.facts, "steps": [vars(step) for step in self.steps], "kinds": [vars(kind) for kind in self.kinds]}
        (self.args.out / "real_steps.json").write_text(json.dumps(found, indent=1, default=str) + "\n")

    def timed(self, name: str) -> "Timed":
        return Timed(lambda seconds: self.facts.update({name: round(seconds, 1)}))


class Timed:
    """Tells how long its body took."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.tell(time.perf_counter() - self.begun)


def restart(optimizer: Any) -> None:
    """fp32 masters are the bf16 weights; Adam has seen no gradient."""
    from slime.trainer.without_te import allocate_adam_state

    optimizer.reload_model_params()
    allocate_adam_state(optimizer)


def bits_on_device(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().view(torch.int16)


def compared(pair: str, kind: str, old: np.ndarray, new: np.ndarray) -> Kind:
    at = np.flatnonzero(old != new)

    def place(bits: np.ndarray) -> np.ndarray:
        """Neighbouring values have neighbouring numbers."""
        magnitudes = (bits & 0x7FFF).astype(np.int32)
        return np.where(bits >> 15, -magnitudes - 1, magnitudes)

    near = np.abs(place(new[at]) - place(old[at])) == 1
    values = torch.from_numpy(old.view(np.int16)).view(torch.bfloat16)
    return Kind(pair, kind, len(old), len(at) / len(old), float(near.mean()) if len(at) else 0.0, float(values.float().std()))


def chosen(weights: Weights, elements: int) -> list[tuple[str, int]]:
    """(tensor, its first elements) of every kind, from layers all over the model, at most `elements` in all."""
    of_kind = {kind: [name for name in weights if kind in name.split(".")[-2]] for kind in KINDS}
    of_kind = {kind: spread(names) for kind, names in of_kind.items() if names}
    found = [(name, len(weights[name])) for name in of_kind.pop("norm", [])]
    room = elements - sum(size for _, size in found)
    for left, names in zip(range(len(of_kind), 0, -1), of_kind.values(), strict=True):
        share = room // left
        for name in names:
            size = min(len(weights[name]), share)
            if size:
                found.append((name, size))
            share, room = share - size, room - size
    return found


def spread(names: list[str]) -> list[str]:
    """The same, so that the first few are from all over."""
    order = np.argsort(np.arange(len(names)) * 0.618 % 1, kind="stable")
    return [names[i] for i in order]


if __name__ == "__main__":
    sys.exit(main())
