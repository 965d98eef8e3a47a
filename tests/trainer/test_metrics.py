from dataclasses import replace

import numpy as np
import pytest

from slime.trainer.metrics import mean_of_updates, mismatch, off_policy, staleness
from slime.types import NO_VERSION
from tests.trainer.ranks import make_batch


def shifted(batch, by_sample):
    """Trainer log-probs: the engine's plus a shift for each sample, and nonsense outside the mask."""
    shift = np.asarray(by_sample)[batch.sample_of_token]
    return (batch.rollout_logprobs + np.where(batch.loss_mask, shift, 99)).astype(np.float32)


def test_mismatch_is_over_trained_tokens():
    batch = make_batch(4)
    found = mismatch(shifted(batch, [0.1] * 4), batch, 0)
    assert found["mismatch/logprob_abs_diff"] == pytest.approx(0.1, abs=1e-6)
    assert found["mismatch/logprob_abs_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert found["mismatch/kl"] == pytest.approx(np.expm1(0.1) - 0.1, abs=1e-6)
    assert set(mismatch(batch.rollout_logprobs, batch, 0).values()) == {0.0}


def test_mismatch_is_of_samples_from_the_trainers_own_weights():
    batch = replace(make_batch(4), version=np.array([6, 7, NO_VERSION, 5]))
    logprobs = shifted(batch, [1.0, 0.1, 2.0, 3.0])
    assert mismatch(logprobs, batch, 7)["mismatch/logprob_abs_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert mismatch(logprobs, batch, 8) == {}
    assert mismatch(logprobs, replace(batch, loss_mask=np.zeros_like(batch.loss_mask)), 7) == {}


def test_off_policy_is_of_every_sample_that_a_policy_drew():
    batch = replace(make_batch(4), version=np.array([6, 7, NO_VERSION, 5]))
    d = np.repeat([0.5, -0.25, -1.0], batch.trained_lengths[[0, 1, 3]])
    found = off_policy(shifted(batch, [0.5, -0.25, 40.0, -1.0]), batch)
    w = np.exp(d)
    assert found["offpolicy/kl"] == pytest.approx((w - 1 - d).mean(), rel=1e-5)
    assert found["offpolicy/ess"] == pytest.approx(w.sum() ** 2 / len(w) / (w**2).sum(), rel=1e-5)
    assert found["offpolicy/ratio_mean"] == pytest.approx(w.mean(), rel=1e-5)
    assert found["offpolicy/ratio_max"] == pytest.approx(np.exp(0.5), rel=1e-5)
    assert off_policy(shifted(batch, [0.0] * 4), replace(batch, version=np.full(4, NO_VERSION))) == {}


def test_effective_sample_size_lies_between_one_token_and_all():
    batch = make_batch(4)
    n = batch.loss_mask.sum()
    assert off_policy(shifted(batch, [3.0] * 4), batch)["offpolicy/ess"] == pytest.approx(1.0)
    one = batch.rollout_logprobs.copy()
    one[np.flatnonzero(batch.loss_mask)[0]] += 5000  # exp() of it is beyond fp64
    with np.errstate(over="ignore"):
        assert off_policy(one, batch)["offpolicy/ess"] == pytest.approx(1 / n)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad):
    batch = make_batch(4)
    logprobs = batch.rollout_logprobs.copy()
    logprobs[np.flatnonzero(batch.loss_mask)[3]] = bad
    with np.errstate(invalid="ignore"):
        found = {**mismatch(logprobs, batch, 0), **off_policy(logprobs, batch)}
    of_weights = {"offpolicy/ess", "offpolicy/ratio_mean", "offpolicy/ratio_max"}
    expected = set(found) - (of_weights if bad == -np.inf else set())  # a token of weight 0 is what it is
    assert {name for name, value in found.items() if not np.isfinite(value)} == expected


def test_staleness_counts_versions():
    batch = replace(make_batch(4), version=np.array([6, 7, NO_VERSION, 4]))
    assert staleness(batch, 7) == {"staleness/mean": pytest.approx(4 / 3), "staleness/max": 3.0}
    assert staleness(replace(batch, version=np.full(4, NO_VERSION)), 7) == {}


def test_updates_of_a_batch_are_averaged():
    updates = [{"train/loss": x, "train/lr": x, "train/micro_batches": x, "train/tokens": x} for x in (1.0, 3.0)]
    assert mean_of_updates(updates) == {"train/loss": 2.0, "train/lr": 3.0, "train/micro_batches": 4.0, "train/tokens": 4.0}
