"""CUDA means CPU, within a scope and nowhere else; in a process of its own, since it patches torch."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

PRELUDE = """
import threading, torch, traceback
from slime.cpu import megatron
megatron.install()
"""

SCOPE = """
with megatron.scope(), megatron.scope():
    assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).type() == "torch.FloatTensor", "only megatron-core is told of CUDA tensors"
    failures = []
    def outside():
        try:
            torch.zeros(2, device="cuda")
        except (AssertionError, RuntimeError) as error:
            failures.append(error)
    thread = threading.Thread(target=outside); thread.start(); thread.join()
    assert failures
try:
    torch.zeros(2, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("the scope did not end")
"""

BACKWARD = """
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, g):
        return g * torch.full((1,), 2.0, device="cuda")
x = torch.ones(3, requires_grad=True)
with megatron.scope():
    Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    a, b = torch.randn(9, 33).bfloat16(), torch.randn(33, 5).bfloat16()
    if megatron.EMULATES_BF16:
        assert torch.equal(a @ b, (a.float() @ b.float()).bfloat16())
        assert torch.equal(torch.matmul(a, b), a @ b)
"""

RNG = """
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
tracker = get_cuda_rng_tracker()
tracker.add("test", 5)
torch.manual_seed(1)
outer = torch.get_rng_state()
with tracker.fork("test"):
    first = torch.rand(4)
assert torch.equal(torch.get_rng_state(), outer)
with tracker.fork("test"):
    assert not torch.equal(torch.rand(4), first), "it goes on where it stopped"
assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(5)))
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What each body raised: one process runs them all, since megatron-core is slow to import."""
    bodies = {"scope": SCOPE, "backward": BACKWARD, "rng": RNG}
    script = (
        PRELUDE
        + f"""
for name, body in {bodies!r}.items():
    try:
        exec(body, globals())
    except BaseException:
        print("FAILED", name, repr(traceback.format_exc()))
    else:
        print("PASSED", name)
"""
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith(("FAILED", "PASSED"))]
    assert [words[1] for words in said] == list(bodies)
    return {words[1]: words[2] for words in said if words[0] == "FAILED"}


def test_scope_is_of_one_thread_and_nests(failures: dict[str, str]):
    assert "scope" not in failures, failures["scope"]


def test_backward_stays_in_the_scope_and_bf16_products_are_rounded_fp32(failures: dict[str, str]):
    assert "backward" not in failures, failures["backward"]


def test_rng_tracker_forks_the_cpu_generator(failures: dict[str, str]):
    assert "rng" not in failures, failures["rng"]
