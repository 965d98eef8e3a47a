"""The records that flow through the loop.

    Prompt  --rollout-->  Sample x n = Group  --pack-->  Batch  --ranks-->  metrics

A prompt is drawn once and carries its *ordinal*, the number of the draw, for the rest of its life. Its samples form one
`Group` (by id, never by position). A step's surviving groups become one `Batch`: plain arrays, every token of every sample
one after another, `cu_seqlens` marking where each begins. Everything per token is aligned with `tokens`: the value at
position t speaks about token t, so `logprobs[t]` is the log-probability of `tokens[t]` given those before it in its sequence.

A worked example, two samples of one prompt "2+3=" with label "5":

    Sample(prompt_ids=[7, 1, 8, 2], response_ids=[10, 0], loss_mask=[1, 1], rollout_logprobs=[-.2, -.01], reward=1.0, group=41,
           weight_versions=[VersionSpan("ab12/0/3", 0, 2)])
    Sample(prompt_ids=[7, 1, 8, 2], response_ids=[6, 0],  loss_mask=[1, 1], rollout_logprobs=[-2., -.03], reward=0.0, group=41,
           weight_versions=[VersionSpan("ab12/0/3", 0, 1), VersionSpan("ab12/0/4", 1, 2)])

    Batch.tokens            [ 7  1  8  2 10  0 |  7  1  8  2  6  0 ]        N = 2 samples, T = 12 tokens
    Batch.cu_seqlens        [ 0, 6, 12 ]
    Batch.loss_mask         [ 0  0  0  0  1  1 |  0  0  0  0  1  1 ]
    Batch.rollout_logprobs  [ 0  0  0  0 -.2 -.01 | 0 0 0 0 -2. -.03 ]
    Batch.rewards           [ 1.0, 0.0 ]         Batch.group  [ 41, 41 ]         Batch.version  [ 3, 3 ]
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Messages = list[dict[str, Any]]
LOGPROB_SLACK = 1e-3  # by which rounding may lift a log-prob above 0
NO_VERSION = -1  # of a sample that no policy drew
NOT_RECORDED = -1  # in the experts of a token for which no engine named any
NO_TEACHER = -1  # of a sample that nobody teaches


@dataclass(frozen=True, slots=True, order=True)
class WeightVersion:
    """Which weights. Ordered by (epoch, number): a resumed run bumps the epoch, `number` counts completed updates."""

    epoch: int
    number: int
    run_id: str = ""

    @property
    def label(self) -> str:
        """What an engine records and reports for it: `run_id/epoch/number`."""
        return f"{self.run_id}/{self.epoch}/{self.number}"

    @classmethod
    def parse(cls, label: str) -> "WeightVersion":
        """The version of a label. Raises ValueError for a text of another form."""
        try:
            run_id, epoch, number = label.rsplit("/", 2)
            return cls(int(epoch), int(number), run_id)
        except ValueError:
            raise ValueError(f"{label!r} is not a weight version run_id/epoch/number") from None


@dataclass(slots=True)
class VersionSpan:
    """Response tokens [start, end) of a sample were drawn from the weights labelled `version`."""

    version: str
    start: int
    end: int


@dataclass(slots=True)
class Prompt:
    """One drawn row of a data file, before it is tokenised."""

    ordinal: int  # number of the draw; names the group too
    prompt: str | Messages  # as read
    label: Any = None
    source: str = ""  # which data set it came from
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None  # passed to the chat template


@dataclass(slots=True)
class TeacherSignal:
    """What a served teacher thinks of a sample's response. R tokens; arbitrary where loss_mask is 0."""

    logprobs: np.ndarray  # float32 [R], of the tokens that were drawn
    top_ids: np.ndarray | None = None  # int32 [R, k], its k most likely tokens at each position
    top_logprobs: np.ndarray | None = None  # float32 [R, k]


@dataclass(slots=True)
class Sample:
    """One answer to one prompt: token ids in, token ids out, never tokenised again."""

    prompt: str | Messages
    prompt_ids: list[int]
    group: int  # ordinal of the prompt, shared by its samples
    index: int = 0  # which of the group's samples
    label: Any = None
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    response_ids: list[int] = field(default_factory=list)  # [R]
    text: str = ""  # the response, decoded once
    loss_mask: list[int] = field(default_factory=list)  # [R], 0 on tool and observation tokens
    rollout_logprobs: list[float] = field(default_factory=list)  # [R], as sampled, at the rollout temperature; 0 where masked
    reward: float | None = None
    reward_error: str | None = None  # why there is no reward; an error is not a zero
    penalty: float | None = None  # added to the reward in training alone: what an overlong answer loses, at most 0
    metrics: dict[str, float] = field(default_factory=dict)  # a reward's extras
    weight_versions: list[VersionSpan] = field(default_factory=list)
    finish_reason: str = ""  # stop | length | abort
    seed: int | None = None  # sampling seed, set in deterministic mode
    teacher: int = NO_TEACHER  # who teaches its source: a position in algorithm.teachers
    signal: TeacherSignal | None = None  # of a served teacher
    # int16 [n, layers, k], of the first n tokens of prompt and response: the experts that each went to; of the last one no engine knows
    experts: np.ndarray | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def oldest_version(self) -> int:
        """Number of the oldest weights that drew a token of it, NO_VERSION where none did."""
        drew = [WeightVersion.parse(span.version) for span in self.weight_versions if span.end > span.start]
        return min(drew).number if drew else NO_VERSION

    def check(self) -> None:
        """Raises ValueError where a generate function returned an inconsistent sample."""
        where, n = f"rollout.generate: sample {self.index} of group {self.group}", len(self.response_ids)
        for name in ("loss_mask", "rollout_logprobs"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{where} has {n} response ids but {len(getattr(self, name))} entries in {name}; give one per response token"
                )
        wrong = [m for m in self.loss_mask if m not in (0, 1)]
        if wrong:
            raise ValueError(f"{where} has {wrong[0]!r} in loss_mask; give 1 where a token is trained on and 0 elsewhere")
        if self.experts is not None and len(self.experts) > len(self.prompt_ids) + n:
            raise ValueError(
                f"{where} has the experts of {len(self.experts)} tokens but {len(self.prompt_ids) + n} tokens; give those of the first ones"
            )
        at = bad_logprob(self.rollout_logprobs)
        if at is not None:
            raise ValueError(
                f"{where} has {self.rollout_logprobs[at]!r} in rollout_logprobs at token {at} of {n}; give the natural logarithm of "
                f"the probability with which it was drawn (finite, at most 0), and 0.0 on tokens that were not"
            )
        try:
            _ = self.oldest_version
        except ValueError as error:
            raise ValueError(f"{where}: {error} in weight_versions; keep the spans of the engine's answer (append_answer)") from error


def bad_logprob(logprobs: Sequence[float | None]) -> int | None:
    """Where the first value lies that no log-prob can have: None, not finite, or above 0 by more than LOGPROB_SLACK. None where none does.

    JSON has no NaN: SGLang writes it as null.
    """
    values = np.array(logprobs, np.float64)  # None becomes nan
    bad = np.flatnonzero(~(np.isfinite(values) & (values <= LOGPROB_SLACK)))
    return int(bad[0]) if bad.size else None


@dataclass(slots=True)
class Group:
    """All samples of one prompt."""

    ordinal: int
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the samples, as they were judged; asserts that every sample has one."""
        assert all(s.reward is not None for s in self.samples), f"group {self.ordinal} has samples without a reward"
        return [float(s.reward) for s in self.samples]  # type: ignore[arg-type]

    @property
    def trained_rewards(self) -> list[float]:
        """What training sees: rewards with penalties."""
        return [reward + (s.penalty or 0.0) for reward, s in zip(self.rewards, self.samples, strict=True)]


@dataclass(slots=True)
class Batch:
    """What the ranks get: one step's samples as plain arrays, ordered by group ordinal. N samples, T tokens."""

    tokens: np.ndarray  # int32 [T], prompt then response of each sample
    cu_seqlens: np.ndarray  # int64 [N + 1]
    loss_mask: np.ndarray  # bool [T], tokens drawn from the policy that are trained on; never the first of a sequence
    rollout_logprobs: np.ndarray  # float32 [T], 0 outside loss_mask
    rewards: np.ndarray  # float64 [N], with penalties
    group: np.ndarray  # int64 [N], ordinal of each sample's prompt
    version: np.ndarray  # int64 [N], number of the oldest weights that drew a token of it; -1 where no policy drew any
    experts: np.ndarray | None = None  # int16 [T, layers, k], where engines named any: what each token went to, or NOT_RECORDED
    teacher: np.ndarray | None = None  # int64 [N], who teaches each sample: a position in algorithm.teachers, or NO_TEACHER
    teacher_logprobs: np.ndarray | None = None  # float32 [T], of served teachers, 0 outside loss_mask and where there is none
    teacher_ids: np.ndarray | None = None  # int32 [T, k], their most likely tokens; arbitrary outside loss_mask and where there is none
    teacher_top: np.ndarray | None = None  # float32 [T, k], and the log-probs of those

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each sample."""
        return np.diff(self.cu_seqlens)

    @property
    def trained_lengths(self) -> np.ndarray:
        """int64 [N], trainable tokens of each sample."""
        running = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return running[self.cu_seqlens[1:]] - running[self.cu_seqlens[:-1]]

    @property
    def sample_of_token(self) -> np.ndarray:
        """int64 [T], which sample a token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def first(self, tokens: int) -> "Batch":
        """Its first samples, of `tokens` tokens at most; at least one."""
        return self.select(np.arange(max(1, int(np.searchsorted(self.cu_seqlens[1:], tokens, "right")))))

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name, those that there are."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def save(self, path: Path) -> None:
        """Write every column to an .npz file, bit for bit."""
        with path.open("wb") as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """What `save` writes, into an open file."""
        columns: dict[str, Any] = self.columns()
        np.savez(file, **columns)

    @classmethod
    def load(cls, path: Path) -> "Batch":
        """What `save` wrote. Raises OSError, ValueError, TypeError or zipfile.BadZipFile for a file of another form."""
        with np.load(path, allow_pickle=False) as columns:
            return cls(**{name: columns[name] for name in columns.files})

    @classmethod
    def from_groups(cls, groups: list[Group]) -> "Batch":
        """Pack groups in the order given.

        Raises ValueError for a sample that `Sample.check` refuses, and for an empty prompt (its first token would have no context).
        """
        samples = [s for g in groups for s in g.samples]
        for s in samples:
            s.check()
            if not s.prompt_ids:
                raise ValueError(f"group {s.group}: the prompt tokenises to nothing; a prompt needs at least one token")
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in samples]

        def per_token(of_prompt: float, of_response: str, dtype: type) -> np.ndarray:
            parts = [x for s in samples for x in (np.full(len(s.prompt_ids), of_prompt), getattr(s, of_response))]
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        mask = per_token(0, "loss_mask", bool)
        return cls(
            tokens=np.array([t for s in samples for t in (*s.prompt_ids, *s.response_ids)], np.int32),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            loss_mask=mask,
            rollout_logprobs=np.where(mask, per_token(0.0, "rollout_logprobs", np.float32), 0).astype(np.float32),
            rewards=np.array([r for g in groups for r in g.trained_rewards], np.float64),
            group=np.array([s.group for s in samples], np.int64),
            version=np.array([s.oldest_version for s in samples], np.int64),
            experts=_joined([part for s, n in zip(samples, lengths, strict=True) for part in _known(s.experts, n)], NOT_RECORDED),
            teacher=np.array([s.teacher for s in samples], np.int64) if any(s.teacher != NO_TEACHER for s in samples) else None,
            teacher_logprobs=_masked(_of_signals(samples, "logprobs"), mask),
            teacher_ids=_of_signals(samples, "top_ids"),
            teacher_top=_of_signals(samples, "top_logprobs"),
        )

    @classmethod
    def concatenate(cls, parts: list["Batch"]) -> "Batch":
        """One batch of these, in the order given: what `from_groups` makes of all their groups together."""
        always = [f.name for f in fields(cls) if f.default is MISSING and f.name != "cu_seqlens"]
        lengths = np.concatenate([part.lengths for part in parts])
        known: dict[str, Any] = {name: _joined([(getattr(p, name), len(p.tokens)) for p in parts], n) for name, n in SOMETIMES.items()}
        return cls(
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in always},
            **known,
            teacher=_joined([(part.teacher, len(part)) for part in parts], NO_TEACHER),
        )

    def tokens_at(self, samples: np.ndarray) -> np.ndarray:
        """int64, where the tokens of these samples (int64 [M]) lie, in that order."""
        spans = [np.arange(self.cu_seqlens[i], self.cu_seqlens[i + 1]) for i in samples]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)

    def select(self, samples: np.ndarray) -> "Batch":
        """The batch of the samples at these positions (int64 [M]), in that order."""
        at = self.tokens_at(samples)
        known: dict[str, Any] = {name: None if (column := getattr(self, name)) is None else column[at] for name in SOMETIMES}
        return Batch(
            tokens=self.tokens[at],
            cu_seqlens=np.concatenate([[0], np.cumsum(self.lengths[samples])]).astype(np.int64),
            loss_mask=self.loss_mask[at],
            rollout_logprobs=self.rollout_logprobs[at],
            rewards=self.rewards[samples],
            group=self.group[samples],
            version=self.version[samples],
            teacher=None if self.teacher is None else self.teacher[samples],
            **known,
        )


# Columns of tokens that not every batch has, and what stands for a token of which nothing is known.
SOMETIMES = {"experts": NOT_RECORDED, "teacher_logprobs": 0, "teacher_ids": 0, "teacher_top": 0}


def _known(values: np.ndarray | None, length: int) -> list[tuple[np.ndarray | None, int]]:
    """Of a sample's first tokens, as parts for `_joined`."""
    known = 0 if values is None else len(values)
    return [(values, known), (None, length - known)]


def _of_signals(samples: list[Sample], name: str) -> np.ndarray | None:
    """What teachers said of the responses, as a column."""
    parts: list[tuple[np.ndarray | None, int]] = []
    for s in samples:
        parts += [(None, len(s.prompt_ids)), (None if s.signal is None else getattr(s.signal, name), len(s.response_ids))]
    return _joined(parts, 0)


def _masked(column: np.ndarray | None, mask: np.ndarray) -> np.ndarray | None:
    return None if column is None else np.where(mask, column, 0).astype(column.dtype)


def _joined(parts: list[tuple[np.ndarray | None, int]], missing: int) -> np.ndarray | None:
    """(values [n, ...] or None, n) one after another, `missing` for None; None where all are."""
    there = [part for part, _ in parts if part is not None]
    if not there:
        return None
    if len({part.shape[1:] for part in there}) > 1:
        found = ", ".join(map(str, sorted({part.shape[1:] for part in there})))
        raise ValueError(f"samples name experts or teachers' tokens of several shapes {found} a token; keep what engines and teachers say")
    shape, dtype = there[0].shape[1:], there[0].dtype
    return np.concatenate([np.full((n, *shape), missing, dtype) if part is None else part for part, n in parts])


@dataclass(slots=True)
class RolloutSummary:
    """What the driver learns of a rollout; the samples themselves stay in the object store."""

    step: int
    drawn: int  # ordinals [first, first + drawn) were taken from the source
    first_ordinal: int
    trained: list[int]  # ordinals in the batch, ascending
    dropped: dict[int, str]  # ordinal -> reason: too_long | filter | truncated | reward_error | surplus
    metrics: dict[str, float]  # reward/*, response_len/*, group/*, engine/*, time/rollout_s
    examples: list[dict[str, Any]]  # a few samples for the report: prompt, response, reward, label

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"dropped": {str(o): reason for o, reason in self.dropped.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RolloutSummary":
        return cls(**values | {"dropped": {int(o): reason for o, reason in values["dropped"].items()}})


@dataclass(slots=True)
class EvalResult:
    """One evaluation set, evaluated once."""

    name: str
    metrics: dict[str, float]  # accuracy, avg_at_k, pass_at_k, response_len/*, reward_error_frac, too_long_frac
    examples: list[dict[str, Any]]
