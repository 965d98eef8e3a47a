"""Does the quickstart learn? Three seeds, and a control whose rewards are shuffled; a table, and benchmarks/results/quickstart.json.

    python benchmarks/quickstart.py [--recipe quickstart] [--seeds 0 1 2]

Held-out accuracy must rise by at least 30 points on every seed and by less than 5 in the control.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONTROL = ["reward.fn=examples.quickstart.control:shuffled", "reward.signature=group", "data.eval.heldout.reward=exact"]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = [run(args.recipe, seed, control=False) for seed in args.seeds] + [run(args.recipe, args.seeds[0], control=True)]
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.recipe}.json").write_text(json.dumps(rows, indent=1) + "\n")
    learned = all(row["points"] >= 30 for row in rows if not row["control"])
    honest = all(row["points"] < 5 for row in rows if row["control"])
    return 0 if learned and honest else 1


def run(recipe: str, seed: int, control: bool) -> dict:
    """One quickstart from its task to its summary."""
    begun = time.time()
    command = [sys.executable, "-m", "examples.quickstart", "--recipe", recipe, f"run.seed={seed}"]
    subprocess.run(command + (CONTROL if control else []), check=True)
    newest = max(Path("runs").glob(f"{recipe}-*/summary.json"), key=lambda p: p.stat().st_mtime)
    assert newest.stat().st_mtime > begun, "the quickstart wrote no summary"
    summary = json.loads(newest.read_text())
    lines = [json.loads(line) for line in (newest.parent / "metrics.jsonl").read_text().splitlines()]
    before, after = summary["eval_before"]["heldout"], summary["eval_after"]["heldout"]
    return {
        "recipe": recipe,
        "seed": seed,
        "control": control,
        "before": before,
        "after": after,
        "points": 100 * (after - before),
        "wall_s": time.time() - begun,
        "step_s": median(lines, "time/step_s"),
        "idle_frac": median(lines, "time/idle_frac"),
        "mismatch_max": max(line["mismatch/logprob_abs_diff"] for line in lines[1:]),
        "client_cpu_us_per_token": median(lines, "rollout/cpu_us_per_token"),
    }


def median(lines: list[dict], name: str) -> float:
    values = sorted(line[name] for line in lines if name in line)
    return values[len(values) // 2]


def show(rows: list[dict]) -> None:
    table = Table(title="quickstart: greedy accuracy on held-out prompts")
    for column in ("seed", "rewards", "before", "after", "points", "wall s", "step s", "idle", "mismatch max", "client µs/token"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            str(r["seed"]),
            "shuffled" if r["control"] else "true",
            f"{r['before']:.1%}",
            f"{r['after']:.1%}",
            f"{r['points']:+.1f}",
            f"{r['wall_s']:.0f}",
            f"{r['step_s']:.2f}",
            f"{r['idle_frac']:.1%}",
            f"{r['mismatch_max']:.1e}",
            f"{r['client_cpu_us_per_token']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
