"""Teachers for the opd recipes, and a student of two tasks: supervised runs beside the quickstart's warm start.

    python -m examples.teachers [--seed 0]

Writes the quickstart's task and makes, by the recipes quickstart_sft and sft, what the recipes name:

    data/quickstart/warm            the quickstart's student, careless
    data/quickstart/teacher         sorts without mistakes
    data/quickstart/turn_teacher    sorts downwards without mistakes
    data/quickstart/both            a student of both tasks, careless in both

Models that are there already are left alone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

DATA = Path("data/quickstart")
# name -> recipe and overrides
MODELS = {
    "warm": ["quickstart_sft"],
    "teacher": ["sft"],
    "turn_teacher": ["sft", "data.train=[{path: data/quickstart/turn_careful.jsonl}]"],
    "both": [
        "quickstart_sft",
        "data.train=[{path: data/quickstart/demos.jsonl}, {path: data/quickstart/turn_demos.jsonl}]",
        "run.steps=300",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.teachers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return make(args.seed, list(MODELS))


def make(seed: int, names: list[str]) -> int:
    """The models of these names in the current folder; returns the exit code of what failed, or 0."""
    code = subprocess.run([sys.executable, "-m", "examples.quickstart.make_task", str(DATA), "--seed", str(seed)]).returncode
    for name in names:
        if code or (DATA / name).exists():
            continue
        recipe, *overrides = MODELS[name]
        run = ["--config-name", recipe, f"run.name={name}-{seed}", f"run.seed={seed}", *overrides]
        code = subprocess.run([sys.executable, "-m", "slime.cli.main", "train", *run]).returncode
        if not code:
            (DATA / name).symlink_to((Path("runs") / f"{name}-{seed}" / "hf").resolve())
    return code


if __name__ == "__main__":
    sys.exit(main())
