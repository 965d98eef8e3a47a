"""What differs between versions of SGLang: one table, read once when an engine starts.

A row holds from its version until the next row. Versions newer than NEWEST are taken to be like the last row, with a warning.
"""

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

Release = tuple[int, int, int]


@dataclass(frozen=True)
class Facts:
    """How one version of SGLang behaves where slime depends on it."""

    update_session: bool  # tensor updates must lie between /begin_weight_update and /end_weight_update
    flush_while_retracted: bool  # an update may flush while paused with requests retracted; before, that ends the server
    version_spans: bool  # meta_info.weight_versions tells which tokens came from which weights; before, only the version at the end

    def check_pause(self, pause: str, version: str, where: str) -> None:
        """Raises ValueError for a sync.pause that this version cannot do."""
        if pause == "retract" and not self.flush_while_retracted:
            raise ValueError(
                f"sync.pause=retract: {where} has SGLang {version}, which ends when it flushes with requests retracted (before "
                "0.5.21); set sync.pause to drain or in_place"
            )


TABLE: tuple[tuple[Release, Facts], ...] = (
    ((0, 5, 15), Facts(update_session=False, flush_while_retracted=False, version_spans=False)),
    ((0, 5, 19), Facts(update_session=False, flush_while_retracted=False, version_spans=True)),
    ((0, 5, 21), Facts(update_session=True, flush_while_retracted=True, version_spans=True)),
)
NEWEST = (0, 5, 23)  # up to which the last row is known to hold
OLDEST = TABLE[0][0]


def facts(version: str, where: str = "rollout.engine_python") -> Facts:
    """Facts of an SGLang version such as 0.5.23 or 0.5.15.post1. `where` says whose version it is.

    Raises ValueError for a version older than the oldest row, or one that is not a release number.
    """
    release = _release(version, where)
    if release < OLDEST:
        raise ValueError(f"{where} has SGLang {version}; slime needs {_text(OLDEST)} or newer there")
    if release > NEWEST:
        log.warning("%s has SGLang %s, newer than slime knows; it is used like %s", where, version, _text(NEWEST))
    return next(row for first, row in reversed(TABLE) if release >= first)


def _release(version: str, where: str) -> Release:
    parts = version.split("+")[0].split(".")
    try:
        major, minor, patch = (int(part) for part in parts[:3])
    except ValueError:
        raise ValueError(f"{where} has SGLang {version!r}, which is not a release number like {_text(NEWEST)}") from None
    return major, minor, patch


def _text(release: Release) -> str:
    return ".".join(map(str, release))
