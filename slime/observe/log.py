"""Where log messages go: all of them into a file of the run, warnings also to the console as one clear line."""

import logging
from collections.abc import Callable
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _Console(logging.Handler):
    """Hands the first line of a warning to `show`; the file has the rest. Python's own `warnings` stay in the file."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "py.warnings":
            self.show(record.getMessage().partition("\n")[0])


def set_up(run_dir: Path, warn: Callable[[str], None]) -> Path:
    """Send the root logger to `run_dir`/logs/driver.log (INFO and above, appended to) and warnings to `warn`.

    `warn` is `Console.warning`, or anything that takes one line. Handlers of an earlier call or of a library are replaced,
    so that nothing else writes to the terminal. Returns the path of the file.
    """
    path = run_dir / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(_Console(warn))
    logging.captureWarnings(True)
    return path
