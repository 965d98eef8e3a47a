"""`slime report RUN_DIR`: write a run's report.html again, from its metrics and samples."""

import argparse
import sys
from pathlib import Path

from slime.config.exits import ConfigError
from slime.observe.report import write_report


def main(argv: list[str]) -> None:
    """Raises ConfigError for a folder that holds no run."""
    parser = argparse.ArgumentParser(prog="slime report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a run's directory, such as runs/quickstart")
    run_dir = parser.parse_args(argv).run_dir
    if not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(f"slime report {run_dir}: no metrics.jsonl there; give a run's directory")
    write_report(run_dir)
    sys.stdout.write(f"{run_dir / 'report.html'}\n")
