"""Prompts to token ids, through the tokenizer's own chat template."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from jinja2 import TemplateError

from slime.config import DataConfig, ModelConfig
from slime.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # a tokenizer has one of them


def check_tokenizer(cfg: ModelConfig) -> None:
    """Raises ValueError, as `load_tokenizer` does, where the model's directory holds no tokenizer or a broken file of one.

    Quick, for a driver that loads none: transformers takes seconds to import. What only loading shows is found by who loads it.
    """
    path = Path(cfg.path)
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise _no_tokenizer(cfg, f"none of {', '.join(VOCABULARIES)} is there")
    for name in filter(lambda name: (path / name).is_file(), ("tokenizer_config.json", "tokenizer.json")):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise _no_tokenizer(cfg, f"{name} is not JSON: {error}") from error
    if (path / "tokenizer.json").is_file():
        try:
            tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise _no_tokenizer(cfg, f"tokenizer.json: {error}") from error


def load_tokenizer(cfg: ModelConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises ValueError naming model.path where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(cfg.path)
    except (OSError, ValueError, KeyError) as error:
        raise _no_tokenizer(cfg, str(error)) from error


def _no_tokenizer(cfg: ModelConfig, why: str) -> ValueError:
    return ValueError(f"model.path={cfg.path}: no tokenizer can be loaded there ({why}); put tokenizer.json beside the weights")


def tokenize(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig) -> list[int] | None:
    """Token ids of a prompt, None where it is longer than data.max_prompt_tokens.

    Messages go through the chat template (data.chat=messages), plain strings too with data.chat=always, nothing with never.
    Raises ValueError where a template is needed and the tokenizer has none or refuses the messages, and where no token is left.
    """
    where = f"prompt {prompt.ordinal} of {prompt.source}"
    text: Any = prompt.prompt
    tools: Any = prompt.tools
    if cfg.chat == "never" and not isinstance(text, str):
        raise ValueError(f"{where} is a list of messages and data.chat=never takes strings only; set data.chat=messages")
    if isinstance(text, str) and cfg.chat != "always":
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(f"data.chat={cfg.chat}: the tokenizer has no chat template for {where}; use plain strings")
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        try:
            encoded: Any = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses {where}: {error}; mend its messages, or see data.chat") from error
        ids = encoded["input_ids"]
    if not ids:
        raise ValueError(f"{where} is empty; give it at least one token")
    return list(ids) if len(ids) <= cfg.max_prompt_tokens else None
