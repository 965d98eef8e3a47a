"""Generate functions, async fn(sample, client, cfg) -> Sample | list[Sample]: the default one. examples/tool_calls.py has one with tools.

`cfg` is the recipe's `rollout`; `client` knows the sampling of this rollout or evaluation set and its token budget. Fill the sample that
comes, or copies of it (dataclasses.replace): its `group` stays. `weight_versions` of what an engine drew are its answer's, as
`append_answer` keeps them; a sample without any counts as one that no policy drew. Nothing here may block: await, or asyncio.to_thread.
"""

import numpy as np

from slime.config import RolloutConfig
from slime.engine.generation import Generation
from slime.rollout.client import RolloutClient
from slime.types import Sample, VersionSpan


async def single_turn(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    """Fill a sample with one answer of the engine, every token of which is trained on."""
    append_answer(sample, await client.generate(sample, sample.prompt_ids))
    return sample


def append_answer(sample: Sample, answer: Generation) -> None:
    """Add what the engine drew: ids as they came, trained on. Raises ValueError where the engine names the experts of other tokens than the
    sample's: it answered to another text."""
    begin = len(sample.response_ids)
    asked, answered = len(sample.prompt_ids) + begin, len(answer.output_ids)
    if answer.experts is not None and len(answer.experts) != asked + answered - 1:
        raise ValueError(
            f"an answer to {len(answer.experts) + 1 - answered} tokens is added to a sample of {asked}, whose experts it does not tell: "
            "ask for an answer to prompt_ids + response_ids, or set rollout.replay_experts=false"
        )
    sample.response_ids += answer.output_ids
    sample.loss_mask += [1] * len(answer.output_ids)
    sample.rollout_logprobs += answer.logprobs
    sample.text += answer.text
    sample.finish_reason = answer.finish_reason
    sample.weight_versions += [VersionSpan(s.version, begin + s.start, begin + s.end) for s in answer.versions]
    if answer.experts is not None:
        known = sample.experts  # what was said of a token first is what its successor was drawn with
        sample.experts = answer.experts if known is None else np.concatenate([known, answer.experts[len(known) :]])


def append_observation(sample: Sample, token_ids: list[int], text: str) -> None:
    """Add what the engine did not draw, such as a tool's result: the model reads it and is not trained on it."""
    sample.response_ids += token_ids
    sample.loss_mask += [0] * len(token_ids)
    sample.rollout_logprobs += [0.0] * len(token_ids)
    sample.text += text
