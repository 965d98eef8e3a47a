"""The house's rules that a machine can hold: import order, file sizes, words that are not written."""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "slime").rglob("*.py"))
# Lower ranks are imported by higher ones; rooms of one rank do not know one another.
RANKS = (
    ("types", "layout", "config"),
    ("models", "algorithms", "data", "cluster", "observe"),
    ("sync",),
    ("engine",),
    ("rollout", "trainer", "checkpoint"),
    ("run", "resume", "restarts"),
    ("start",),
    ("train",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
NEVER = "cpu"  # imports nothing of slime and is named in two places only
NAMES_CPU = ("engine", "trainer")
INSERVER = {"sync/inserver.py"}  # runs inside SGLang, whose frame may catch everything
OF_USERS = {"rollout/rewards/judgement.py"}  # calls a user's function, which may raise anything


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "slime"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "slime").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of slime that a file imports, at its head or inside its functions."""
    modules = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            modules += [f"slime.{alias.name}" for alias in node.names] if node.module == "slime" else [node.module or ""]
    return {module.split(".")[1] for module in modules if module.startswith("slime.")}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    others = imported_rooms(path) - {room}
    if room in ("__init__", NEVER):
        assert not others
        return
    for other in others:
        if other == NEVER:
            assert room in NAMES_CPU, f"{name_of(path)} names cpu/"
        else:
            assert RANK[other] < RANK[room] or {other, room} <= {"layout", "config", "types"}, f"{name_of(path)} imports {other}"


def test_package_itself_is_empty() -> None:
    assert (ROOT / "slime" / "__init__.py").read_text() == ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not text or ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_words_that_are_not_written(path: Path) -> None:
    """No print, no hasattr, nothing that catches everything and goes on, no unfinished business."""
    text = path.read_text()
    if "cpu/sglang/sgl_kernel" in name_of(path):
        return  # stands in for another library, whose shape it copies
    for node in ast.walk(tree_of(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "hasattr"), f"{where}: {node.func.id}"
        if isinstance(node, ast.ExceptHandler) and name_of(path) not in INSERVER | OF_USERS:
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            assert not broad or raises(node), f"{where}: catches everything and goes on"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name | ast.Call):
            assert "NotImplementedError" not in ast.unparse(node.exc), f"{where}: a stub"
    if "TODO" not in text and "FIXME" not in text:
        return
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT]
    assert not [comment for comment in comments if "TODO" in comment or "FIXME" in comment]


def raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler's last statement raises."""
    return isinstance(handler.body[-1], ast.Raise)


def test_every_room_has_a_rank() -> None:
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "slime").iterdir() if not path.name.startswith("__")}
    assert rooms - {NEVER} <= set(RANK), "a room that the import order does not know"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import slime.run", {"run"}),
        ("from slime import types, layout", {"types", "layout"}),
        ("def f():\n    from slime.engine.client import EngineClient", {"engine"}),
        ("import os", set()),
    ],
)
def test_imports_are_found(source: str, rooms: set[str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(source)
    assert imported_rooms(tmp_path / "x.py") == rooms
