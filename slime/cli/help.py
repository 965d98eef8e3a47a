"""What `slime train --help` prints: usage, Hydra's flags in brief, exit codes, every knob with its line."""

import shutil
import textwrap

from slime.config.exits import MEANING
from slime.config.table import as_text
from slime.config.tree import knobs

USAGE = """\
slime train --config-name RECIPE [key=value ...]

Run a recipe to its end: rollouts from SGLang, updates by megatron-core, weight sync, evaluation, checkpoints, a Hugging Face export.

  slime train --config-name quickstart                               a recipe that comes with slime
  slime train --config-name quickstart trainer.lr=5e-4 run.seed=1    with overrides
  slime train --config-name quickstart run.dry_run=true              print the resolved recipe and the resource plan, start nothing
  slime train --config-name mine --config-dir my_recipes             a recipe of yours, `defaults: [base, _self_]` and what differs
  slime train --config-name quickstart --cfg job                     what Hydra composes
  slime train --config-name quickstart --multirun run.seed=0,1,2     several runs
  slime train --hydra-help                                           Hydra's other flags

Options of other libraries go by their own names: rollout.sglang.<field>=... (server arguments) and trainer.megatron.<field>=...
(TransformerConfig, DistributedDataParallelConfig, OptimizerConfig). HYDRA_FULL_ERROR=1 adds tracebacks to errors.
"""


def train_help() -> str:
    """The whole text, wrapped to the terminal."""
    width = max(80, min(shutil.get_terminal_size().columns, 140))
    codes = "\n".join(f"  {code:3}  {meaning}" for code, meaning in MEANING.items())
    return f"{USAGE}\nExit codes:\n{codes}\n\nKnobs:\n{_knob_lines(width)}"


def _knob_lines(width: int) -> str:
    lines, group = [], ""
    for knob in knobs():
        head = knob.path.partition(".")[0]
        if head != group:
            lines.append("")
            group = head
        lines.append(f"  {knob.path}={as_text(knob.default)}   ({knob.values})")
        lines += textwrap.wrap(knob.doc, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"
