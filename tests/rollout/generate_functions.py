"""Generate functions and filters, good and bad, to be named by import path."""

import asyncio
from dataclasses import replace
from typing import Any

from slime.config import RolloutConfig
from slime.rollout.client import RolloutClient
from slime.rollout.generate import append_observation, single_turn
from slime.types import Group, Sample

RELEASED = asyncio.Event()


async def the_fourth_waits(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    """Answers to prompt 3 do not come before RELEASED."""
    if sample.group == 3:
        await RELEASED.wait()
    return await single_turn(sample, client, cfg)


async def raises(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    raise KeyError("tool")


async def returns_text(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Any:
    return "4"


async def returns_nothing(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> list[Sample]:
    return []


async def forgets_the_mask(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    sample = await single_turn(sample, client, cfg)
    sample.loss_mask = sample.loss_mask[1:]
    return sample


async def means_another_group(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    return replace(await single_turn(sample, client, cfg), group=0)


async def knows_no_probability(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    sample = await single_turn(sample, client, cfg)
    sample.rollout_logprobs[1] = float("nan")
    return sample


async def goes_on_and_on(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    sample = await single_turn(sample, client, cfg)
    append_observation(sample, [5] * client.sampling.max_new_tokens, "")
    return sample


async def keeps_notes(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    """Writes to its sample's metadata and messages, and answers for each sample apart."""
    assert "mine" not in sample.metadata and isinstance(sample.prompt, list) and len(sample.prompt) == 1
    sample.metadata["mine"] = sample.index
    sample = await single_turn(sample, client, cfg)
    sample.prompt.append({"role": "assistant", "content": sample.text})
    return sample


async def trains_nothing(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    return sample


async def twice(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> list[Sample]:
    """Two samples of one trajectory."""
    sample = await single_turn(sample, client, cfg)
    return [sample, sample]


def odd_ordinals_go(group: Group) -> bool:
    return group.ordinal % 2 == 0


def nobody_stays(group: Group) -> bool:
    return False


def broken(group: Group) -> bool:
    raise ZeroDivisionError("division by zero")


def perhaps(group: Group) -> Any:
    return "yes"


def drops_every_fifth(group: Group) -> bool:
    return group.ordinal % 5 != 4


async def never_ends(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    await asyncio.Event().wait()
    return sample
