import pytest

from slime.data.ledger import Ledger
from slime.types import RolloutSummary


def summary(first: int, trained: list[int], dropped: dict[int, str]) -> RolloutSummary:
    return RolloutSummary(0, len(trained) + len(dropped), first, trained, dropped, {}, [])


def test_every_ordinal_is_accounted_for():
    ledger = Ledger()
    ledger.record(summary(0, [0, 2, 3], {1: "filter"}))
    assert ledger.metrics() == {"ledger/drawn": 4, "ledger/trained": 0, "ledger/dropped": 1, "ledger/pending": 3}
    ledger.train([0, 2, 3])
    ledger.record(summary(4, [4, 6], {5: "too_long", 7: "filter"}))
    assert ledger.metrics() == {"ledger/drawn": 8, "ledger/trained": 3, "ledger/dropped": 3, "ledger/pending": 2}


def test_survives_json():
    ledger = Ledger()
    ledger.record(summary(0, [0, 2], {1: "filter"}))
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
        Ledger().record(bad)


def test_a_prompt_is_trained_once():
    ledger = Ledger()
    ledger.record(summary(0, [0, 1], {}))
    ledger.train([0, 1])
    with pytest.raises(AssertionError, match="not pending"):
        ledger.train([1])
