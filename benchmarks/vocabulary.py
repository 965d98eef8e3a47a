"""What a large vocabulary costs the loss: memory and time from logits to their gradient, against the obvious way.

    python -m benchmarks.vocabulary [--device cpu] [--tokens N] [--vocabulary 151936] [--rounds 3]

Three functions of bf16 logits [tokens, vocabulary] on one rank, each forward and backward: log-probs with entropy (slime.trainer.logprobs),
the divergence from a teacher over its 16 likeliest tokens and a tail (known_logprobs), and over the whole vocabulary (full_divergence).
The obvious way is logits.float().log_softmax(-1) and plain torch behind it. Each figure comes from a process of its own. Memory is what is
taken beside the logits (two of them for the last): the peak of the first pass, by VmHWM on the CPU and by torch on a GPU; no way can take
less than the gradient, which is bf16 and as large as the logits. Time is that of the fastest round after it, by
the clock and, where others use the machine too, by what the process got of its cores. Both ways must agree.
Prints a table and writes benchmarks/results/vocabulary.json (vocabulary_gpu.json with --device cuda). On the CPU, 2048 tokens want 16 GB of
memory and some minutes; a GPU does 8192 by default.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.checkpoint_save import forget_peak, memory
from slime.algorithms.distillation import divergence, with_tail
from slime.trainer.full_divergence import full_divergence
from slime.trainer.kernels.vocabulary_chunks import CHUNK_ELEMENTS
from slime.trainer.known_logprobs import known_logprobs
from slime.trainer.logprobs import token_logprobs

RESULTS = Path(__file__).parent / "results"
TOKENS = {"cpu": 2048, "cuda": 8192}
TOP_K, TEMPERATURE = 16, 0.7
WAYS = ("ours", "obvious")
# Relative difference of a mean over all tokens, and of a gradient's norm. Of the two, log_softmax is the less exact on a CPU: against fp64
# its JSD's gradient is off by 2e-3 at this vocabulary, ours by 3e-4, which is what bf16 gradients allow.
AGREE = 5e-3


@dataclass(frozen=True)
class Given:
    """What a loss is made of. t tokens, v ids."""

    logits: Tensor  # bf16 [t, v], a leaf
    teacher: Tensor | None  # bf16 [t, v]
    labels: Tensor  # int64 [t]
    ids: Tensor  # int64 [t, 16]
    known: Tensor  # fp32 [t, 17], the teacher's log-probs of them and of the rest
    rows: Tensor  # int64 [t], all of them
    group: dist.ProcessGroup


def naive(logits: Tensor) -> Tensor:
    return (logits.float() / TEMPERATURE).log_softmax(-1)


def logprobs_ours(x: Given) -> Tensor:
    logp, entropy = token_logprobs(x.logits, x.rows, x.labels, TEMPERATURE, x.logits.shape[1], x.group)
    return logp + 0.1 * entropy


def logprobs_obvious(x: Given) -> Tensor:
    logp = naive(x.logits)
    return logp.gather(1, x.labels[:, None])[:, 0] - 0.1 * (logp.exp() * logp).sum(-1)


def top_k_ours(x: Given) -> Tensor:
    own = known_logprobs(x.logits, x.rows, x.ids, TEMPERATURE, x.logits.shape[1], x.group)
    return divergence(own, x.known, "reverse")


def top_k_obvious(x: Given) -> Tensor:
    return divergence(with_tail(naive(x.logits).gather(1, x.ids)), x.known, "reverse")


def full_ours(x: Given) -> Tensor:
    assert x.teacher is not None
    return full_divergence(x.logits, x.teacher, x.rows, x.rows, TEMPERATURE, x.logits.shape[1], x.group, "jsd", 0.5)


def full_obvious(x: Given) -> Tensor:
    assert x.teacher is not None
    return divergence(naive(x.logits), naive(x.teacher), "jsd", 0.5)


CASES: dict[str, tuple[Callable[[Given], Tensor], Callable[[Given], Tensor]]] = {
    "log-probs and entropy": (logprobs_ours, logprobs_obvious),
    "top-16 reverse KL": (top_k_ours, top_k_obvious),
    "whole-vocabulary JSD": (full_ours, full_obvious),
}


@dataclass
class Found:
    """Of one process."""

    case: str
    way: str
    device: str
    tokens: int
    vocabulary: int
    gradient_bytes: int
    peak_bytes: int  # beside the logits
    seconds: float
    cpu_seconds: float  # of all its threads
    mean: float  # of the loss
    norm: float  # of its gradient


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WAY"), help="what a process of its own measures")
    args = parser.parse_args()
    tokens = args.tokens or TOKENS[args.device]
    if args.one:
        sys.stdout.write(json.dumps(asdict(measure(*args.one, args.device, tokens, args.vocabulary, args.rounds))))
        return 0
    asked = ["--device", args.device, "--tokens", str(tokens), "--vocabulary", str(args.vocabulary), "--rounds", str(args.rounds)]
    found = [apart(case, way, asked) for case in CASES for way in WAYS]
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    whole = {"chunk_elements": CHUNK_ELEMENTS, "torch": torch.__version__, "device": device_name(args.device)}
    path = RESULTS / f"vocabulary{'_gpu' if args.device == 'cuda' else ''}.json"
    path.write_text(json.dumps(whole | {"runs": [asdict(f) for f in found]}, indent=1) + "\n")
    return 0 if all(agree(*pair) for pair in zip(found[::2], found[1::2], strict=True)) else 1


def apart(case: str, way: str, asked: list[str]) -> Found:
    command = [sys.executable, "-m", "benchmarks.vocabulary", "--one", case, way, *asked]
    return Found(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def measure(case: str, way: str, device: str, tokens: int, vocabulary: int, rounds: int) -> Found:
    on_gpu = device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss_of = CASES[case][WAYS.index(way)]
    one_pass(loss_of, given(case, device, 8, 1024))  # libraries and kernels are loaded
    x = given(case, device, tokens, vocabulary)
    before = start_of_peak(on_gpu)
    mean = one_pass(loss_of, x)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else memory(psutil.Process(), "VmHWM")) - before
    assert x.logits.grad is not None
    norm = sum(float(part.float().square().sum()) for part in x.logits.grad.split(64)) ** 0.5
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter(), time.process_time()
        one_pass(loss_of, x)
        seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    gradient = x.logits.numel() * x.logits.element_size()
    return Found(case, way, device, tokens, vocabulary, gradient, peak, *map(min, zip(*seconds, strict=True)), mean, norm)


def given(case: str, device: str, tokens: int, vocabulary: int) -> Given:
    generator = torch.Generator(device).manual_seed(0)

    def logits() -> Tensor:
        made = torch.empty(tokens, vocabulary, dtype=torch.bfloat16, device=device)
        return made.normal_(0, 3, generator=generator)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, vocabulary // TOP_K, shape, device=device, generator=generator)

    ids = integers(tokens, TOP_K) + torch.arange(TOP_K, device=device) * (vocabulary // TOP_K)  # distinct in a row
    known = torch.randn(tokens, TOP_K + 1, device=device, generator=generator).log_softmax(-1)
    student = logits().requires_grad_()
    teacher = logits() if case == "whole-vocabulary JSD" else None
    assert dist.group.WORLD is not None
    return Given(student, teacher, integers(tokens), ids, known, torch.arange(tokens, device=device), dist.group.WORLD)


def one_pass(loss_of: Callable[[Given], Tensor], x: Given) -> float:
    """The mean loss; its gradient is there when it returns."""
    x.logits.grad = None
    loss = loss_of(x).mean()
    loss.backward()
    if x.logits.is_cuda:
        torch.cuda.synchronize()
    return float(loss.detach())


def start_of_peak(on_gpu: bool) -> int:
    """From here on the peak counts; what is taken now."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget_peak(psutil.Process())
    return memory(psutil.Process(), "VmRSS")


def agree(ours: Found, obvious: Found) -> bool:
    pairs = ((ours.mean, obvious.mean), (ours.norm, obvious.norm))
    return all(abs(a - b) <= AGREE * abs(b) for a, b in pairs)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def table(found: list[Found]) -> Table:
    first = found[0]
    title = f"bf16 logits {first.tokens} x {first.vocabulary}, forward and backward, on {device_name(first.device)}"
    shown = Table("", "", "memory", "of it the gradient", "seconds", "of cores", "mean loss", "gradient norm", title=title)
    for f in found:
        numbers = (
            f"{f.peak_bytes / 1e9:.2f} GB",
            f"{f.gradient_bytes / 1e9:.2f} GB",
            f"{f.seconds:.3f}",
            f"{f.cpu_seconds:.2f}",
            f"{f.mean:.6g}",
            f"{f.norm:.6g}",
        )
        shown.add_row(f.case, f.way, *numbers, end_section=f.way == WAYS[-1])
    return shown


if __name__ == "__main__":
    sys.exit(main())
