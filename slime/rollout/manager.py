"""The RolloutManager: an asynchronous Ray actor that turns ordinals into rewarded batches.

It holds nothing durable. A prompt is a pure function of its ordinal, so the driver names the first ordinal of a step and gets
back a reference to the batch and an account of every ordinal that was drawn.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from slime.config import SlimeConfig
from slime.config.exits import GateStopped
from slime.config.imports import load_function
from slime.config.roles import reads_groups
from slime.data.source import PromptSource, eval_prompts
from slime.data.template import load_tokenizer, tokenize
from slime.engine.client import EngineClient, Sampling
from slime.engine.endpoint import Endpoint
from slime.engine.health import Trouble, Turn
from slime.models.map import Routing
from slime.observe.mismatch import PROBED, mismatch
from slime.observe.stacks import awaits
from slime.observe.trace import Span
from slime.rollout.client import RolloutClient
from slime.rollout.draw import Draw
from slime.rollout.dump import write_failed_rewards, write_rollout
from slime.rollout.evaluate import evaluate_set
from slime.rollout.groups import GroupMaker, together
from slime.rollout.metrics import busy_spans, error_frac, examples, rollout_metrics, teacher_metrics
from slime.rollout.rewards.judge import Judge
from slime.rollout.shaping import shape, teaches
from slime.rollout.teachers import Teachers
from slime.types import Batch, EvalResult, Group, RolloutSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_TOKEN = Sampling(max_new_tokens=1, temperature=0.0)  # of those that are only to read: SGLang says of none what it would have drawn
SPARE = 8  # tokens; SGLang's max_req_input_len is 6 below its context
LOOKED_AT = 32  # prompts, the first of which that is not too long is shown to teachers


@dataclass(frozen=True, slots=True)
class Progress:
    """Of what the manager works on."""

    done: int  # prompts finished
    of: int  # and how many are wanted
    troubles: list[Trouble]
    finished: "list[ray.ObjectRef]"  # groups of the rollout, a types.Batch each, where the ranks' teachers read them


class RolloutManager:
    """See the module. Every method is called by the driver alone, one at a time but for `progress` and `tell`."""

    def __init__(self, cfg: SlimeConfig, run_dir: str) -> None:
        self.cfg, self.run_dir = cfg, Path(run_dir)
        self._progress = {"rollout": (0, 0), "evaluation": (0, 0), "probe": (0, 0)}  # prompts finished, and of how many
        self._step = 0  # of the rollout or evaluation under way
        self._reads_groups = cfg.run.only != "rollout" and reads_groups(cfg)
        self._unread: list[ray.ObjectRef] = []  # see Progress; what nobody has asked for yet

    async def open(self) -> None:
        """Open data, tokenizer and rewards. Raises ValueError naming the knob of what cannot be used."""
        cfg = self.cfg
        self.source = PromptSource(cfg.data, cfg.run.seed)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(cfg.model)
        self.eval_sets = {name: (s, eval_prompts(name, s, cfg.data)) for name, s in cfg.data.eval.items()}
        self.generate_fn: Callable[..., Awaitable[Any]] = load_function(cfg.rollout.generate, "rollout.generate")
        self.filter_fn = load_function(cfg.rollout.filter, "rollout.filter") if cfg.rollout.filter else None
        self.judge = await Judge.open(cfg.reward)
        self.eval_judges = {
            name: await Judge.open(cfg.reward, s.reward, f"data.eval.{name}.reward") if s.reward else self.judge
            for name, (s, _) in self.eval_sets.items()
        }

    async def connect(
        self,
        endpoints: list[Endpoint],
        vocab_size: int,
        routing: Routing | None = None,
        teachers: dict[str, list[Endpoint]] | None = None,
    ) -> None:
        """Take these engines; with `routing`, they say which experts the tokens of a rollout went to. `teachers`: servers of those that
        are served. Raises ValueError for a teacher without a vocabulary that can be used."""
        cfg = self.cfg.rollout
        self.routing = routing
        self.teachers = Teachers(self.cfg, vocab_size, teachers or {})
        self.engines = EngineClient(
            endpoints,
            vocab_size=vocab_size,
            timeout_s=cfg.request_timeout_s,
            max_in_flight=cfg.max_in_flight,
            pause=self.cfg.sync.pause,
            wait_s=cfg.start_timeout_s + self.cfg.sync.timeout_s,
        )

    async def check_teachers(self) -> None:
        """Raises what `Teachers.check` raises."""
        prompts = (tokenize(self.source.prompt(ordinal), self.tokenizer, self.cfg.data) for ordinal in range(LOOKED_AT))
        await self.teachers.check(self.tokenizer, next((ids for ids in prompts if ids), []))

    async def add(self, endpoint: Endpoint) -> None:
        """One more engine."""
        self.engines.add(endpoint)

    async def expect(self, label: str) -> None:
        """From here on, every answer must come from the weights of this label."""
        await self.engines.expect(label)

    async def tell(self, turns: list[Turn]) -> None:
        """What became of engines."""
        self.engines.engines(turns)

    async def progress(self, what: str) -> Progress:
        """How far the `rollout` or the `evaluation` under way is, and what went wrong with engines and which groups were finished since the
        last call."""
        finished: list[ray.ObjectRef] = []
        if what == "rollout":
            finished, self._unread = self._unread, []
        return Progress(*self._progress[what], self.engines.troubles(), finished)

    async def waits(self) -> str:
        """Who waits for what, for a rollout that does not end."""
        return f"{awaits()}; {self.engines.router.said()}"

    async def generate(self, step: int, first_ordinal: int) -> "tuple[ray.ObjectRef, RolloutSummary, list[Span]]":
        """Generate and judge the batch of `step` from prompts beginning with `first_ordinal`.

        Raises GateStopped above reward.max_error_frac and where nearly every prompt is dropped, ValueError for a row that cannot be read
        or an unfit answer of rollout.generate, EngineError and TimeoutError for a request that no engine or no teacher answers.
        """
        self._step, self._progress["rollout"] = step, (0, self.cfg.rollout.prompts_per_step)
        self._unread = []
        begun, begun_cpu, cfg = time.time(), time.process_time(), self.cfg.rollout
        maker = self._maker(self._client(cfg.temperature, cfg.top_p, cfg.max_response_tokens, self.routing), self.judge)
        surplus = max(1, round(cfg.oversample * cfg.prompts_per_step)) if cfg.select == "arrival" else 0
        draw = Draw(first_ordinal, cfg.prompts_per_step, surplus)
        filled = await self._fill(draw, maker)
        self._check_errors(maker)
        groups, batch = [group for group, _ in filled], Batch.concatenate([part for _, part in filled])
        summary = RolloutSummary(
            step=step,
            drawn=draw.drawn,
            first_ordinal=first_ordinal,
            trained=[g.ordinal for g in groups],
            dropped=draw.dropped,
            metrics=rollout_metrics(groups, maker.judged, maker.client.generations, time.time() - begun, time.process_time() - begun_cpu)
            | teacher_metrics(maker.asked),
            examples=examples(groups, self.cfg.observe.examples),
        )
        if cfg.dump:
            write_rollout(self.run_dir, batch, summary, groups)
        return ray.put(batch), summary, busy_spans(maker.client.generations, maker.judging, maker.asked)

    async def evaluate(self, step: int) -> tuple[list[EvalResult], list[Span]]:
        """Evaluate every set with the weights that are expected. Raises what `generate` raises."""
        results, spans = [], []
        self._step, self._progress["evaluation"] = step, (0, sum(len(prompts) for _, prompts in self.eval_sets.values()))
        for name, (eval_set, prompts) in self.eval_sets.items():
            longest = eval_set.max_response_tokens or self.cfg.rollout.max_response_tokens
            maker = self._maker(self._client(eval_set.temperature, eval_set.top_p, longest), self.eval_judges[name], name)
            results.append(await evaluate_set(name, eval_set, prompts, maker, self.cfg, self._finished))
            self._check_errors(maker)
            spans += busy_spans(maker.client.generations, maker.judging)
        return results, spans

    async def probe(self, batch: Batch, logprobs: np.ndarray) -> dict[str, float]:
        """mismatch/* of the trainer, whose log-probs of `batch.first(PROBED)` these are (float32), and of the engines, which are given the
        same tokens. Raises what `EngineClient.generate` raises."""
        part = batch.first(PROBED)
        found = await together(self._scores(part, number) for number in range(len(part)))
        return mismatch(np.concatenate([logprobs[at].astype(np.float64) - scores for at, scores in found]))

    async def _scores(self, batch: Batch, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, engine's log-probs) of the trained tokens of a sample, but for the last of one that fills its budget: an engine takes
        a little less than it can hold."""
        longest = self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_response_tokens - SPARE
        begin = int(batch.cu_seqlens[number])
        end = min(int(batch.cu_seqlens[number + 1]), begin + longest)
        at = begin + np.flatnonzero(batch.loss_mask[begin:end])
        if not len(at):
            return at, np.zeros(0)
        ids, scored = batch.tokens[begin:end].tolist(), end - int(at[0])
        answer = await self.engines.generate(ids, ONE_TOKEN, session=int(batch.group[number]), scored=scored)
        assert answer.scores is not None, "asked for"
        return at, np.array(answer.scores)[at - at[0]]

    def _finished(self) -> None:
        """One more prompt."""
        done, of = self._progress["evaluation"]
        self._progress["evaluation"] = (done + 1, of)

    def _client(self, temperature: float, top_p: float, max_new_tokens: int, routing: Routing | None = None) -> RolloutClient:
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, stop=tuple(self.cfg.rollout.stop))
        return RolloutClient(self.engines, self.tokenizer, sampling, routing)

    def _maker(self, client: RolloutClient, judge: Judge, eval_set: str | None = None) -> GroupMaker:
        return GroupMaker(self.cfg, client, judge, self.generate_fn, eval_set)

    async def _fill(self, draw: Draw, maker: GroupMaker) -> list[tuple[Group, Batch]]:
        """Draw until enough groups have survived; the survivors in ordinal order, each packed while the engines still answer others."""
        tasks: dict[asyncio.Task[Group | str], int] = {}
        groups: list[tuple[Group, Batch]] = []
        try:
            while not draw.complete:
                while (ordinal := draw.take()) is not None:
                    tasks[asyncio.create_task(self._group(ordinal, maker))] = ordinal
                    await asyncio.sleep(0)  # its requests go out before the next prompt is tokenised
                finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(finished, key=tasks.__getitem__):
                    ordinal, outcome = tasks.pop(task), task.result()
                    if isinstance(outcome, str):
                        draw.drop(ordinal, outcome)
                    elif not draw.complete:
                        draw.keep(ordinal)
                        groups.append((outcome, self._packed(outcome)))
                self._progress["rollout"] = (len(draw.kept), draw.wanted)
            draw.drop_surplus()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return sorted(groups, key=lambda filled: filled[0].ordinal)

    def _packed(self, group: Group) -> Batch:
        """The batch of one group, handed over where the ranks' teachers read it at once."""
        batch = Batch.from_groups([group])
        if self._reads_groups:
            self._unread.append(ray.put(replace(batch, experts=None)))  # which the teachers choose themselves
        return batch

    async def _group(self, ordinal: int, maker: GroupMaker) -> Group | str:
        """The group of an ordinal, or why it is dropped."""
        prompt = self.source.prompt(ordinal)
        ids = tokenize(prompt, self.tokenizer, self.cfg.data)
        if ids is None:
            return "too_long"
        group = await maker.make(prompt, ids, self.cfg.rollout.samples_per_prompt)
        if any(s.reward_error for s in group.samples):
            self._check_errors(maker, at_least=self.cfg.rollout.prompts_per_step * self.cfg.rollout.samples_per_prompt)
            return "reward_error"
        if not self._survives(group):  # it sees rewards without penalties: DAPO's dynamic sampling is about right and wrong (eq. 11)
            return "filter"
        if not teaches(shape(group, self.cfg)):
            return "truncated"
        maker.asked += await self.teachers.teach(group)
        return group

    def _survives(self, group: Group) -> bool:
        if self.filter_fn is None:
            return True
        try:
            kept = self.filter_fn(group)
        except Exception as error:
            raise RuntimeError(
                f"rollout.filter={self.cfg.rollout.filter} failed on prompt {group.ordinal}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(kept, bool | np.bool_):
            raise ValueError(f"rollout.filter={self.cfg.rollout.filter} returned {type(kept).__name__}; return True to keep a group")
        return bool(kept)

    def _check_errors(self, maker: GroupMaker, at_least: int = 0) -> None:
        """Stop where more rewards failed than reward.max_error_frac of the judged samples (of `at_least` that many)."""
        failed = [s for s in maker.judged if s.reward_error]
        limit = self.cfg.reward.max_error_frac
        if len(failed) > limit * max(at_least, len(maker.judged)):
            path = write_failed_rewards(self.run_dir, self._step, maker.judged)
            raise GateStopped(
                f"{len(failed)} of {len(maker.judged)} rewards failed ({error_frac(maker.judged):.0%}), "
                f"above reward.max_error_frac={limit:g}; the first: {failed[0].reward_error}; "
                f"the judged samples are in {path}"
            )
