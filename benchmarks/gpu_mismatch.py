"""By how much log-probs of engine and trainer differ, and whose rounding it is: `python -m benchmarks.gpu_mismatch`, a GPU with 139 GiB.

A model of Qwen3-4B's shape with random weights, twice: every matrix of standard deviation 0.02, and, with `scaled`, as megatron-core
initialises one: those that write into the stream of residuals smaller by the root of twice the layers. Its engine draws 64 answers of 256
tokens to 64 prompts of 128; the trainer gives the same tokens log-probs

    bf16               as it trains
    bf16, fp32 head    with logits in fp32
    fp32               all in fp32: as good as exact

The table has the mean difference of each pair, in nats a token. JSON goes to $OUT or benchmarks/results. Exit code 1 where engine and
trainer, both in bf16, differ by more than 0.02 with the scaled weights.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_rollout import LABEL, WAIT_S, Whole, spec_of
from benchmarks.gpu_train import out
from benchmarks.sync_gpu import VOCAB, build_native
from slime.engine.client import EngineClient
from slime.engine.generation import Generation
from slime.engine.server import Server
from slime.types import Batch

ANSWERS, PROMPT, DRAWN, BAR = 64, 128, 256, 0.02
VARIANTS = {"bf16": ("bf16", False), "bf16, fp32 head": ("bf16", True), "fp32": ("fp32", False)}  # dtype, whether the head is wide


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gpu_mismatch"))
    parser.add_argument("--models", nargs="+", choices=("plain", "scaled"), default=["plain", "scaled"])
    parser.add_argument("--as", dest="variant", choices=VARIANTS, help="used by itself: the trainer's log-probs of what the engine drew")
    args = parser.parse_args()
    if args.variant:
        read(args.folder, args.variant)
        return 0
    build_native()
    found = {}
    for model in args.models:
        found[model] = compare(args.folder / model, scaled=model == "scaled")
        Console(width=110).print(table(model, found[model]))
    (out() / "gpu_mismatch.json").write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found.get("scaled", {}).get("engine | bf16", 0.0) > BAR else 0


def compare(folder: Path, scaled: bool) -> dict[str, float]:
    """Mean difference of every pair."""
    words = [str(folder / "model"), *(["--scaled"] if scaled else [])]
    subprocess.run([sys.executable, "-m", "benchmarks.gpu_model", *words], check=True)
    asyncio.run(draw(folder))
    for variant in VARIANTS:  # each in a process of its own, which gives its memory back
        command = [sys.executable, "-m", "benchmarks.gpu_mismatch", "--folder", str(folder), "--as", variant]
        subprocess.run(command, check=True, env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    drawn = np.load(folder / "engine.npz")
    logprobs = {"engine": drawn["logprobs"], **{name: np.load(folder / f"{name}.npy")[drawn["mask"]] for name in VARIANTS}}
    return {f"{a} | {b}": float(np.abs(logprobs[a] - logprobs[b]).mean()) for a, b in combinations(logprobs, 2)}


async def draw(folder: Path) -> None:
    """Tokens of prompts and answers, and the engine's log-probs of the answers, into engine.npz."""
    spec, random = spec_of(folder / "model", ANSWERS), np.random.default_rng(0)
    prompts = random.integers(4, VOCAB, (ANSWERS, PROMPT)).tolist()
    server = Server(spec)
    try:
        async with (
            aiohttp.ClientSession() as session,
            EngineClient([spec.endpoint], vocab_size=VOCAB, timeout_s=WAIT_S, max_in_flight=ANSWERS) as client,
        ):
            await server.ready(session, WAIT_S)
            await client.expect(LABEL)
            asked = (client.generate(prompt, Whole(DRAWN), session=number) for number, prompt in enumerate(prompts))
            answers: list[Generation] = list(await asyncio.gather(*asked))
    finally:
        server.stop()
    tokens = np.array([prompt + answer.output_ids for prompt, answer in zip(prompts, answers, strict=True)], np.int32)
    mask = np.zeros(tokens.shape, bool)
    mask[:, PROMPT:] = True
    logprobs = np.concatenate([np.array(answer.logprobs, np.float32) for answer in answers])
    np.savez(folder / "engine.npz", tokens=tokens.reshape(-1), mask=mask.reshape(-1), logprobs=logprobs)


def read(folder: Path, variant: str) -> None:
    """The trainer's log-probs of every token, into a file of the variant's name."""
    import torch.distributed as dist

    from slime.config import SlimeConfig
    from slime.config.parallel import parallel_sizes
    from slime.observe.trace import Tracer
    from slime.trainer import device, distributed
    from slime.trainer.build import build_trainer
    from slime.trainer.passes import log_probs

    cfg, length = SlimeConfig(), PROMPT + DRAWN
    cfg.model.path, cfg.cluster.device = str(folder / "model"), "cuda"
    cfg.model.dtype, wide = VARIANTS[variant]
    cfg.rollout.max_response_tokens, cfg.trainer.max_tokens_per_rank = length, 4096
    cfg.rollout.sglang = {"enable_fp32_lm_head": wide}
    on, drawn = device.set_up("cuda", os.cpu_count() or 1), np.load(folder / "engine.npz")
    with on.scope():
        parallel = distributed.join_groups(on, dist.HashStore(), 0, 1, parallel_sizes(cfg.trainer), 0, 60.0)
        trainer = build_trainer(cfg, on, parallel, Tracer("rank 0"))
        batch = Batch(
            tokens=drawn["tokens"],
            cu_seqlens=np.arange(ANSWERS + 1, dtype=np.int64) * length,
            loss_mask=drawn["mask"],
            rollout_logprobs=np.zeros(len(drawn["tokens"]), np.float32),
            rewards=np.zeros(ANSWERS),
            group=np.arange(ANSWERS) // 4,
            version=np.full(ANSWERS, trainer.version, np.int64),
        )
        np.save(folder / f"{variant}.npy", log_probs(trainer, batch))


def table(model: str, found: dict[str, float]) -> Table:
    names = ["engine", *VARIANTS]
    shown = Table("mean difference, nats", *names[1:], title=f"{model} weights, {ANSWERS * DRAWN:,} tokens")
    for a in names[:-1]:
        shown.add_row(a, *(f"{found[f'{a} | {b}']:.4f}" if f"{a} | {b}" in found else "" for b in names[1:]))
    return shown


if __name__ == "__main__":
    sys.exit(main())
