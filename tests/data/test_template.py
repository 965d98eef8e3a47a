from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config import DataConfig, ModelConfig
from slime.data.template import load_tokenizer, tokenize
from slime.types import Prompt
from tests.tiny import make_tokenizer

MESSAGES = [{"role": "user", "content": "2+3"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, 80)
    return load_tokenizer(ModelConfig(path=str(path)))


def text_of(prompt, tokenizer, **cfg) -> str:
    ids = tokenize(Prompt(0, prompt, source="s"), tokenizer, DataConfig(**cfg))
    assert ids is not None
    return tokenizer.decode(ids)


def test_messages_go_through_the_chat_template_and_strings_do_not(tokenizer):
    assert text_of(MESSAGES, tokenizer) == "<user>2+3<assistant>"
    assert text_of("2+3", tokenizer) == "2+3"


def test_strings_go_through_it_where_asked(tokenizer):
    assert text_of("2+3", tokenizer, chat="always") == "<user>2+3<assistant>"


def test_too_long_is_told_apart_and_never_truncated(tokenizer):
    prompt = Prompt(0, "12345", source="s")
    assert tokenize(prompt, tokenizer, DataConfig(max_prompt_tokens=4)) is None
    assert len(tokenize(prompt, tokenizer, DataConfig(max_prompt_tokens=5)) or []) == 5


def test_tools_reach_the_template(tokenizer):
    before, tokenizer.chat_template = tokenizer.chat_template, "{% for t in tools %}{{ t.name }}{% endfor %}"
    try:
        ids = tokenize(Prompt(0, MESSAGES, tools=[{"name": "add"}]), tokenizer, DataConfig())
    finally:
        tokenizer.chat_template = before
    assert tokenizer.decode(ids) == "add"


@pytest.mark.parametrize(
    ("prompt", "chat", "template", "says"),
    [
        (MESSAGES, "never", "x", "data.chat=never takes strings only"),
        (MESSAGES, "messages", None, "the tokenizer has no chat template"),
        (
            MESSAGES,
            "messages",
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses prompt 0 of s: roles must alternate",
        ),
        (MESSAGES, "messages", "", "is empty"),
    ],
)
def test_prompts_that_cannot_be_templated(tokenizer, prompt, chat: str, template: str | None, says: str):
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError, match=says):
            text_of(prompt, tokenizer, chat=chat)
    finally:
        tokenizer.chat_template = before


def test_a_directory_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.path=.*no tokenizer can be loaded"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
