"""Prompts to token ids, through the tokenizer's own chat template."""

from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slime.config import DataConfig, ModelConfig
from slime.types import Prompt


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError naming model.path where there is none."""
    try:
        return AutoTokenizer.from_pretrained(cfg.path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model.path={cfg.path}: no tokenizer can be loaded there ({error}); put tokenizer.json beside the weights"
        ) from error


def tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> list[int] | None:
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
