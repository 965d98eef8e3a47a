"""The quickstart: task -> SFT warm start -> GRPO, each step the command that a user would type.

    python -m examples.quickstart [--recipe quickstart] [key=value ...]

Overrides go to the GRPO run; run.seed goes to every step. Each call starts new runs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DATA = Path("data/quickstart")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--recipe", default="quickstart", help="recipe of the GRPO run")
    parser.add_argument("overrides", nargs="*", help="key=value for the GRPO run")
    args = parser.parse_args()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    seed = next((o for o in args.overrides if o.startswith("run.seed=")), "run.seed=0")
    slime = [sys.executable, "-m", "slime.cli.main", "train"]

    steps = [
        [sys.executable, "-m", "examples.quickstart.make_task", str(DATA), "--seed", seed.split("=")[1]],
        [*slime, "--config-name", "quickstart_sft", f"run.name=quickstart_sft-{stamp}", seed],
        [*slime, "--config-name", args.recipe, f"run.name={args.recipe}-{stamp}", *args.overrides],
    ]
    for number, command in enumerate(steps):
        shown = ["slime" if part == "slime.cli.main" else part for part in command if part not in (sys.executable, "-m")]
        sys.stdout.write(f"\n$ {' '.join(shown)}\n")
        sys.stdout.flush()
        code = subprocess.run(command).returncode
        if code:
            return code
        if number == 1:
            point_warm_start_at(Path("runs") / f"quickstart_sft-{stamp}" / "hf")
    summary = json.loads((Path("runs") / f"{args.recipe}-{stamp}" / "summary.json").read_text())
    return 0 if summary["status"] == "done" else 1


def point_warm_start_at(hf: Path) -> None:
    """data/quickstart/warm is the warm start that the recipe trains on from here on."""
    link = DATA / "warm"
    link.unlink(missing_ok=True)
    link.symlink_to(hf.resolve())


if __name__ == "__main__":
    sys.exit(main())
