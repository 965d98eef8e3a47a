"""The house's rules that a machine can hold: import order, file sizes, words that are not written."""

import ast
import io
import re
import subprocess
import sys
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


# Which device it is, ask: the CPU's room, kernels and what stands with them, a rank's one helper, what hands devices out, and the checks
# of a recipe, which may ask for what one of them does not have.
ASKS_FOR_DEVICE = ("cpu/", "cluster/", "config/", "trainer/device.py")
DEVICE = re.compile(r"is_cuda|is_cpu\b|cuda\.is_available|on_triton\(|[!=]=\s*[\"'](cpu|cuda)[\"']|in \([\"'](cpu|cuda)")


@cache
def text_of(path: Path) -> str:
    return path.read_text()


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every node of a file, its module first."""
    return list(ast.walk(ast.parse(text_of(path))))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "slime"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "slime").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of slime that a file imports, at its head or inside its functions."""
    modules = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            modules += [f"slime.{alias.name}" for alias in node.names] if node.module == "slime" else [node.module or ""]
    return {module.split(".")[1] for module in modules if module.startswith("slime.")}


def wrong_imports(path: Path) -> list[str]:
    room, name = room_of(path), name_of(path)
    others = imported_rooms(path) - {room}
    if room in ("__init__", NEVER):
        return [f"{name} imports {other}" for other in others]
    wrong = [f"{name} names cpu/" for other in others if other == NEVER and room not in NAMES_CPU]
    lowest = {"layout", "config", "types"}
    return wrong + [f"{name} imports {other}" for other in others - {NEVER} if RANK[other] >= RANK[room] and not {other, room} <= lowest]


def test_imports_run_one_way() -> None:
    assert [wrong for path in FILES for wrong in wrong_imports(path)] == []


def test_package_itself_is_empty() -> None:
    assert text_of(ROOT / "slime" / "__init__.py") == ""


def test_files_are_short_and_say_what_they_are() -> None:
    assert [name_of(path) for path in FILES if len(text_of(path).splitlines()) > 400] == []
    assert [name_of(path) for path in FILES if text_of(path) and not ast.get_docstring(nodes_of(path)[0])] == []


def unwritten(path: Path) -> list[str]:
    """Print, hasattr, what catches everything and goes on, stubs."""
    wrong, name = [], name_of(path)
    for node in nodes_of(path):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "hasattr"):
            wrong.append(f"{where}: {node.func.id}")
        if isinstance(node, ast.ExceptHandler) and name not in INSERVER | OF_USERS:
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            if broad and not raises(node):
                wrong.append(f"{where}: catches everything and goes on")
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name | ast.Call) and "NotImplementedError" in ast.unparse(node.exc):
            wrong.append(f"{where}: a stub")
    return wrong


def unfinished(path: Path) -> list[str]:
    text = text_of(path)
    if "TODO" not in text and "FIXME" not in text:
        return []
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT]
    return [f"{name_of(path)}: {comment}" for comment in comments if "TODO" in comment or "FIXME" in comment]


def test_words_that_are_not_written() -> None:
    """No print, no hasattr, nothing that catches everything and goes on, no unfinished business."""
    ours = [path for path in FILES if "cpu/sglang/sgl_kernel" not in name_of(path)]  # stands in for another library, whose shape it copies
    assert [wrong for path in ours for wrong in unwritten(path) + unfinished(path)] == []


def branches_on_the_device(path: Path) -> list[str]:
    name = name_of(path)
    if name.startswith(ASKS_FOR_DEVICE) or "kernels" in path.parent.parts:
        return []
    return [f"{name}:{n}: {line.strip()}" for n, line in enumerate(text_of(path).splitlines(), 1) if DEVICE.search(line)]


def test_no_branch_on_the_device_but_where_devices_differ() -> None:
    assert [wrong for path in FILES for wrong in branches_on_the_device(path)] == []


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


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("print(1)", ": print"),
        ("x = hasattr(1, 'real')", ": hasattr"),
        ("try:\n    f()\nexcept Exception:\n    pass", ": catches everything and goes on"),
        ("try:\n    f()\nexcept:\n    pass", ": catches everything and goes on"),
        ("try:\n    f()\nexcept Exception:\n    raise", None),
        ("def f():\n    raise NotImplementedError('later')", ": a stub"),
        ("x = 1  # TODO", ": # TODO"),
        ("import slime.sync", " imports sync"),
        ("import slime.cpu", " names cpu/"),
        ("import slime.config", None),
        ("x = 1 if tensor.is_cuda else 2", ":1: x = 1 if tensor.is_cuda else 2"),
        ('if device.type == "cuda":\n    pass', ':1: if device.type == "cuda":'),
        ("import torch\nif torch.cuda.is_available():\n    pass", ":2: if torch.cuda.is_available():"),
    ],
)
def test_what_is_wrong_is_found(source: str, found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "slime" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    wrong = wrong_imports(path) + unwritten(path) + unfinished(path) + branches_on_the_device(path)
    assert wrong == [] if found is None else [each.endswith(found) for each in wrong] == [True]


@pytest.mark.e2e
@pytest.mark.parametrize("module", ["slime.train", "slime.engine.agent", "slime.rollout.manager"])
def test_what_starts_first_does_not_wait_for_torch(module: str) -> None:
    """The driver never needs it; a host agent starts its servers first, which take longer."""
    program = f"import sys, {module}; sys.exit(sorted({{'torch', 'transformers', 'megatron'}} & set(sys.modules)) or 0)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stderr
