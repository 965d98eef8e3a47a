"""Who teaches a sample, and whether the teacher reads the student's token ids as the student does."""

import json
from collections.abc import Sequence
from pathlib import Path
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
    taught = "; ".join(f"{name}: {', '.join(teacher.sources)}" for name, teacher in cfg.teachers.items())
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


def differing_texts(ids: Sequence[int], of_student: Sequence[str], of_teacher: Sequence[str]) -> str:
    """What a server reads otherwise than the student's tokenizer, in words; empty where that is nothing. Blanks around a text do not count:
    how they are tidied up is a tokenizer's setting, and no other vocabulary."""
    if len(of_teacher) != len(ids):
        return f"it was asked about {len(ids)} tokens and spoke of {len(of_teacher)}"
    pairs = [(number, a, b) for number, a, b in zip(ids, of_student, of_teacher, strict=True) if a.strip() != b.strip()]
    return _listed([f"{number} is {a!r} to the student and {b!r} to the teacher" for number, a, b in dict.fromkeys(pairs)])


def vocabulary_size(name: str, path: str) -> int:
    """Rows of a teacher's embedding, by its config.json. Raises ValueError where that does not say."""
    file, found = Path(path) / "config.json", None
    try:
        config = json.loads(file.read_text())
        found = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"algorithm.teachers.{name}.path={path}: {file.name} does not say the vocab_size ({error})") from error
    if not isinstance(found, int):
        raise ValueError(f"algorithm.teachers.{name}.path={path}: {file.name} has the vocab_size {found!r}; give a whole number")
    return found


def _tokenizer(path: str, knob: str) -> "PreTrainedTokenizerBase":
    try:
        return load_tokenizer(ModelConfig(path=path))
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", knob, 1)) from error


def _listed(said: Sequence[str]) -> str:
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more
