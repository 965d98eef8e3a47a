import numpy as np
import pytest

from slime.trainer.metrics import mean_of_updates, mismatch
from tests.trainer.ranks import make_batch


def test_mismatch_is_over_trained_tokens():
    batch = make_batch(4)
    logprobs = batch.rollout_logprobs + np.where(batch.loss_mask, 0.1, 99).astype(np.float32)
    found = mismatch(logprobs, batch)
    assert found["mismatch/logprob_abs_diff"] == pytest.approx(0.1, abs=1e-6)
    assert found["mismatch/logprob_abs_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert found["mismatch/kl"] == pytest.approx(np.expm1(0.1) - 0.1, abs=1e-6)
    assert set(mismatch(batch.rollout_logprobs, batch).values()) == {0.0}


def test_updates_of_a_batch_are_averaged():
    updates = [{"train/loss": x, "train/lr": x, "train/micro_batches": x, "train/tokens": x} for x in (1.0, 3.0)]
    assert mean_of_updates(updates) == {"train/loss": 2.0, "train/lr": 3.0, "train/micro_batches": 4.0, "train/tokens": 4.0}
