"""state.json of an iteration: what the driver itself must know to go on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slime.checkpoint.manifest import InvalidCheckpoint
from slime.checkpoint.origin import Origin
from slime.observe.hashed import write_hashed
from slime.types import WeightVersion

NAME = "state.json"
FORM = 2  # of what is written; a change of its fields is a new form


@dataclass(frozen=True, slots=True)
class DriverState:
    """The driver's part of a checkpoint; JSON values only."""

    step: int  # completed updates
    version: WeightVersion  # of the weights in this checkpoint; whoever resumes publishes under a higher epoch
    ledger: dict[str, Any]  # Ledger.to_dict()
    trackers: dict[str, str]  # Trackers.ids(): what a tracker needs to carry on its own run
    config: dict[str, Any]  # the resolved recipe
    wall_s: float  # time spent so far, over all restarts
    origin: Origin  # code and data of who wrote it


def write_state(directory: Path, state: DriverState) -> None:
    """Write state.json. Raises TypeError or ValueError for a value that JSON cannot hold exactly."""
    body = {"form": FORM, **asdict(state)}
    text = json.dumps(body, indent=1, allow_nan=False)
    if json.loads(text) != body:
        raise ValueError("the driver's state does not survive JSON; give plain dicts with string keys, lists, strings and numbers")
    write_hashed(directory / NAME, (text + "\n").encode())


def read_state(directory: Path) -> DriverState:
    """Read state.json. Raises InvalidCheckpoint where it is missing, damaged or of another version of slime."""
    try:
        fields = json.loads((directory / NAME).read_bytes())
        form = fields.pop("form", 1)
        if form != FORM:
            raise InvalidCheckpoint(f"its {NAME} has form {form}, this version of slime reads {FORM}")
        return DriverState(**{**fields, "version": WeightVersion(**fields["version"]), "origin": Origin.from_dict(fields["origin"])})
    except InvalidCheckpoint:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidCheckpoint(f"its {NAME} cannot be read ({error!r})") from error
