"""Served teachers: each sample of a batch is shown to the teacher of its source, while the engines still answer others."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.data.teachers import differing_texts, teacher_of, vocabulary_size
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError
from slime.engine.teacher_client import TeacherClient, Vocabulary
from slime.rollout.groups import together
from slime.rollout.metrics import Asked
from slime.types import Group, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPREAD = 64  # tokens of the whole vocabulary by which a server's is compared, beside those of a prompt


class Teachers:
    """Everybody in algorithm.teachers; those that `servers` names are asked here, the others by the actor's ranks. Make it where an event
    loop runs."""

    def __init__(self, cfg: SlimeConfig, vocab_size: int, servers: Mapping[str, Sequence[Endpoint]]) -> None:
        """`vocab_size` is the student's. Raises ValueError for a teacher that does not say how large its own is, or has too few tokens."""
        self._cfg, self._vocab_size = cfg, vocab_size
        self._names = list(cfg.algorithm.teachers)
        self._top_k = cfg.algorithm.distill_top_k if cfg.algorithm.distill == "topk" else 0
        self._clients = {name: self._client(name, endpoints) for name, endpoints in servers.items()}

    def _client(self, name: str, endpoints: Sequence[Endpoint]) -> TeacherClient:
        vocabulary = Vocabulary(vocabulary_size(name, self._cfg.algorithm.teachers[name].path), self._vocab_size)
        vocabulary.asked(self._top_k)
        rollout = self._cfg.rollout
        return TeacherClient(
            endpoints,
            vocabulary,
            timeout_s=rollout.request_timeout_s,
            wait_s=rollout.start_timeout_s,
            max_in_flight=rollout.max_in_flight,
        )

    async def teach(self, group: Group) -> list[Asked]:
        """Every sample learns who teaches it and, where that is a server, what it says of the response. Raises ValueError for a source
        that nobody teaches, and what `TeacherClient.read` raises: no sample stays untaught."""
        return [asked for asked in await together(self._teach(sample) for sample in group.samples) if asked is not None]

    async def _teach(self, sample: Sample) -> Asked | None:
        sample.teacher = teacher_of(sample.source, self._cfg.algorithm)
        name = self._names[sample.teacher] if self._names else ""
        if name not in self._clients:
            return None
        if not sample.prompt_ids:
            raise ValueError(f"group {sample.group}: a teacher cannot read an answer to nothing; a prompt needs at least one token")
        start_s, ids = time.time(), [*sample.prompt_ids, *sample.response_ids]
        sample.signal = await self._clients[name].read(ids, len(sample.prompt_ids), self._top_k, session=sample.group)
        return Asked(name, start_s, time.time())

    async def check(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int]) -> None:
        """Every server answers, takes the longest sample, and reads ids as the student does: those of a prompt, and some of the whole
        vocabulary. Raises PreflightError where one does not answer, ValueError naming the knob for the rest."""
        ids = [*prompt_ids, *spread(min(len(tokenizer), self._vocab_size), SPREAD)]
        of_student = {number: str(tokenizer.decode([number])) for number in ids}
        await together(self._check(name, e, of_student) for name, client in self._clients.items() for e in client.endpoints)

    async def _check(self, name: str, endpoint: Endpoint, of_student: dict[int, str]) -> None:
        client, at = self._clients[name], knob(self._cfg, name)
        ids = [number for number in of_student if number < client.vocabulary.teacher - 1]  # see TeacherClient.texts
        try:
            longest, texts = await client.longest(endpoint), await client.texts(endpoint, ids)
        except (EngineError, TimeoutError) as error:
            raise PreflightError(f"{at}: {error}; start the server, or correct {at.partition('=')[0]} or its key_env") from error
        needed = self._cfg.data.max_prompt_tokens + self._cfg.rollout.max_response_tokens
        if needed > longest:
            raise ValueError(
                f"{at}: {endpoint.name} takes {longest} tokens at most, and samples have up to {needed} (data.max_prompt_tokens + "
                "rollout.max_response_tokens): lower one of them, or give the server a longer context and a larger cache"
            )
        if said := differing_texts(ids, [of_student[number] for number in ids], texts):
            raise ValueError(f"{at}: it does not read the student's tokens as the student does: {said}; serve a model with its tokenizer")

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))


def knob(cfg: SlimeConfig, name: str) -> str:
    """What names a teacher's server in an error, with its value."""
    teacher = cfg.algorithm.teachers[name]
    at = f"algorithm.teachers.{name}"
    return f"{at}.path={teacher.path}" if teacher.url is None else f"{at}.url={teacher.url}"


def spread(size: int, count: int) -> list[int]:
    """Up to `count` ids, evenly over [0, size)."""
    return list(range(0, size, max(1, size // count)))[:count]
