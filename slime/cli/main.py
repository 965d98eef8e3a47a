"""`slime COMMAND ...`: the entry point. A command's module is imported when it is called."""

import importlib
import os
import signal
import sys
from types import FrameType

from slime.cli.endings import exiting
from slime.config.exits import ConfigError
from slime.config.tree import nearest

COMMANDS = {
    "train": "run a recipe: rollouts, updates, weight sync, evaluation, checkpoints, export",
    "convert": "a Hugging Face directory into a megatron-core checkpoint or back, proven to the bit",
    "report": "write a run's report.html again",
    "sync": "the history of a run's weights: inspect, verify, replay, fold",
}


def main() -> None:
    """Run the sub-command that sys.argv names; exits with a code of slime.config.exits."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.path.insert(0, os.getcwd())  # import paths in recipes start there, as they do for `python -m`
    with exiting():
        command, *rest = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            sys.stdout.write(usage())
            return
        if command not in COMMANDS:
            raise ConfigError(f"slime {command}: no such command; there are {', '.join(COMMANDS)}{nearest(command, list(COMMANDS))}")
        importlib.import_module(f"slime.cli.{command}").main(rest)


def usage() -> str:
    """What `slime --help` prints."""
    commands = "\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items())
    return f"slime: RL post-training for LLMs\n\n{commands}\n\nslime COMMAND --help says more.\n"


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like Ctrl-C, so that everything started is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
