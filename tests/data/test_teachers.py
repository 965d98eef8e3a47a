"""Sources find their teacher; a teacher that reads other tokens than the student is refused."""

import json
import re
from pathlib import Path

import pytest

from slime.config import AlgorithmConfig, ModelConfig
from slime.config.algorithm import TeacherConfig
from slime.data.teachers import check_vocabulary, same_vocabulary, teacher_of
from slime.types import NO_TEACHER
from tests.tiny import make_tiny


def taught_by(**sources: list[str]) -> AlgorithmConfig:
    return AlgorithmConfig(teachers={name: TeacherConfig(name, sources=its) for name, its in sources.items()})


def test_a_source_has_the_teacher_that_names_it() -> None:
    cfg = taught_by(math=["gsm", "aime"], code=["mbpp"])
    assert [teacher_of(source, cfg) for source in ("aime", "mbpp", "gsm")] == [0, 1, 0]


def test_a_teacher_alone_teaches_all_unless_it_names_some() -> None:
    assert teacher_of("anything", taught_by(math=[])) == 0
    with pytest.raises(ValueError, match=r"source b has no teacher \(math: a\): add it to algorithm.teachers.<name>.sources"):
        teacher_of("b", taught_by(math=["a"]))


def test_nobody_teaches_where_there_is_no_teacher() -> None:
    assert teacher_of("gsm", AlgorithmConfig()) == NO_TEACHER


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("student"), vocab=77)


def test_a_teacher_may_know_more_tokens_than_the_student(student: Path, tmp_path: Path) -> None:
    check_vocabulary(ModelConfig(str(student)), "math", str(make_tiny(tmp_path, "llama", vocab=80)))


def test_a_teacher_must_know_all_of_the_student_s_tokens(student: Path, tmp_path: Path) -> None:
    teacher = make_tiny(tmp_path, vocab=70)
    with pytest.raises(ValueError, match=r"algorithm.teachers.math.path=.*: it does not share .* to the student and none to the teacher.*"):
        check_vocabulary(ModelConfig(str(student)), "math", str(teacher))


def test_a_token_that_is_another_number_is_named(student: Path, tmp_path: Path) -> None:
    teacher = make_tiny(tmp_path, vocab=77)
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"{re.escape(repr(first))} is 20 to the student and 21 to the teacher.*choose a teacher with the same tokenizer"
    ):
        check_vocabulary(ModelConfig(str(student)), "math", str(teacher))


def test_a_teacher_without_a_tokenizer_is_named(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^algorithm.teachers.math.path=.*no tokenizer can be loaded"):
        check_vocabulary(ModelConfig(str(student)), "math", str(tmp_path))


def test_a_critic_must_share_the_vocabulary_too(student: Path, tmp_path: Path) -> None:
    same_vocabulary(ModelConfig(str(student)), str(student), "critic.path", "critic")
    critic = make_tiny(tmp_path, vocab=70)
    with pytest.raises(ValueError, match=r"^critic\.path=.*to the student and none to the critic.*choose a critic with the same tokenizer"):
        same_vocabulary(ModelConfig(str(student)), str(critic), "critic.path", "critic")
