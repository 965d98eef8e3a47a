"""What a generate function is given: the engines, the tokenizer, and the sampling of this rollout."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from slime.engine.client import EngineClient, Generation, Sampling
from slime.types import Sample


@dataclass
class RolloutClient:
    """Answers for token ids. One per rollout or evaluation set; `generations` collects every answer for the metrics."""

    engines: EngineClient
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling  # defaults of this rollout
    expected: str  # label of the weights that must answer
    generations: list[Generation] = field(default_factory=list)

    async def generate(
        self, sample: Sample, token_ids: Sequence[int], max_new_tokens: int | None = None, stop: Sequence[str] | None = None
    ) -> Generation:
        """Continue `token_ids`. Samples of one group go to one engine, whose cache holds their common prefix.

        Raises RuntimeError naming the engine where the answer came from other weights than expected.
        """
        sampling = replace(
            self.sampling,
            max_new_tokens=self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop=self.sampling.stop if stop is None else tuple(stop),
            seed=sample.seed,
        )
        answer = await self.engines.generate(list(token_ids), sampling, session=sample.group)
        stale = {span.version for span in answer.versions} - {self.expected}
        if stale:
            raise RuntimeError(f"{answer.engine} answered with weights {', '.join(sorted(stale))}, expected {self.expected}: it was not synced")
        self.generations.append(answer)
        return answer
