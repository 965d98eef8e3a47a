"""manifest.json: what an iteration consists of. It is written last; an iteration without a valid one does not exist.

{"format": 2, "step": 10, "files": {"state.json": {"bytes": 812, "xxh3_128": "..."}, ...}, "sha256": "<of the rest>"}
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from slime.observe.files import write_atomic
from slime.observe.hashed import File, read_hashed

NAME = "manifest.json"
FORMAT = 2
_READERS = 8  # files hashed at once; hashing and reading release the interpreter lock


class InvalidCheckpoint(ValueError):
    """Why an iteration does not count."""


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    files: dict[str, File]  # by path relative to the iteration, "/" between folders


def describe(directory: Path, step: int, written: Mapping[str, File] = MappingProxyType({})) -> Manifest:
    """Read and hash every file below `directory`. `written` is what whoever wrote a file says that it holds, as far as known.

    Raises ValueError for a link, which would point outside the checkpoint, OSError where a file is not what was written.
    """
    paths = sorted(p for p in directory.rglob("*") if not p.is_dir() or p.is_symlink())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a plain file; a checkpoint holds files and folders only")
    names = [p.relative_to(directory).as_posix() for p in paths]
    assert NAME not in names, f"{directory} has a manifest already"
    found = dict(zip(names, _hash(paths), strict=True))
    for name, file in written.items():
        if found.get(name) != file:
            raise OSError(f"{directory / name} is not what was written to it: {_difference(file, found.get(name))}")
    return Manifest(step, found)


def _difference(written: File, found: File | None) -> str:
    if found is None:
        return "it is not there"
    sizes = f"{found.bytes} bytes instead of {written.bytes}"
    return f"{sizes if found.bytes != written.bytes else 'other content'}; do not trust this disk"


def write(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json durably. Every other file of `directory` must be durable before."""
    body = {"format": FORMAT, "step": manifest.step, "files": {n: asdict(f) for n, f in manifest.files.items()}}
    write_atomic(directory / NAME, json.dumps({**body, "sha256": _seal(body)}, indent=1) + "\n")


def read(directory: Path) -> Manifest:
    """The manifest of an iteration. Raises InvalidCheckpoint where it is missing, torn or altered."""
    path = directory / NAME
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InvalidCheckpoint(f"it has no {NAME}") from None
    except ValueError as error:
        raise InvalidCheckpoint(f"its {NAME} is torn ({error})") from error
    if not isinstance(body, dict) or body.pop("sha256", None) != _seal(body):
        raise InvalidCheckpoint(f"its {NAME} was altered (its own hash does not match)")
    if body["format"] != FORMAT:
        raise InvalidCheckpoint(f"its {NAME} has format {body['format']}, this version of slime reads {FORMAT}")
    return Manifest(body["step"], {n: File(**f) for n, f in body["files"].items()})


def verify(directory: Path, *, step: int, content: bool = True) -> Manifest:
    """Check an iteration against its manifest: the step, every file's size and, with `content`, every file's hash.

    Raises InvalidCheckpoint naming the first file that is missing, cut or altered. Files that the manifest does not name
    are ignored.
    """
    manifest = read(directory)
    if manifest.step != step:
        raise InvalidCheckpoint(f"its {NAME} speaks of step {manifest.step}")
    for name, file in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise InvalidCheckpoint(f"{name} is missing")
        if path.stat().st_size != file.bytes:
            raise InvalidCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {file.bytes}")
    if content:
        found = _hash(directory / name for name in manifest.files)
        for (name, file), actual in zip(manifest.files.items(), found, strict=True):
            if actual != file:
                raise InvalidCheckpoint(f"{name} was altered (its hash does not match)")
    return manifest


def _hash(paths: Iterable[Path]) -> list[File]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read_hashed, paths))


def _seal(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
