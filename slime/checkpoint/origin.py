"""What a run is made from beside its recipe: the code that computes, and its data by content. Kept in every checkpoint."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.data.fingerprint import fingerprint

PACKAGES = ("slime-rl", "torch", "megatron-core", "sglang", "ray", "transformers")
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A data file as it was: where, and the fingerprint of its content."""

    path: str
    bytes: int
    sha256: str

    def same_content(self, other: "KnownFile") -> bool:
        return (self.bytes, self.sha256) == (other.bytes, other.sha256)


@dataclass(frozen=True, slots=True)
class Origin:
    """Code and data of a run."""

    code: dict[str, str] = field(default_factory=dict)  # name -> version, see `code_versions`
    data: list[KnownFile] = field(default_factory=list)  # the files of data.train in their order; [] where batches are replayed

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Origin":
        """Of dataclasses.asdict."""
        return cls(dict(values["code"]), [KnownFile(**file) for file in values["data"]])


def origin_of(cfg: SlimeConfig) -> Origin:
    """The origin of a run that starts now. Raises OSError for a data file that cannot be read."""
    files = [] if cfg.run.only == "train" else [file.path for file in cfg.data.train]
    return Origin(code_versions(), [KnownFile(path, **asdict(fingerprint(Path(path)))) for path in files])


def code_versions() -> dict[str, str]:
    """Name -> version of slime and of the libraries that it computes with; `commit` where slime is a git checkout. What is not installed
    here (engines may run by another interpreter) is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = git_commit(PACKAGE.parent)
    return found | ({"commit": commit} if commit else {})


def git_commit(checkout: Path) -> str | None:
    """The commit that is checked out in a folder, without asking git; None where the folder is no checkout. Changes that are not committed
    do not show."""
    git = checkout / ".git"
    try:
        if git.is_file():  # a worktree: "gitdir: PATH"
            git = checkout / git.read_text().split(":", 1)[1].strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        if (common / ref).is_file():
            return (common / ref).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError, IndexError):
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)
