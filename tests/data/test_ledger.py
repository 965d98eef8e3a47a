import pytest

from slime.data.ledger import Ledger
from slime.types import RolloutSummary


def summary(first: int, trained: list[int], dropped: dict[int, str]) -> RolloutSummary:
    return RolloutSummary(0, len(trained) + len(dropped), first, trained, dropped, {}, [])


def after(ledger: Ledger, ended: RolloutSummary) -> None:
    """A rollout begins and ends."""
    ledger.begin(ended.step)
    ledger.record(ended)


def test_every_ordinal_is_accounted_for():
    ledger = Ledger()
    after(ledger, summary(0, [0, 2, 3], {1: "filter"}))
    assert ledger.metrics() == {"ledger/drawn": 4, "ledger/trained": 0, "ledger/dropped": 1, "ledger/pending": 3}
    ledger.train([0, 2, 3])
    after(ledger, summary(4, [4, 6], {5: "too_long", 7: "filter"}))
    assert ledger.metrics() == {"ledger/drawn": 8, "ledger/trained": 3, "ledger/dropped": 3, "ledger/pending": 2}


def test_survives_json():
    ledger = Ledger()
    after(ledger, summary(0, [0, 2], {1: "filter"}))
    assert Ledger.from_dict(ledger.to_dict()) == ledger


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (summary(1, [1], {}), "drew from ordinal 1, 0 is next"),
        (summary(0, [0, 0], {}), "lost or repeated"),
        (summary(0, [0], {0: "filter"}), "lost or repeated"),
        (RolloutSummary(0, 3, 0, [0, 1], {}, {}, []), "lost or repeated"),
    ],
)
def test_a_rollout_that_loses_or_repeats_prompts_is_refused(bad: RolloutSummary, says: str):
    with pytest.raises(AssertionError, match=says):
        after(Ledger(), bad)


def test_a_prompt_is_trained_once():
    ledger = Ledger()
    after(ledger, summary(0, [0, 1], {}))
    ledger.train([0, 1])
    with pytest.raises(AssertionError, match="not pending"):
        ledger.train([1])


def test_one_rollout_is_in_flight_at_a_time():
    ledger = Ledger()
    assert ledger.begin(0) == 0
    with pytest.raises(AssertionError, match="rollout 1 would draw the prompts of rollout 0, which is in flight"):
        ledger.begin(1)
    ledger.record(summary(0, [0, 1], {}))
    assert ledger.begin(1) == 2
    with pytest.raises(AssertionError, match="rollout 0 has ended, 1 is in flight"):
        ledger.record(summary(2, [2], {}))


def test_what_is_in_flight_when_a_run_stops_is_drawn_again():
    ledger = Ledger()
    after(ledger, summary(0, [0, 1], {}))
    ledger.begin(1)
    assert Ledger.from_dict(ledger.to_dict()).begin(1) == 2
    ledger.abandon()
    assert ledger.begin(1) == 2 and ledger.metrics()["ledger/drawn"] == 2


def test_a_finished_batch_that_is_set_aside_counts_as_not_drawn():
    ledger = Ledger()
    after(ledger, summary(0, [0, 2], {1: "filter"}))
    ledger.train([0, 2])
    before = ledger.to_dict()
    aside = summary(3, [3, 4], {5: "too_long", 6: "filter"})
    after(ledger, aside)
    ledger.set_aside(aside)
    assert ledger.to_dict() == before
    with pytest.raises(AssertionError):
        ledger.set_aside(summary(0, [0, 2], {1: "filter"}))
