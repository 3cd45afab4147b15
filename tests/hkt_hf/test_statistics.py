"""Statistics of a few pairs, against other ways to the same numbers."""

import itertools
import math
import statistics
import warnings

import numpy as np
import pytest
from scipy import stats

from hkt_hf.experiments.statistics import (
    bootstrap_interval,
    difference_sd,
    effect_size,
    paired_difference,
    seeds_needed,
)


TREATED, CONTROL = [0.55, 0.62, 0.53, 0.58, 0.60], [0.50, 0.55, 0.52, 0.51, 0.58]
DIFFERENCES = [a - b for a, b in zip(TREATED, CONTROL, strict=True)]


def test_the_bootstrap_interval_is_that_of_all_resamples():
    """Five pairs have 3,125 resamples: the quantiles of all their means are the interval."""
    means = [statistics.mean(resample) for resample in itertools.product(DIFFERENCES, repeat=5)]
    low, high = bootstrap_interval(TREATED, CONTROL)
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.0011)
    assert bootstrap_interval(TREATED, CONTROL) == (low, high)  # the seed is fixed
    narrow = bootstrap_interval(TREATED, CONTROL, confidence=0.8)
    assert narrow == pytest.approx(np.quantile(means, (0.1, 0.9)), abs=0.0011) and narrow[1] < high
    t = paired_difference(TREATED, CONTROL)
    assert t["low"] < low < high < t["high"]


def test_the_bootstrap_of_five_pairs_is_too_short_and_student_is_not():
    """The docstring's 84% at five pairs."""
    normal = np.random.default_rng(0).standard_normal((600, 5))
    zeros = [0.0] * 5
    intervals = [bootstrap_interval(sample.tolist(), zeros, resamples=999) for sample in normal]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.84, abs=0.04)
    results = [paired_difference(sample.tolist(), zeros) for sample in normal]
    assert np.mean([result["low"] <= 0 <= result["high"] for result in results]) == pytest.approx(0.95, abs=0.03)


def test_the_effect_size_is_the_t_statistic_by_the_root_of_the_pairs():
    d_z = effect_size(TREATED, CONTROL)
    assert d_z == pytest.approx(stats.ttest_rel(TREATED, CONTROL).statistic / math.sqrt(5))
    assert d_z == pytest.approx(statistics.mean(DIFFERENCES) / statistics.stdev(DIFFERENCES))
    assert effect_size(CONTROL, TREATED) == pytest.approx(-d_z)
    assert difference_sd(TREATED, CONTROL) == pytest.approx(statistics.stdev(DIFFERENCES))


# G*Power 3.1 and statsmodels, TTestPower: paired, two-sided, 5%, power 0.8.
@pytest.mark.parametrize(("size", "pairs"), [(0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5)])
def test_seeds_needed_is_that_of_the_tables(size, pairs):
    assert seeds_needed(size, 1) == seeds_needed(-size, 1) == seeds_needed(100 * size, 100) == pairs


def test_seeds_needed_gives_the_power():
    """Of simulated experiments with as many seeds about 80% find the effect; with one seed less, fewer."""
    assert seeds_needed(1.5, 1) == 6
    found = {}
    for pairs in (5, 6):
        samples = np.random.default_rng(1).normal(1.5, 1, (20_000, pairs))
        found[pairs] = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert found[5] < 0.8 - 0.01 and found[6] > 0.8 + 0.01
    assert seeds_needed(0.5, 1, power=0.95) > 34 and seeds_needed(0.5, 1, significance=0.01) > 34


def test_what_few_or_equal_differences_give():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for treated, control in (
            ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]),  # equal but for rounding
            ([0.5, 0.6], [0.5, 0.6]),
        ):
            assert difference_sd(treated, control) == 0
            result = paired_difference(treated, control)
            assert result["mean"] == pytest.approx(treated[0] - control[0])
            assert result["low"] is result["high"] is result["p_value"] is None and result["pairs"] == len(treated)
            assert bootstrap_interval(treated, control) is None and effect_size(treated, control) is None
        assert difference_sd([0.5], [0.4]) is None
        assert bootstrap_interval([0.5], [0.4]) is None and effect_size([0.5], [0.4]) is None
        assert difference_sd([0.5, 0.5001], [0.4, 0.4]) > 0  # one example in ten thousand is a difference
        assert seeds_needed(1, 0) == 2


def test_what_is_refused():
    for call, message in (
        (lambda: effect_size([], []), "must be pairs, at least one, got 0 and 0"),
        (lambda: bootstrap_interval([0.1], [0.1, 0.2]), "must be pairs, at least one, got 1 and 2"),
        (lambda: bootstrap_interval([0.1], [0.2], resamples=0), "`resamples` must be at least 1, got 0"),
        (lambda: paired_difference(TREATED, CONTROL, confidence=95), "`confidence` must be between 0 and 1, got 95"),
        (lambda: seeds_needed(0, 1), "`effect` must be finite and not 0, got 0"),
        (lambda: seeds_needed(1, -1), "`sd` must be finite and at least 0, got -1"),
        (lambda: seeds_needed(1, math.nan), "`sd`"),
        (lambda: seeds_needed(1, 1, power=0.01), "`power` must be between `significance`"),
        (lambda: seeds_needed(1, 1, significance=0), "`significance` must be between 0 and 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
