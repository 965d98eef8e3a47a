"""Who teaches a sample, and whether the teacher reads the student's token ids as the student does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slime.config import AlgorithmConfig, ModelConfig
from slime.data.template import load_tokenizer
from slime.types import NO_TEACHER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # tokens that an error names


def teacher_of(source: str, cfg: AlgorithmConfig) -> int:
    """Position in algorithm.teachers of who teaches a source; NO_TEACHER where nothing is distilled. Raises ValueError for a source that
    nobody teaches."""
    if not cfg.teachers:
        return NO_TEACHER
    for position, teacher in enumerate(cfg.teachers.values()):
        if source in teacher.sources or (len(cfg.teachers) == 1 and not teacher.sources):
            return position
    taught = ", ".join(f"{name}: {', '.join(teacher.sources)}" for name, teacher in cfg.teachers.items())
    raise ValueError(f"source {source} has no teacher ({taught}): add it to algorithm.teachers.<name>.sources")


def check_vocabulary(student: ModelConfig, name: str, path: str) -> None:
    """`same_vocabulary` for a teacher."""
    same_vocabulary(student, path, f"algorithm.teachers.{name}.path", "teacher")


def same_vocabulary(student: ModelConfig, path: str, knob: str, what: str) -> None:
    """Raises ValueError where a token of the student is another one, or none, to the model in `path`, a teacher or a critic, and where
    there is no tokenizer. `knob` names the path."""
    own, theirs = load_tokenizer(student).get_vocab(), _tokenizer(path, knob).get_vocab()
    if differing := [token for token, number in own.items() if theirs.get(token) != number]:
        said = _listed([f"{token!r} is {own[token]} to the student and {theirs.get(token, 'none')} to the {what}" for token in differing])
        raise ValueError(f"{knob}={path}: it does not share the student's vocabulary: {said}; choose a {what} with the same tokenizer")


def _tokenizer(path: str, knob: str) -> "PreTrainedTokenizerBase":
    try:
        return load_tokenizer(ModelConfig(path=path))
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", knob, 1)) from error


def _listed(said: Sequence[str]) -> str:
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more
