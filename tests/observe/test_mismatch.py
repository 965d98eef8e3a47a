"""The distance of two columns of log-probs."""

import numpy as np
import pytest

from slime.observe.mismatch import mismatch


def test_values_of_a_worked_example() -> None:
    d = np.array([0.5, -0.25, 0.0, 0.0])
    assert mismatch(d) == {
        "mismatch/logprob_abs_diff": 0.1875,
        "mismatch/logprob_abs_diff_max": 0.5,
        "mismatch/kl": pytest.approx((np.exp(0.5) - 1.5 + np.exp(-0.25) - 0.75) / 4, rel=1e-12),
    }
    assert mismatch(np.zeros(0)) == {}
