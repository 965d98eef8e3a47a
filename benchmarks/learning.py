"""Does every recipe learn? Each of the family on three seeds, from one warm start a seed; a table, curves, what distillation saves.

    python -m benchmarks.learning [--only ppo opd_full] [--seeds 0 1 2] [--folder runs/learning]

A run is the recipe as it is, with an evaluation after every update, in a folder of its seed; what has ended is not run again, what was
interrupted goes on. Held-out accuracy must rise by the margin of the recipe on every seed. Student tokens until 95 % of the teacher's
accuracy are shown for the recipes that have the same warm start and the same prompts: to be reported, whatever they are.

Writes its runs of these seeds (commits, curves) into benchmarks/learning.json, beside those of other recipes and seeds that are there, and,
where none is missing, the tables in docs/algorithms.md. Exit code 1 where a recipe misses its margin. All of it takes about two hours on
two cores.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "learning.json"
PAGE = ROOT / "docs" / "algorithms.md"
BEGIN, END = "<!-- learning: written by `make learn` -->", "<!-- end of learning -->"
SEEDS = (0, 1, 2)
OF_TEACHER = 0.95
# recipe -> points by which every evaluation set must rise
MARGINS = {
    **dict.fromkeys(("sft", "grpo", "rloo", "reinforce_pp", "ppo", "gspo", "cispo", "dapo"), 30.0),
    **dict.fromkeys(("opd_sampled", "opd_topk", "opd_full", "opd_multi_teacher"), 30.0),
}
ALONE = ("sft",)  # without engines: what it ends with is evaluated afterwards
COMPARED = ("opd_full", "opd_topk", "opd_sampled", "grpo", "ppo")  # student tokens until the teacher's accuracy


@dataclass
class Learned:
    """One run."""

    recipe: str
    seed: int
    commit: str  # at which it ended
    wall_s: float
    before: dict[str, float]  # accuracy by evaluation set
    after: dict[str, float]
    tokens: list[int] = field(default_factory=list)  # that the policy was trained on, until each update: 0 while a critic warms up
    curves: dict[str, list[float]] = field(default_factory=dict)  # accuracy after each update

    @property
    def rise(self) -> float:
        """Points of the evaluation set that rose least."""
        return min(100 * (self.after[name] - self.before[name]) for name in self.after)

    def tokens_to(self, accuracy: float) -> int | None:
        """Student tokens after which every evaluation set was at `accuracy` for the first time."""
        reached = [all(curve[i] >= accuracy for curve in self.curves.values()) for i in range(len(self.tokens))]
        return next((tokens for tokens, there in zip(self.tokens, reached, strict=True) if there), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MARGINS), default=list(MARGINS), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    found: list[Learned] = []
    teachers: dict[int, float] = {}
    for seed in args.seeds:
        folder = (args.folder / f"seed_{seed}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "examples.teachers", "--seed", str(seed)], folder)
        teachers[seed] = evaluated(folder, "teacher", "data/quickstart/teacher", seed)
        found += [learn(recipe, seed, folder) for recipe in args.only]
    console = Console(width=120)
    console.print(table(found))
    console.print(comparison(found, teachers))
    missed = [learned for learned in found if learned.rise < MARGINS[learned.recipe]]
    for learned in missed:
        console.print(f"missed  {learned.recipe}, seed {learned.seed}: {learned.rise:+.1f} points, to be {MARGINS[learned.recipe]:+g}")
    write(found, teachers)
    return 1 if missed else 0


def learn(recipe: str, seed: int, folder: Path) -> Learned:
    """Run a recipe to its end, unless it has been, and read what it learned."""
    directory = folder / "runs" / recipe
    commit = folder / f"{recipe}.commit"
    if not ended(directory):
        evaluating = [] if recipe in ALONE else ["run.eval_every=1"]
        train(folder, ["--config-name", recipe, f"run.name={recipe}", f"run.seed={seed}", *evaluating])
        commit.write_text(described())
    summary = json.loads((directory / "summary.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    learned = Learned(recipe, seed, commit.read_text(), summary["wall_s"], summary["eval_before"], summary["eval_after"])
    total = 0
    for line in lines:
        learned.tokens.append(total := total + int(line.get("train/tokens", 0)))
    learned.curves = {name: [line[f"eval/{name}/accuracy"] for line in lines] for name in learned.after}
    if recipe in ALONE:
        paths = {"before": "data/quickstart/model", "after": f"runs/{recipe}/hf"}
        learned.before, learned.after = ({"heldout": evaluated(folder, f"{recipe}_{when}", path, seed)} for when, path in paths.items())
    return learned


def evaluated(folder: Path, name: str, model: str, seed: int) -> float:
    """Held-out accuracy of a model: what a run that begins with it finds before its first update, here the only one."""
    directory = folder / "runs" / f"evaluated_{name}"
    if not ended(directory):
        small = ["run.steps=1", "trainer.warmup_steps=0", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2"]
        train(folder, ["--config-name", "quickstart", *small, f"run.name={directory.name}", f"run.seed={seed}", f"model.path={model}"])
    return json.loads((directory / "summary.json").read_text())["eval_before"]["heldout"]


def ended(directory: Path) -> bool:
    summary = directory / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["status"] == "done"


def train(folder: Path, arguments: list[str]) -> None:
    run([sys.executable, "-m", "slime.cli.main", "train", *arguments], folder)


def described() -> str:
    """The commit of this tree, with -dirty where files differ from it."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()


def run(command: list[str], folder: Path) -> None:
    """Raises CalledProcessError where it fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=True)


# --- what is shown and written --------------------------------------------------------------------------------------------


def rows(found: list[Learned]) -> list[list[str]]:
    """recipe, updates, accuracy before and after by seed, the least rise and its margin, seconds a run."""
    made = []
    for recipe in dict.fromkeys(learned.recipe for learned in found):
        runs = [learned for learned in found if learned.recipe == recipe]
        before = " ".join(f"{100 * min(learned.before.values()):.1f}" for learned in runs)
        after = " ".join(f"{100 * min(learned.after.values()):.1f}" for learned in runs)
        least, margin = min(learned.rise for learned in runs), MARGINS[recipe]
        wall = sum(learned.wall_s for learned in runs) / len(runs)
        made.append([recipe, str(len(runs[0].tokens)), before, after, f"{least:+.1f}", f"{margin:+g}", f"{wall:.0f}"])
    return made


HEADINGS = ["recipe", "updates", "before, %", "after, %", "least rise", "margin", "seconds"]


def table(found: list[Learned]) -> Table:
    shown = Table(title="Held-out accuracy, a number a seed; of several evaluation sets the lowest")
    for heading in HEADINGS:
        shown.add_column(heading, no_wrap=True)
    for row in rows(found):
        shown.add_row(*row)
    return shown


def compared(found: list[Learned], teachers: dict[int, float]) -> dict[str, list[int | None]]:
    """Student tokens until 95 % of the teacher's accuracy, a number a seed."""
    return {
        recipe: [learned.tokens_to(OF_TEACHER * teachers[learned.seed]) for learned in found if learned.recipe == recipe]
        for recipe in COMPARED
        if any(learned.recipe == recipe for learned in found)
    }


def comparison(found: list[Learned], teachers: dict[int, float]) -> Table:
    shown = Table()
    shown.add_column("recipe")
    shown.add_column(f"student tokens until {OF_TEACHER:.0%} of the teacher's accuracy, a number a seed", justify="right")
    for recipe, tokens in compared(found, teachers).items():
        shown.add_row(recipe, " ".join("never" if n is None else str(n) for n in tokens))
    return shown


def write(found: list[Learned], teachers: dict[int, float]) -> None:
    """The curves, beside those of other runs that are there, and the page's tables where none is missing."""
    found, teachers = with_recorded(found, teachers)
    tokens = compared(found, teachers)
    content: dict[str, Any] = {
        "seeds": sorted({learned.seed for learned in found}),
        "teacher_accuracy": {str(seed): accuracy for seed, accuracy in teachers.items()},
        "tokens_to_95_percent_of_teacher": tokens,
        "runs": [asdict(learned) | {"rise": learned.rise} for learned in found],
    }
    RESULTS.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if len(found) == len(MARGINS) * len(SEEDS):
        write_page(found, tokens)


def with_recorded(found: list[Learned], teachers: dict[int, float]) -> tuple[list[Learned], dict[int, float]]:
    """Also the runs and teachers of benchmarks/learning.json that were not made anew; by seed, in the order of MARGINS."""
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": [], "teacher_accuracy": {}}
    recorded = [Learned(**{name: value for name, value in run.items() if name != "rise"}) for run in content["runs"]]
    runs = {(learned.seed, learned.recipe): learned for learned in [*recorded, *found]}
    known = {int(seed): accuracy for seed, accuracy in content["teacher_accuracy"].items()} | teachers
    return [runs[seed, recipe] for seed in SEEDS for recipe in MARGINS if (seed, recipe) in runs], dict(sorted(known.items()))


def write_page(found: list[Learned], tokens: dict[str, list[int | None]]) -> None:
    lines = [f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows(found))]
    counted = [f"| {recipe} | {', '.join(str(n or 'never') for n in numbers)} |" for recipe, numbers in tokens.items()]
    part = [
        BEGIN,
        "",
        *lines,
        "",
        f"| recipe | student tokens until {OF_TEACHER:.0%} of the teacher's accuracy |",
        "| --- | --- |",
        *counted,
    ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join([*part, "", END]) + rest.partition(END)[2])


if __name__ == "__main__":
    sys.exit(main())
