"""Sums over rows of logits and their gradients against plain torch in fp64.

The same tests run in torch, on the Triton programs interpreted on the CPU (TRITON_INTERPRET=1, which a test here starts), and on a GPU
(SLIME_TEST_DEVICE=cuda).
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from slime.trainer.kernels import vocabulary

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]  # the interpreter takes its time
ROWS, TEMPERATURE = 12, 0.7
WIDTHS = [(24, 21), (9000, 8999), (40, 40), (8, 0)]  # ids of a rank, those that are not padding; a block holds 4096


def inputs(width, real, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, width, generator=g, dtype=torch.float64) * 4).to(dtype)
    rows = torch.randperm(ROWS, generator=g)[:7]
    labels = torch.randint(-width, 2 * width, (7,), generator=g)
    labels[0] = 0
    return logits.to(DEVICE), rows.to(DEVICE), labels.to(DEVICE)


def picked(logits, rows, real):
    return logits.double()[rows, :real] / TEMPERATURE


def close(found, expected, dtype=torch.float32):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "real"), WIDTHS)
def test_sums(width, real, dtype):
    logits, rows, labels = inputs(width, real, dtype)
    top, sums = vocabulary.token_sums(logits, rows, labels, TEMPERATURE, real)
    x = picked(logits, rows, real)
    if not real:
        assert (top == -1e30).all() and (sums == 0).all()
        return
    close(top, x.amax(1))
    x = x - x.amax(1, keepdim=True)
    held = (labels >= 0) & (labels < real)
    of_label = torch.where(held, x.gather(1, labels.clamp(0, real - 1)[:, None])[:, 0], 0.0)
    close(sums, torch.stack([x.exp().sum(1), (x * x.exp()).sum(1), of_label]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize(("width", "real"), WIDTHS[:3])
def test_gradient(width, real, use, dtype):
    logits, rows, labels = inputs(width, real, dtype)
    labels = labels.clamp(0, real - 1)
    x = logits.double().requires_grad_()
    logp = (x[rows, :real] / TEMPERATURE).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    g = torch.Generator().manual_seed(1)
    slopes = torch.randn(2, 7, generator=g).to(DEVICE)
    d_logprobs, d_entropy = (slopes[i] if use in ("both", name) else None for i, name in enumerate(("logprobs", "entropy")))
    terms = [(logp.gather(1, labels[:, None])[:, 0], d_logprobs), (entropy, d_entropy)]
    sum((value * slope).sum() for value, slope in terms if slope is not None).backward()
    log_z = picked(logits, rows, real).logsumexp(1).float()
    found = vocabulary.token_gradient(logits, rows, labels, TEMPERATURE, real, log_z, entropy.detach().float(), d_logprobs, d_entropy)
    assert found.dtype == dtype
    close(found, x.grad, dtype)


def divergence(kind, beta, s, q):
    """(what is summed for each row, the divergence), of log-probabilities."""
    if kind == "reverse":
        sums = [(s.exp() * (s - q)).sum(1)]
    elif kind == "forward":
        sums = [(q.exp() * (q - s)).sum(1)]
    else:
        m = torch.logaddexp(q + math.log(beta), s + math.log1p(-beta))
        sums = [(s.exp() * (s - m)).sum(1), (q.exp() * (q - m)).sum(1)]
        return sums, beta * sums[1] + (1 - beta) * sums[0]
    return sums, sums[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "beta"), [("reverse", 0.0), ("forward", 0.0), ("jsd", 0.3)])
@pytest.mark.parametrize(("width", "real"), WIDTHS[:3])
def test_divergence(width, real, kind, beta, dtype):
    logits, rows, _ = inputs(width, real, dtype)
    teacher, teacher_rows, _ = inputs(width + 2, real, dtype, seed=1)
    x = logits.double().requires_grad_()
    s, q = (x[rows, :real] / TEMPERATURE).log_softmax(1), picked(teacher, teacher_rows, real).log_softmax(1)
    sums, expected = divergence(kind, beta, s, q)
    d_found = torch.randn(7, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (expected * d_found).sum().backward()
    log_z, teacher_log_z = (picked(y, r, real).logsumexp(1).float() for y, r in ((logits, rows), (teacher, teacher_rows)))
    where = (logits, teacher, rows, teacher_rows, TEMPERATURE, real, log_z, teacher_log_z)
    found = vocabulary.divergence_sums(*where, kind, beta)
    torch.testing.assert_close(found.double(), torch.stack(sums).detach(), rtol=1e-4, atol=1e-5)
    gradient = vocabulary.divergence_gradient(*where, found[0], d_found, kind, beta)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.e2e
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is that run")
def test_the_triton_programs_interpreted_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-v", "-x", __file__, __file__.replace("vocabulary", "layer")]
    found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "passed" in found.stdout
