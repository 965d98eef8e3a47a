"""A recipe's surroundings: a model directory by its headers alone, a data file, importable functions."""

import json
import struct
import sys
from pathlib import Path

import pytest

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "vocab_size": 100,
}
FUNCTIONS = """
THREE = 3
def keep(group): return True
def answer(sample, client, cfg): return sample
async def later(group): return False
def each(group): yield True
def two(args, sample): return 1.0
def nothing(): return 1.0
def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1.0
async def turn(sample, client): return sample
class Scorer:
    async def __call__(self, sample, client, cfg): return sample
scorer = Scorer()
async def turns(sample, client, cfg): return sample
def imitate(cfg):
    from slime.algorithms.base import Algorithm
    return Algorithm(targets=keep, loss=keep, needs_rollouts=False)
def explore(cfg):
    from slime.algorithms.base import Algorithm
    return Algorithm(targets=keep, loss=keep)
def judged(cfg):
    from slime.algorithms.base import Algorithm
    return Algorithm(targets=keep, loss=keep, uses_critic=True)
def broken(cfg): return cfg.no_such_knob
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with model/, p.jsonl, empty.jsonl, functions.py and rollouts/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [10, 64]}, "b.weight": {"dtype": "F32", "shape": [36]}}).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    yield tmp_path
    sys.modules.pop("functions", None)
