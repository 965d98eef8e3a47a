"""Functions that a recipe names by import path, `pkg.mod:fn`."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any


def load_function(path: str, knob: str) -> Callable[..., Any]:
    """The callable at `pkg.mod:fn`; `fn` may be dotted (Class.method). The working directory is searched as sys.path has it.

    Raises ValueError naming the knob, and the module, attribute or nearest name where one of them is wrong.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{knob}={path}: write an import path as pkg.mod:fn")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise ValueError(f"{knob}={path}: module {module_name} imports {e.name}, which is not installed") from e
        raise ValueError(f"{knob}={path}: no module {e.name}; is its folder in PYTHONPATH or the working directory?") from e
    except Exception as e:
        raise ValueError(f"{knob}={path}: importing module {module_name} failed: {type(e).__name__}: {e}") from e
    at = f"module {module_name}"
    for name in attribute.split("."):
        if name not in dir(found):
            near = difflib.get_close_matches(name, dir(found), n=1)
            raise ValueError(f"{knob}={path}: {at} has no {name}" + (f"; did you mean {near[0]}?" if near else ""))
        found = getattr(found, name)
        at = f"{at}'s {name}"
    if not callable(found):
        raise ValueError(f"{knob}={path}: {at} is {type(found).__name__}, not a function")
    return found
