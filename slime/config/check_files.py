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
    if cfg.run.replay is not None and not Path(cfg.run.replay).is_dir():
        raise ConfigError(f"run.replay={cfg.run.replay}: no such folder; it is the rollouts/ that a run with rollout.dump=true wrote")
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


def _model(cfg: SlimeConfig) -> None:
    path = cfg.model.path
    if not is_hub_id(path) and not Path(path).is_dir():
        raise ConfigError(f"model.path={path}: no such folder, and not a hub id (org/name){_relative(path)}")
    config = model_config(cfg) or {}
    if cfg.rollout.quantization == "fp8":
        _fp8_blocks(cfg, config)
    longest, rope = config.get("max_position_embeddings"), config.get("rope_scaling")
    if "rollout" not in needed_roles(cfg) or not isinstance(longest, int) or rope:
        return
    for knob, tokens in longest_answers(cfg).items():
        if cfg.data.max_prompt_tokens + tokens > longest:
            raise ConfigError(
                f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {knob}={tokens} exceed the {longest} positions of the model "
                f"(max_position_embeddings in its config.json): lower one of them"
            )


def _fp8_blocks(cfg: SlimeConfig, config: dict[str, Any]) -> None:
    """SGLang divides matrices among ranks, and fuses them, by whole blocks."""
    tp, block = cfg.rollout.tensor_parallel, 128
    heads, hidden = config.get("num_attention_heads", 1), config.get("hidden_size", block)
    head = config.get("head_dim") or hidden // heads
    sizes = {"hidden_size": (hidden, 1)}
    if "kv_lora_rank" not in config:
        groups = config.get("num_key_value_heads") or heads
        sizes |= {"num_attention_heads x head_dim": (heads * head, tp), "num_key_value_heads x head_dim": (groups * head, min(tp, groups))}
    elif config.get("q_lora_rank"):  # SGLang joins q_a_proj with kv_a_proj_with_mqa
        sizes |= {"q_lora_rank": (config["q_lora_rank"], 1)}
    among_experts = max(1, tp // int(cfg.rollout.sglang.get("ep_size") or 1))
    for name, ranks in (("intermediate_size", tp), ("moe_intermediate_size", among_experts)):
        sizes |= {name: (config[name], ranks)} if config.get(name) else {}
    for name, (size, ranks) in sizes.items():
        if size % (block * ranks):
            among = f" for each of rollout.tensor_parallel={ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"rollout.quantization=fp8: {name}={size} in {cfg.model.path}/config.json is no whole number of blocks of {block}{among}: "
                f"set rollout.quantization=none{', or lower rollout.tensor_parallel' if ranks > 1 and not size % block else ''}"
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
