"""What runs inside SGLang imports torch, numpy and its own part of slime, and nothing of the trainer's or the driver's world."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = (
    "ray",
    "hydra",
    "omegaconf",
    "megatron",
    "transformers",
    "aiohttp",
    "orjson",
    "slime.config",
    "slime.engine",
    "slime.trainer",
    "slime.run",
)
PROGRAM = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == word or name.startswith(word + ".") for word in {BLOCKED!r}):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
import slime.sync.inserver, slime.sync.inserver_client, slime.sync.staging, slime.sync.livemap
print(sorted(name for name in sys.modules if name.split(".")[0] == "slime"))
"""


@pytest.mark.e2e
def test_inserver_imports_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert ran.returncode == 0, ran.stderr
    outside = [name for name in eval(ran.stdout) if name not in ("slime", "slime.layout") and not name.startswith("slime.sync")]
    assert not outside


def test_the_block_blocks() -> None:
    program = PROGRAM.replace("import slime.sync.inserver,", "import slime.config\nimport slime.sync.inserver,")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert "blocked: slime.config" in ran.stderr
