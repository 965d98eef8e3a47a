"""The default generate function: one answer to one prompt."""

from slime.config import RolloutConfig
from slime.rollout.client import RolloutClient
from slime.types import Sample


async def single_turn(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    """Fill a sample with one answer of the engine, every token of which is trained on."""
    answer = await client.generate(sample, sample.prompt_ids)
    sample.response_ids = answer.output_ids
    sample.loss_mask = [1] * len(answer.output_ids)
    sample.rollout_logprobs = answer.logprobs
    sample.text = answer.text
    sample.finish_reason = answer.finish_reason
    sample.weight_versions = answer.versions
    return sample
