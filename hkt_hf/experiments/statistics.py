"""What a few runs tell about a difference."""

from collections.abc import Sequence

from scipy import stats


def paired_difference(
    treated: Sequence[float], control: Sequence[float], confidence: float = 0.95
) -> dict[str, float]:
    """Mean difference of pairs with its t interval (differences of pairs taken as normal and independent).

    With the few seeds that training affords, a bootstrap would resample the same two or three numbers: its intervals
    are far too short.

    Args:
        treated (sequence of `float`): one value a pair, at least two.
        control (sequence of `float`): the values to subtract, in the same order.
        confidence (`float`, *optional*, defaults to 0.95): between 0 and 1 (exclusive).

    Returns:
        `dict[str, float]`: `mean`, `low` and `high` of the interval, the two-sided `p_value` of no difference, `pairs`,
        `t_quantile` and `confidence`.

    Raises:
        ValueError: sequences of different lengths, or fewer than two pairs.
    """
    if len(treated) != len(control) or len(treated) < 2:
        raise ValueError(
            f"`treated` and `control` must be pairs, at least two, got {len(treated)} and {len(control)} values"
        )
    result = stats.ttest_rel(treated, control)
    interval = result.confidence_interval(confidence)
    return {
        "mean": sum(a - b for a, b in zip(treated, control, strict=True)) / len(treated),
        "low": float(interval.low),
        "high": float(interval.high),
        "p_value": float(result.pvalue),
        "pairs": len(treated),
        "t_quantile": float(stats.t.ppf((1 + confidence) / 2, len(treated) - 1)),
        "confidence": confidence,
    }
