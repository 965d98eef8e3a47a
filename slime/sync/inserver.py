"""The weight channel inside SGLang: the custom weight loader `slime.sync.inserver.load` and the rank's door.

SGLang is started with `--custom-weight-loader slime.sync.inserver.load`. A command comes as a weight update of one empty tensor, whose name
is the command as JSON, in the scheduler's thread of every rank, while the engine is paused:

    {"op": "learn", "socket": "/run/engine_0", "spec": "/run/model.json", "run_id": "ab12", "held": "ab12/0/7"}   held: where known
    {"op": "commit", "version": "ab12/0/8", "parent": "ab12/0/7"}      write what is staged, and audit
    {"op": "undo", "version": "ab12/0/8"}                              put back what it replaced, and audit
    {"op": "audit", "version": "ab12/0/8"}                             version, if given: of what SGLang's own update has just loaded
    {"op": "load", "path": "/run/heal.safetensors", "version": "..."}  model.load_weights of HF tensors, and audit

SGLang says "Success" whatever happens, so each reply is kept and asked for at the door: a unix socket `<socket>.<rank>` that a daemon
thread serves from `learn` on. It takes, at any time:

    {"op": "describe"}                                                       the live map
    {"op": "stage", "path": ..., "version": ..., "parent": ...}              make a version ready while the engine generates
    {"op": "result", "of": <the command's "id", else its version, else its op>}
    {"op": "drop", "version": ...}

Replies hold ok, error, version, held; of a command that audits also moves (a fingerprint of every move of the live map, 16 hexadecimal
digits each), changed (storages whose elements without a source changed unasked) and seconds. Where an engine has several models (a draft),
each call comes to each in turn; messages say which by `model`, 0 by default, in the order in which they first came.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from slime.sync.inserver_socket import Door
from slime.sync.inserver_weights import Clock, Refused, Weights
from slime.sync.records import ModelSpec

log = logging.getLogger(__name__)

BUSY_S = 20.0  # a command waits so long for staging to end
KEPT = 16  # replies of each model
Fields = dict[str, Any]


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's hook. Never raises: an exception here would kill the scheduler."""
    RANK.command(model, named_tensors)


class InserverRank:
    """What this process keeps."""

    def __init__(self) -> None:
        self._seen: list[Any] = []  # models; a model's number is its place
        self._models: dict[int, Weights] = {}  # by number; those that were learned
        self._replies: dict[tuple[int, str], Fields] = {}  # by number and key of the command
        self._door: Door | None = None
        self._busy = threading.RLock()

    # --- commands -------------------------------------------------------------------------------------------------

    def command(self, model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Run a command and keep its reply."""
        fields: Fields = {}

        def run() -> Fields:
            fields.update(_parse([name for name, _ in named_tensors]))
            if not self._busy.acquire(timeout=BUSY_S):
                raise Refused(f"{fields['op']}: staging goes on since {BUSY_S:g} s; try again")
            try:
                return self._run(model, fields)
            finally:
                self._busy.release()

        reply = answered(run)
        if not reply["ok"]:
            log.error("slime: %s was refused: %s", fields.get("op", "a command"), reply["error"])
        number = self._number(model)
        found = self._models.get(number)
        reply |= {"version": fields.get("version"), "held": found.held if found else None}
        key = (number, str(fields.get("id") or fields.get("version") or fields.get("op")))
        self._replies.pop(key, None)
        self._replies[key] = reply
        for old in [kept for kept in self._replies if kept[0] == number][:-KEPT]:
            del self._replies[old]

    def _number(self, model: Any) -> int:
        number = next((i for i, seen in enumerate(self._seen) if seen is model), len(self._seen))
        if number == len(self._seen):
            self._seen.append(model)
        return number

    def _run(self, model: Any, fields: Fields) -> Fields:
        op = fields["op"]
        if op == "learn":
            return self._learn(model, fields)
        weights = self._models.get(self._number(model))
        if weights is None:
            raise Refused(f"{op}: learn comes first")
        version = None if fields.get("version") is None else _text(fields, "version")
        opaque = None if fields.get("load") is None else _tensors(Path(_text(fields, "load")))
        seconds: dict[str, float] = {}
        if op == "commit":
            seconds = weights.commit(_text(fields, "version"), _text(fields, "parent"), opaque)
        elif op == "undo":
            seconds = weights.revert(_text(fields, "version"), opaque)
        elif op == "load":
            started = time.perf_counter()
            weights.load(_tensors(Path(_text(fields, "path"))), version)
            seconds = {"write_s": time.perf_counter() - started}
        elif op == "audit" and version is not None:
            weights.adopt(version)
        elif op != "audit":
            raise Refused(f"no command {op!r}")
        return audited(weights, seconds)

    def _learn(self, model: Any, fields: Fields) -> Fields:
        self._open(f"{_text(fields, 'socket')}.{_rank()}")  # first, so that a failure can be asked for
        started, number = time.perf_counter(), self._number(model)
        for key in [key for key in self._replies if key[0] == number]:
            del self._replies[key]  # of whoever learned before
        before = self._models.pop(number, None)  # what it knew and had staged goes, whether this succeeds or not
        if before is not None:
            before.drop()
        spec = ModelSpec.from_json(Path(_text(fields, "spec")).read_text())
        held = None if fields.get("held") is None else _text(fields, "held")
        taken = frozenset().union(*(weights.addresses for i, weights in self._models.items() if i < number))
        weights = self._models[number] = Weights(model, spec, _text(fields, "run_id"), held, taken)
        return audited(weights, {"learn_s": time.perf_counter() - started})

    def _open(self, path: str) -> None:
        if self._door is not None:
            if self._door.path == path and self._door.open:
                return
            if self._door.is_alive():
                self._door.close()
        self._door = Door(path, self.message)
        self._door.start()

    # --- messages: on the door's thread ---------------------------------------------------------------------------

    def message(self, fields: Fields) -> Fields:
        """The answer to a message at the door."""
        return answered(lambda: self._answer(fields))

    def _answer(self, fields: Fields) -> Fields:
        op, number = fields.get("op"), fields.get("model", 0)
        if op == "result":
            key = _text(fields, "of")
            reply = self._replies.get((number, key))
            if reply is None:
                raise Refused(f"no command {key!r} has run here")
            return reply
        weights = self._models.get(number)
        if weights is None:
            raise Refused(f"model {number} has not been learned")
        if op == "describe":
            return {
                "rank": _rank(),
                "models": len(self._models),
                "map": weights.map.to_json(),
                "held": weights.held,
                "staged": weights.staged.version if weights.staged else None,
                "undo": weights.undo.version if weights.undo else None,
                "on_device": weights.on_device,
            }
        with self._busy:
            if op == "stage":
                started = time.perf_counter()
                entries = weights.stage(_text(fields, "path"), _text(fields, "version"), _text(fields, "parent"))
                return {"version": fields["version"], "entries": entries, "seconds": {"stage_s": time.perf_counter() - started}}
            if op == "drop":
                version = fields.get("version")
                weights.drop(None if version is None else str(version))
                return {"version": version}
        raise Refused(f"no message {op!r}")


def answered(run: Callable[[], Fields]) -> Fields:
    """What `run` returns, or its failure: the one frame that catches everything."""
    try:
        return {"ok": True, "error": None} | run()
    except BaseException as error:  # noqa: BLE001
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def audited(weights: Weights, seconds: dict[str, float]) -> Fields:
    """A reply that says what the live weights are."""
    clock = Clock(weights.device)
    moves, changed = weights.audit()
    clock.lap("audit_s")
    return {"moves": [f"{value:016x}" for value in moves.tolist()], "changed": changed, "seconds": seconds | clock.seconds}


def _parse(names: list[str]) -> Fields:
    """The command that a call's only tensor is named by."""
    if len(names) != 1 or not names[0].startswith("{"):
        raise Refused("an update of this load_format is one empty tensor named by a command")
    fields = json.loads(names[0])
    if not isinstance(fields, dict) or not isinstance(fields.get("op"), str):
        raise Refused(f"not a command: {names[0][:200]}")
    return fields


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise Refused(f"{fields.get('op')} needs {name!r}, as a string")
    return value


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one after the other."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


RANK = InserverRank()
