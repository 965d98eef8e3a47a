"""Reward functions, good and bad, for workers to load by import path."""

import asyncio
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slime.types import Sample


def behave(sample: Sample) -> Any:
    """What the sample's text says."""
    if sample.text.startswith("leave "):
        left = subprocess.Popen(["sleep", "60"])
        Path(sample.text.split()[1]).write_text(str(left.pid))
        os._exit(3)
    match sample.text:
        case "crash":
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), 11)
        case "exit":
            raise SystemExit(5)
        case "hang":
            time.sleep(60)
        case "raise":
            raise KeyError("no such thing")
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "none":
            return None
        case "dict":
            return {"score": np.float32(0.5), "steps": 3, "right": True, "note": "fine", "bad": float("inf")}
        case "keyless":
            return {"accuracy": 1.0}
        case "bool":
            return True
    return float(sample.text)


async def behave_async(sample: Sample) -> Any:
    if sample.text == "await":
        await asyncio.sleep(60)
    if sample.text == "own timeout":
        raise TimeoutError("upstream")
    if sample.text.startswith("sleep "):
        await asyncio.sleep(float(sample.text.split()[1]))
        return 1.0
    return behave(sample)


def names_its_process(sample: Sample) -> float:
    time.sleep(0.1)
    return float(os.getpid())


def longest_wins(samples: list[Sample]) -> list[Any]:
    best = max(len(s.text) for s in samples)
    return [{"score": float(len(s.text) == best), "length": len(s.text)} for s in samples]


def one_too_few(samples: list[Sample]) -> list[float]:
    return [1.0] * (len(samples) - 1)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping | None = None) -> dict:
    assert data_source == "gsm8k" and extra_info == {"index": 7}
    return {"score": float(solution_str == ground_truth), "acc": 1}


async def custom_rm(args: Any, sample: Any) -> float:
    assert args.rm_url is None and sample.status == "completed" and sample.tokens == (1, 2, 3, 4)
    return float(sample.response == sample.label)


async def writes_to_the_sample(args: Any, sample: Any) -> float:
    sample.reward = 1.0
    return 1.0


async def reads_what_is_not_there(args: Any, sample: Any) -> float:
    return args.hf_checkpoint


not_a_function = 3


def overflows_later(sample: Sample) -> float:
    """The share of even tokens; from prompt 8 on, numbers whose difference no double holds."""
    share = sum(token % 2 == 0 for token in sample.response_ids) / len(sample.response_ids)
    return share if sample.group < 8 else 1.7e308 * (-1) ** sample.index
