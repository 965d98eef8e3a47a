"""Trainer and engine on one GPU: `python -m benchmarks.gpu_share`, with a CUDA build of torch, SGLang and torch-memory-saver.

A model of Qwen3-4B's shape with random weights, trained by one rank and served by one engine on the same GPU, by the code of a run: Ray,
placement, the plan's mem_fraction_static, host agent, weight channel. `--share swap` (the default) goes through turns:

    publish    the trainer has the memory; what changed goes to the host copy            sync_s
    offload    its parameters, gradients and optimizer state go to host memory           offload_s
    restore    the engine takes its memory back, is loaded whole and proven              restore_s
    answers    64 requests, each from the published weights
    release    the engine gives up its memory                                            release_s
    reload     the trainer's bits come back                                              reload_s
    update     a batch of 16,384 tokens

The first turn makes the host memory and is told apart. Used memory of the GPU is read while each works, and between: when the one has left
and the other has not come, 2 x RESERVED of slime/config/plan_share.py may be used. In the last turn the engine is killed while the trainer
has the memory, and is back, proven, after it. With `--share split` both stay, and what they use together is shown.

Bars, seconds of the median turn: release 5, reload 3, offload 3, restore 20. JSON goes to benchmarks/results/gpu_share_<share>.json, or to
the folder in OUT.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import ray

from benchmarks.gpu_recipe import used_bytes
from benchmarks.gpu_rollout import SGLANG
from benchmarks.sync_gpu import GROUPS, HEAD_DIM, HEADS, HIDDEN, INNER, LAYERS, ROOT, VOCAB
from slime.cluster.placement import place
from slime.cluster.session import connect
from slime.cluster.tenancy import ENGINES, TRAINER, Tenancy, Tenant
from slime.config import SlimeConfig
from slime.config.plan_share import RESERVED
from slime.engine.client import EngineClient, Sampling
from slime.engine.fleet import EngineFleet
from slime.start import divided
from slime.sync.channel import Channel
from slime.trainer.group import TrainerGroup
from slime.types import Batch, WeightVersion

BARS_S = {"time/release_s": 5.0, "time/reload_s": 3.0, "time/offload_s": 3.0, "time/restore_s": 20.0}
TIMEOUT_S = 600.0
REQUESTS, ANSWER = 64, 128  # and its tokens
TOKENS, LENGTH = 16384, 256
MIB = 1 << 20
NOBODY = "nobody"  # has the memory


@dataclass
class Found:
    """What is measured. Seconds; bytes of the GPU that are used."""

    share: str
    parameters: int
    fraction: float = 0.0  # of the GPU, the engine's
    moves: list[dict[str, float]] = field(default_factory=list)  # turn by turn
    used: dict[str, list[int]] = field(default_factory=dict)  # by who has the memory
    update_s: list[float] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)
    killed_restore_s: float = 0.0  # of the turn in which the engine was killed
    missed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        print(f"{'ok   ' if holds else 'WRONG'} {what}", flush=True)
        if not holds:
            self.missed.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", choices=("swap", "split"), default="swap")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gpu_share"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    found = Found(args.share, make_model(args.folder / "model", args.layers))
    measure(found, args.folder, args.turns)
    show(found)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu_share_{args.share}.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 1 if found.missed else 0


def make_model(path: Path, layers: int) -> int:
    """Random weights and a tokenizer of characters. Returns the number of parameters."""
    import torch
    from transformers import Qwen3Config

    from slime.models.config_json import ConfigJson
    from slime.models.hf_files import HFWriter
    from slime.models.registry import FAMILIES
    from tests.tiny import make_tokenizer

    config = path.with_name("config")
    Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(config)
    shapes = FAMILIES["qwen3"].build(ConfigJson(config), 1).hf_shapes
    torch.manual_seed(0)
    with HFWriter(path, config, shapes) as writer:
        for name, shape in shapes.items():
            fresh = torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02)
            writer.write(name, fresh.to(torch.bfloat16))
    make_tokenizer(path, VOCAB)
    return sum(prod(shape) for shape in shapes.values())


def recipe(share: str, model: Path) -> SlimeConfig:
    cfg = SlimeConfig()
    cfg.model.path, cfg.cluster.device, cfg.cluster.share = str(model), "cuda", share
    cfg.rollout.sglang = dict(SGLANG)
    cfg.data.max_prompt_tokens = cfg.rollout.max_response_tokens = LENGTH // 2
    cfg.trainer.max_tokens_per_rank, cfg.trainer.lr = 4096, 1e-5
    cfg.cluster.object_store_mb = 4096
    cfg.cluster.start_timeout_s = cfg.cluster.step_timeout_s = cfg.rollout.start_timeout_s = cfg.sync.timeout_s = TIMEOUT_S
    return cfg


def make_batch() -> Batch:
    """Sequences of LENGTH tokens, the second half of each trained."""
    rng, samples = np.random.default_rng(0), TOKENS // LENGTH
    return Batch(
        tokens=rng.integers(1, VOCAB, TOKENS).astype(np.int32),
        cu_seqlens=np.arange(samples + 1, dtype=np.int64) * LENGTH,
        loss_mask=np.tile(np.arange(LENGTH) >= LENGTH // 2, samples),
        rollout_logprobs=np.zeros(TOKENS, np.float32),
        rewards=rng.normal(size=samples),
        group=np.arange(samples) // 2,
        version=np.zeros(samples, np.int64),
    )


@dataclass
class Noting:
    """A tenant; after it has left nobody has the GPU's memory, and what is used then is noted."""

    name: str
    tenant: Tenant
    found: Found

    def leave(self) -> None:
        self.tenant.leave()
        note(self.found, NOBODY)

    def enter(self) -> None:
        self.tenant.enter()


def measure(found: Found, folder: Path, turns: int) -> None:
    cfg, run = recipe(found.share, folder / "model"), folder / "run"
    run.mkdir(parents=True)
    with connect(cfg, run) as cluster:
        placements = place(cfg, cluster)
        of_engines = divided(cfg, placements)
        found.fraction = of_engines.rollout.sglang["mem_fraction_static"]
        if found.share == "split":
            fleet = EngineFleet.start(of_engines, placements["rollout"], run, "bench")
            trainer = TrainerGroup.start(cfg, placements["actor"])
        else:
            trainer = TrainerGroup.start(cfg, placements["actor"])
            trainer.leave()
            fleet = EngineFleet.start(of_engines, placements["rollout"], run, "bench")
        try:
            tenants = {TRAINER: Noting(TRAINER, trainer, found), ENGINES: Noting(ENGINES, fleet, found)}
            tenancy = Tenancy(tenants if found.share == "swap" else {})
            channel = Channel(cfg.sync, trainer, fleet, WeightVersion(0, 0, "bench"), run / "weights", away=bool(tenancy.tenants))
            channel.open(between=lambda: tenancy.have(TRAINER))
            go(found, trainer, fleet, channel, tenancy, turns)
        finally:
            fleet.stop()
            trainer.stop()


def go(found: Found, trainer: TrainerGroup, fleet: EngineFleet, channel: Channel, tenancy: Tenancy, turns: int) -> None:
    """Turn by turn; the engine is killed in the last one."""
    batch = ray.put(make_batch())
    for number in range(turns + 1):
        sync = channel.publish(number)
        moves = {"time/sync_s": sync["time/sync_s"], **tenancy.have(ENGINES)}
        begun = time.perf_counter()
        versions = asyncio.run(answers(fleet, f"bench/0/{number}"))
        found.answers_s.append(time.perf_counter() - begun)
        found.expect(versions == {f"bench/0/{number}"}, f"turn {number}: answers come from the published weights: {versions}")
        note(found, "engine")
        moves |= tenancy.have(TRAINER)
        note(found, "trainer")
        if number == turns:
            found.killed_restore_s = moves.get("time/restore_s", 0.0)
        else:
            found.moves.append(moves)
        print(f"turn {number}: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in moves.items()), flush=True)
        begun = time.perf_counter()
        trainer.update(batch)
        found.update_s.append(time.perf_counter() - begun)
        fleet.tend()
        if number == turns - 1 and found.share == "swap":
            kill_engine()
    if found.share == "swap":
        kept = max(found.used[NOBODY])
        found.expect(kept <= 2 * RESERVED, f"{kept / MIB:.0f} MiB are used when both have left, at most {2 * RESERVED / MIB:.0f}")
        for name, bar in BARS_S.items():
            seconds = median(turn[name] for turn in found.moves[1:])
            found.expect(seconds <= bar, f"{name}: {seconds:.2f} s, at most {bar:g}")


async def answers(fleet: EngineFleet, label: str) -> set[str]:
    """Versions that REQUESTS answers come from."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(10, 1000, (REQUESTS, LENGTH // 2)).tolist()
    async with EngineClient(fleet.endpoints(), vocab_size=VOCAB, timeout_s=TIMEOUT_S, max_in_flight=REQUESTS) as client:
        await client.expect(label)
        made = await asyncio.gather(*(client.generate(prompt, Sampling(max_new_tokens=ANSWER, seed=1)) for prompt in prompts))
    return {span.version for answer in made for span in answer.versions}


def kill_engine() -> None:
    """Its scheduler, as a fault would."""
    for process in psutil.Process().children(recursive=True):
        if "sglang::scheduler" in process.name() + " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)


def note(found: Found, who: str) -> None:
    """Memory of the GPU that is used now."""
    found.used.setdefault(who, []).append(used_bytes())


def show(found: Found) -> None:
    print(f"{found.parameters:,} parameters, mem_fraction_static {found.fraction:g}")
    for name in found.moves[0]:
        rest = [turn[name] for turn in found.moves[1:]]
        print(f"{name:18} first {found.moves[0][name]:8.2f} s   median {median(rest):8.2f} s   most {max(rest):8.2f} s")
    print(f"{'update':18} first {found.update_s[0]:8.2f} s   median {median(found.update_s[1:]):8.2f} s")
    print(f"{'answers':18} first {found.answers_s[0]:8.2f} s   median {median(found.answers_s[1:]):8.2f} s")
    print(f"restore after its engine was killed {found.killed_restore_s:.2f} s")
    for who, used in found.used.items():
        print(f"GPU memory used while the {who} works: {', '.join(f'{count / MIB:.0f}' for count in used)} MiB")
    for missed in found.missed:
        print(f"missed  {missed}")


if __name__ == "__main__":
    raise SystemExit(main())
