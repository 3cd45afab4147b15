"""What a few runs tell about a difference."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def paired_difference(
    treated: Sequence[float], control: Sequence[float], confidence: float = 0.95
) -> dict[str, float | None]:
    """Mean difference of pairs with its t interval (differences of pairs taken as normal and independent).

    This is the interval to read where seeds are few; [`bootstrap_interval`] stands beside it.

    Args:
        treated (sequence of `float`): one value a pair, at least two.
        control (sequence of `float`): the values to subtract, in the same order.
        confidence (`float`, *optional*, defaults to 0.95): between 0 and 1 (exclusive).

    Returns:
        `dict[str, float | None]`: `mean`, `low` and `high` of the interval, the two-sided `p_value` of no difference,
        `pairs`, `t_quantile` and `confidence`. If all differences are equal, nothing tells how far they scatter: `low`,
        `high` and `p_value` are `None`.

    Raises:
        ValueError: sequences of different lengths, or fewer than two pairs; `confidence` outside its range.
    """
    if len(treated) != len(control) or len(treated) < 2:
        raise ValueError(
            f"`treated` and `control` must be pairs, at least two, got {len(treated)} and {len(control)} values"
        )
    _check_share("confidence", confidence)
    low = high = p_value = None
    if difference_sd(treated, control) > 0:
        result = stats.ttest_rel(treated, control)
        interval = result.confidence_interval(confidence)
        low, high, p_value = float(interval.low), float(interval.high), float(result.pvalue)
    return {
        "mean": sum(a - b for a, b in zip(treated, control, strict=True)) / len(treated),
        "low": low,
        "high": high,
        "p_value": p_value,
        "pairs": len(treated),
        "t_quantile": float(stats.t.ppf((1 + confidence) / 2, len(treated) - 1)),
        "confidence": confidence,
    }


def difference_sd(treated: Sequence[float], control: Sequence[float]) -> float | None:
    """Standard deviation of the differences of pairs (divisor: pairs less one).

    Args:
        treated (sequence of `float`): one value a pair, at least one.
        control (sequence of `float`): the values to subtract, in the same order.

    Returns:
        `float` or `None`: exactly 0 if all differences are equal up to rounding; `None` for one pair.

    Raises:
        ValueError: no pair, or sequences of different lengths.
    """
    differences = _differences(treated, control)
    if len(differences) == 1:
        return None
    # Accuracies are ratios of integers: equal differences of them differ in the last bits alone.
    scale = max(np.abs(treated).max(), np.abs(control).max())
    if np.ptp(differences) <= 8 * np.finfo(float).eps * scale:
        return 0.0
    return float(differences.std(ddof=1))


def bootstrap_interval(
    treated: Sequence[float],
    control: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean difference of pairs; pairs are drawn with replacement.

    With few pairs it is too short: it resamples the same few numbers, and leaves out what the t quantile adds. Of 4,000
    samples of normal differences its 95% interval held the true mean in 75% at 3 pairs, 84% at 5, 92% at 10 and 93% at
    20. BCa intervals did no better (73, 84, 91 and 93%), so the simpler ones are used.

    Args:
        treated (sequence of `float`): one value a pair, at least one.
        control (sequence of `float`): the values to subtract, in the same order.
        confidence (`float`, *optional*, defaults to 0.95): between 0 and 1 (exclusive).
        resamples (`int`, *optional*, defaults to 9999): number of resamples, at least 1.
        seed (`int`, *optional*, defaults to 0): of the resampling: the same values give the same interval.

    Returns:
        `tuple[float, float]` or `None`: low and high; `None` for one pair or if all differences are equal.

    Raises:
        ValueError: no pair, sequences of different lengths, `confidence` or `resamples` outside their ranges.
    """
    _check_share("confidence", confidence)
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples!r}")
    if not difference_sd(treated, control):
        return None
    result = stats.bootstrap(
        (_differences(treated, control),),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def effect_size(treated: Sequence[float], control: Sequence[float]) -> float | None:
    """Cohen's `d_z`: mean of the differences of pairs by their standard deviation (Cohen 1988, section 2.3.5).

    With few pairs it is too large on average (by 25% at 5 pairs); it is not corrected here. Pairs of the same seed
    scatter less than unpaired runs, so it does not compare with a `d` of unpaired samples.

    Args:
        treated (sequence of `float`): one value a pair, at least one.
        control (sequence of `float`): the values to subtract, in the same order.

    Returns:
        `float` or `None`: `None` for one pair or if all differences are equal.

    Raises:
        ValueError: no pair, or sequences of different lengths.
    """
    sd = difference_sd(treated, control)
    return float(_differences(treated, control).mean() / sd) if sd else None


def seeds_needed(effect: float, sd: float, power: float = 0.8, significance: float = 0.05) -> int:
    """The fewest pairs with which a two-sided paired t-test finds an effect with the given power.

    The power is that of the noncentral t distribution with noncentrality `sqrt(n) * effect / sd` and `n - 1` degrees
    of freedom. `sd` is taken as known: one that comes from few pairs makes the result as uncertain as itself.

    Args:
        effect (`float`): the true mean difference, not 0; its sign does not matter.
        sd (`float`): standard deviation of the differences of pairs, at least 0.
        power (`float`, *optional*, defaults to 0.8): chance of finding the effect, between `significance` and 1
            (exclusive).
        significance (`float`, *optional*, defaults to 0.05): level of the test, between 0 and 1 (exclusive).

    Returns:
        `int`: at least 2, which is what a t-test takes; 2 if `sd` is 0.

    Raises:
        ValueError: an argument outside its range.
    """
    if effect == 0 or not math.isfinite(effect):
        raise ValueError(f"`effect` must be finite and not 0, got {effect!r}")
    if not 0 <= sd < math.inf:
        raise ValueError(f"`sd` must be finite and at least 0, got {sd!r}")
    _check_share("significance", significance)
    if not significance < power < 1:
        raise ValueError(f"`power` must be between `significance` ({significance!r}) and 1, got {power!r}")
    if sd == 0:
        return 2
    size = abs(effect) / sd

    def suffices(pairs: int) -> bool:
        return _power(size, pairs, significance) >= power

    most = 2
    while not suffices(most):
        most *= 2
    least = most // 2  # does not suffice, or is 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if suffices(middle) else (middle, most)
    return most


def _power(size: float, pairs: int, significance: float) -> float:
    quantile = stats.t.ppf(1 - significance / 2, pairs - 1)
    shift = math.sqrt(pairs) * size
    return float(stats.nct.sf(quantile, pairs - 1, [shift, -shift]).sum())  # both tails, by symmetry


def _differences(treated: Sequence[float], control: Sequence[float]) -> np.ndarray:
    if len(treated) != len(control) or len(treated) < 1:
        raise ValueError(
            f"`treated` and `control` must be pairs, at least one, got {len(treated)} and {len(control)} values"
        )
    return np.subtract(treated, control, dtype=float)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must be between 0 and 1, got {value!r}")
