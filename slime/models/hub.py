"""A model that the user names by its Hugging Face id is downloaded once, by the driver, before anything starts."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from slime.config.check_files import is_hub_id

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def local_directory(path: str, knob: str = "model.path", cache: Path | None = None) -> Path:
    """The directory that a knob names: itself, or the snapshot of a hub id (`organisation/name`) in `cache` (by default the hub's own),
    which every rank and engine host has to see. Raises ValueError where it is neither or the download fails."""
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise ValueError(f"{knob}={path}: no such directory, and not a hub id (organisation/name)")
    try:
        return Path(snapshot_download(path, cache_dir=cache, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{knob}={path}: no such directory, and not to be had from the hub: {error}") from error
