"""state.json of an iteration: what the driver itself must know to go on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slime.checkpoint.manifest import InvalidCheckpoint
from slime.observe.files import write_atomic
from slime.types import WeightVersion

NAME = "state.json"


@dataclass(frozen=True, slots=True)
class DriverState:
    """The driver's part of a checkpoint; JSON values only."""

    step: int  # completed updates
    version: WeightVersion  # of the weights in this checkpoint; whoever resumes publishes under a higher epoch
    ledger: dict[str, Any]  # Ledger.to_dict()
    trackers: dict[str, str]  # Trackers.ids(): what a tracker needs to carry on its own run
    config: dict[str, Any]  # the resolved recipe
    wall_s: float  # time spent so far, over all restarts


def write_state(directory: Path, state: DriverState) -> None:
    """Write state.json. Raises TypeError or ValueError for a value that JSON cannot hold exactly."""
    text = json.dumps(asdict(state), indent=1, allow_nan=False)
    if json.loads(text) != asdict(state):
        raise ValueError("the driver's state does not survive JSON; give plain dicts with string keys, lists, strings and numbers")
    write_atomic(directory / NAME, text + "\n")


def read_state(directory: Path) -> DriverState:
    """Read state.json. Raises InvalidCheckpoint where it is missing or not of this form."""
    try:
        fields = json.loads((directory / NAME).read_bytes())
        return DriverState(**{**fields, "version": WeightVersion(**fields["version"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidCheckpoint(f"its {NAME} cannot be read ({error!r})") from error
