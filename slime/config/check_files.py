"""Files and folders that a recipe names: the model, the data, what to resume or replay, the interpreter that serves."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.config.check_serving import longest_answers
from slime.config.exits import ConfigError
from slime.config.roles import needed_roles
from slime.config.tree import nearest

DATA_SUFFIXES = (".jsonl", ".parquet")
QUICKSTART = ("data", "quickstart")  # where recipes/quickstart*.yaml find model and data
RESUME = ("auto", "never", "must")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_files(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first path that is not what the recipe takes it for."""
    _model(cfg)
    if cfg.run.only != "train":
        if not cfg.data.train:
            raise ConfigError("data.train is empty: name files of prompts, data.train=[{path: prompts.jsonl}]")
        for at, file in enumerate(cfg.data.train):
            _data_file(f"data.train.{at}.path", file.path)
        for name, chosen in cfg.data.eval.items():
            _data_file(f"data.eval.{name}.path", chosen.path)
    if cfg.run.replay is not None and not _is_replay(Path(cfg.run.replay)):
        raise ConfigError(
            f"run.replay={cfg.run.replay}: no such folder or .npz file; it is the rollouts/ that a run with rollout.dump=true wrote, or a "
            "batch of the stopped/ of a run that it stopped"
        )
    if cfg.run.resume not in RESUME and not Path(cfg.run.resume).is_dir():
        raise ConfigError(f"run.resume={cfg.run.resume}: neither {', '.join(RESUME)} nor a run's folder{nearest(cfg.run.resume, RESUME)}")
    python = cfg.rollout.engine_python
    if python is not None and shutil.which(python) is None:
        raise ConfigError(f"rollout.engine_python={python}: no such program here; give the path of the python that has SGLang")


def is_hub_id(path: str) -> bool:
    """Whether `path` names a model on the hub: org/name, where org is not a folder here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and Path(path).parts[0] not in os.listdir(".")


def model_config(cfg: SlimeConfig) -> dict[str, Any] | None:
    """config.json of the model directory; None for a hub id. Raises ConfigError where there is none or it is not JSON."""
    if is_hub_id(cfg.model.path):
        return None
    try:
        return json.loads((Path(cfg.model.path) / "config.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"model.path={cfg.model.path}: no config.json there; give a Hugging Face model directory") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path={cfg.model.path}: its config.json is not JSON ({error})") from error


def _is_replay(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".npz" and path.is_file())


def _model(cfg: SlimeConfig) -> None:
    path = cfg.model.path
    if not is_hub_id(path) and not Path(path).is_dir():
        raise ConfigError(f"model.path={path}: no such folder, and not a hub id (org/name){_relative(path)}")
    config = model_config(cfg) or {}
    longest, rope = config.get("max_position_embeddings"), config.get("rope_scaling")
    if "rollout" not in needed_roles(cfg) or not isinstance(longest, int) or rope:
        return
    for knob, tokens in longest_answers(cfg).items():
        if cfg.data.max_prompt_tokens + tokens > longest:
            raise ConfigError(
                f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {knob}={tokens} exceed the {longest} positions of the model "
                f"(max_position_embeddings in its config.json): lower one of them"
            )


def _relative(path: str) -> str:
    """Where a relative path starts, and how what the quickstart's recipes name is made."""
    if Path(path).is_absolute():
        return ""
    made = "; `make quickstart` in slime's repository makes it" if Path(path).parts[:2] == QUICKSTART else ""
    return f" (relative paths start at {os.getcwd()}){made}"


def _data_file(knob: str, path: str) -> None:
    if not path.endswith(DATA_SUFFIXES):
        raise ConfigError(f"{knob}={path}: not a {' or '.join(DATA_SUFFIXES)} file")
    if not Path(path).is_file():
        raise ConfigError(f"{knob}={path}: no such file{_relative(path)}")
    if not Path(path).stat().st_size:
        raise ConfigError(f"{knob}={path}: the file is empty")
