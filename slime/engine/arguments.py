"""SGLang's server arguments as its own command line knows them, and the recipe's `rollout.sglang` checked against them.

The list is read once by a subprocess in the engine's interpreter (about 10 s of imports) and kept on disk by interpreter and version.
"""

import difflib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slime.config.check_serving import FROM_KNOBS
from slime.cpu import serving

LIST_S = 180.0  # for the list; a cold file system is slow
ASK_VERSION = "import importlib.metadata as m; print(m.version('sglang'))"

OWNED = {
    **{name: f"set {knob}" for name, knob in FROM_KNOBS.items()},
    "host": "engines listen on their node's address",
    "port": "ports are chosen on each host",
    "nccl_port": "ports are chosen on each host",
    "dist_init_addr": "a server lives on one host",
    "nnodes": "a server lives on one host",
    "node_rank": "a server lives on one host",
    "api_key": "keys are made for each run",
    "admin_api_key": "keys are made for each run",
    "config": "give each argument as rollout.sglang.<field>",
    "pp_size": "the devices of a server are rollout.tensor_parallel",
    "dp_size": "set rollout.engines",
    "base_gpu_id": "devices come from the placement",
    "weight_version": "weights are labelled by the weight channel",
    "enable_deterministic_inference": "set run.deterministic",
    "skip_tokenizer_init": "answers carry their text",
}


@dataclass(frozen=True)
class Argument:
    """One server argument: how it is written on the command line and what it takes."""

    name: str
    option: str  # --name
    form: str  # value | values | flag | switch
    type: str  # str | int | float | any
    choices: list[Any] | None
    default: Any


@dataclass(frozen=True)
class Known:
    """All server arguments of one SGLang."""

    version: str
    arguments: dict[str, Argument]


def known_arguments(python: str | None = None) -> Known:
    """The arguments that SGLang takes in interpreter `python` (by default this one).

    Raises ValueError naming rollout.engine_python where SGLang cannot be imported there.
    """
    python = python or this_python()
    version = _run(python, ["-c", ASK_VERSION], 60.0).strip()
    kept = cache_dir() / f"sglang-{version}-{hashlib.sha256(python.encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return _parse(kept.read_text())
    known = _parse(_run(python, ["-c", Path(__file__).with_name("inquire.py").read_text()], LIST_S))
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"version": known.version, "arguments": [asdict(a) for a in known.arguments.values()]}))
    partial.replace(kept)
    return known


def this_python() -> str:
    """The interpreter that runs slime."""
    return sys.executable


def check(overrides: Mapping[str, Any], known: Known) -> None:
    """Raises ValueError for a name that SGLang does not have, a value that it does not take, and arguments that slime sets itself."""
    for name, value in overrides.items():
        if name in OWNED:
            raise ValueError(f"rollout.sglang.{name} is set by slime: {OWNED[name]}")
        if name not in known.arguments:
            near = difflib.get_close_matches(name, known.arguments, n=1)
            hint = f"; did you mean rollout.sglang.{near[0]}?" if near else ""
            raise ValueError(f"rollout.sglang.{name}: SGLang {known.version} has no such server argument{hint}")
        if value is not None:
            _check_value(known.arguments[name], value)


def command_line(values: Mapping[str, Any], known: Known) -> list[str]:
    """Checked values as command-line words. None leaves an argument at SGLang's default."""
    words: list[str] = []
    for name, value in values.items():
        argument = known.arguments[name]
        if value is None:
            continue
        if argument.form == "flag":
            words += [argument.option] if value else []
        elif argument.form == "switch":
            words.append(argument.option if value else f"--no-{argument.option[2:]}")
        elif argument.form == "values":
            words += [argument.option, *map(str, value)]
        else:
            words.append(f"{argument.option}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return words


def _check_value(argument: Argument, value: Any) -> None:
    where = f"rollout.sglang.{argument.name}={value}"
    if argument.form in ("flag", "switch"):
        if not isinstance(value, bool):
            raise ValueError(f"{where}: takes true or false")
        return
    if argument.form == "values" and not isinstance(value, list):
        raise ValueError(f"{where}: takes a list, such as [{value}]")
    for item in value if argument.form == "values" else [value]:
        if not _fits(argument.type, item):
            raise ValueError(f"{where}: takes {NAMES[argument.type]}, not {type(item).__name__}")
        if argument.choices is not None and item not in argument.choices:
            near = difflib.get_close_matches(str(item), [str(c) for c in argument.choices], n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(map(str, argument.choices))}"
            raise ValueError(f"{where}: not a choice of SGLang; {hint}")


NAMES = {"int": "a whole number", "float": "a number", "str": "a string", "any": "a string, number, list or mapping"}


def _fits(type_name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    takes: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "any": (str, int, float, list, dict)}
    return isinstance(value, takes[type_name])


def _parse(text: str) -> Known:
    found = json.loads(text)
    return Known(found["version"], {a["name"]: Argument(**a) for a in found["arguments"]})


def _run(python: str, arguments: list[str], timeout_s: float) -> str:
    """Standard output of the interpreter. It sees no GPU: what the list says must not depend on the host that asks."""
    environment = os.environ | serving.environment(deterministic=False)
    try:
        done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, cwd="/")
    except OSError as error:
        raise ValueError(f"rollout.engine_python={python}: cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"rollout.engine_python={python}: importing SGLang took longer than {timeout_s:g} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"rollout.engine_python={python}: SGLang cannot be used there ({last})")
    return done.stdout


def cache_dir() -> Path:
    """Where slime keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime"
