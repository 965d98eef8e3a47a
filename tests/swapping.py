"""`python -m tests.swapping ARGUMENTS` is `slime` with cluster.share=swap allowed on a CPU, whose engines keep the memory that they are
asked to give up: everything else of a turn happens."""

import sys

import slime.config.checks
import slime.start
from slime.cli.main import main


def check_nothing(*_: object) -> None:
    """In place of the checks that refuse it."""


if __name__ == "__main__":
    slime.config.checks.check_share = check_nothing
    slime.start.check_device = check_nothing
    sys.exit(main())
