"""Requests beyond what engines run at once wait in the client, for the engine that is free first."""

import asyncio

import pytest

from slime.engine.client import EngineClient, Sampling
from slime.engine.errors import EngineLost
from tests.rollout.double import LABEL, Double

RUNS = 4
MOST = 5  # of which one waits in the engine
REQUESTS = 60


async def ask(client: EngineClient, count: int) -> list[str]:
    answers = await asyncio.gather(*(client.generate([7, 8, 9], Sampling(3), session=n // 4) for n in range(count)))
    return [answer.engine for answer in answers]


def client_of(*endpoints, wait_s: float = 0.0) -> EngineClient:
    return EngineClient(endpoints, vocab_size=100, timeout_s=20.0, max_in_flight=1000, wait_s=wait_s)


def test_a_slow_engine_gets_no_more_than_it_runs() -> None:
    slow, fast = (Double(lambda body: "yes", f"engine {i}", runs=RUNS, takes_s=takes_s) for i, takes_s in enumerate((0.3, 0.02)))

    async def main() -> list[str]:
        async with slow.serving() as first, fast.serving() as second, client_of(first, second) as client:
            await client.expect(LABEL)
            return await ask(client, REQUESTS)

    engines = asyncio.run(main())
    assert len(engines) == REQUESTS == len(slow.asked) + len(fast.asked)
    assert slow.most <= MOST and fast.most <= MOST
    assert len(slow.asked) <= 2 * MOST < len(fast.asked), "it was full, and nothing queued behind it"


def test_who_is_cancelled_leaves_the_place_to_the_next() -> None:
    double = Double(lambda body: "yes", runs=1, takes_s=0.05)

    async def main() -> int:
        async with double.serving() as endpoint, client_of(endpoint) as client:
            await client.expect(LABEL)
            tasks = [asyncio.create_task(client.generate([7], Sampling(3))) for _ in range(20)]
            await asyncio.sleep(0.12)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
            return sum(not isinstance(answer, BaseException) for answer in found)

    assert asyncio.run(main()) >= 10


def test_who_waits_for_an_engine_that_is_lost_is_told() -> None:
    double = Double(lambda body: "die", runs=2, takes_s=0.05)

    async def main() -> list[object]:
        async with double.serving() as endpoint, client_of(endpoint, wait_s=0.3) as client:
            await client.expect(LABEL)
            asked = (client.generate([7], Sampling(3)) for _ in range(12))
            return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)

    found = asyncio.run(main())
    assert len(found) == 12 and all(isinstance(error, EngineLost) for error in found)
    assert any("no engine can answer after 0.3 s" in str(error) for error in found)


@pytest.mark.parametrize("states", [None, 0])
def test_what_says_no_number_is_asked_everything(states: int | None) -> None:
    double = Double(lambda body: "yes", runs=states, takes_s=0.05)

    async def main() -> None:
        async with double.serving() as endpoint, client_of(endpoint) as client:
            await client.expect(LABEL)
            await ask(client, 30)

    asyncio.run(main())
    assert double.most == 30
