"""Bursts of work: results in their order, few of them waiting, the first failure raised."""

import os
import threading

import pytest

from slime.sync.bursts import burst, in_order


def test_results_come_in_the_order_of_the_items() -> None:
    begun = [threading.Event() for _ in range(2)]

    def work(item: int) -> int:
        if item < 2:  # the first waits for the second, which therefore runs beside it
            begun[item].set()
            assert begun[1 - item].wait(10)
        return item * item

    assert list(in_order(work, range(50), threads=2)) == [item * item for item in range(50)]


def test_few_results_wait() -> None:
    made: list[int] = []
    results = in_order(lambda item: made.append(item) or item, range(1000), threads=2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(made) <= 10 + 2 * 2 + 1
    results.close()
    assert len(made) < 20


def test_a_failure_comes_when_its_turn_does_and_ends_the_rest() -> None:
    made: list[int] = []

    def work(item: int) -> int:
        made.append(item)
        if item == 3:
            raise ValueError("item 3")
        return item

    found = []
    with pytest.raises(ValueError, match="item 3"):
        for result in in_order(work, range(1000), threads=1):
            found.append(result)
    assert found == [0, 1, 2] and len(made) < 10


def test_half_of_the_cores_are_shared() -> None:
    cores = len(os.sched_getaffinity(0))
    assert burst() == max(1, cores // 2) and burst(10_000) == 1
