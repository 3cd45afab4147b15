"""Which arms are compared, and what their runs say: differences of test accuracies, paired by seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from . import statistics
from .arms import ARMS, Arm
from .records import POSITION_TITLES, PRETRAINED, ArmRuns, Section


FEWEST_SEEDS = 3
"""Flat arms with fewer are not chosen as the strongest."""
PAPER, HSA_PAPER = "arXiv 2604.08829", "arXiv 2509.15448"


@dataclass(frozen=True)
class PaperResult:
    """Test accuracies in percent that a paper states: `hkt` is the hierarchical model's."""

    flat: float
    hkt: float
    paper: str = PAPER

    @property
    def gain(self) -> float:
        """Percentage points of the hierarchical model above flat attention."""
        return round(self.hkt - self.flat, 2)


PAPER_RESULTS = {
    "listops": PaperResult(flat=50.33, hkt=55.10),
    "cifar10": PaperResult(flat=34.01, hkt=35.45),
    "imdb": PaperResult(flat=62.72, hkt=70.19),
    "imdb-words": PaperResult(flat=67.39, hkt=74.69, paper=HSA_PAPER),
}


@dataclass(frozen=True)
class Comparison:
    """One arm against another. Values are test accuracies in percent, differences in percentage points.

    Args:
        treated, control (`ArmRuns`): the control is subtracted.
        task (`str`): for the paper's result.
        remark (`str`): what to say beside the names.
        is_main (`bool`): HKT against flat attention; these are in the short table.
        is_papers (`bool`): a comparison of the kind that the paper made.
    """

    treated: ArmRuns
    control: ArmRuns
    task: str
    remark: str = ""
    is_main: bool = False
    is_papers: bool = False

    @property
    def label(self) -> str:
        """E.g. `hkt - flat (RoPE)`; positions once if both have the same."""
        if self.treated.positions == self.control.positions and self.treated.positions is not None:
            names = f"{self.treated.name} - {self.control.name} ({POSITION_TITLES[self.treated.positions]})"
        else:
            names = f"{self.treated.label} - {self.control.label}"
        return f"{names}, {self.remark}" if self.remark else names

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds that finished in both arms."""
        return sorted(self.treated.finished.keys() & self.control.finished.keys())

    @property
    def unpaired(self) -> Iterator[tuple[int, ArmRuns]]:
        """Seeds of either arm that the other one lacks, or that did not finish, each with the arm that lacks it."""
        for seed in sorted(self.treated.final.keys() | self.control.final.keys()):
            for arm in (self.treated, self.control):
                if seed not in arm.finished:
                    yield seed, arm

    def accuracies(self, arm: ArmRuns) -> list[float]:
        """Test accuracies of the paired seeds in percent."""
        return [100 * arm.finished[seed]["test_accuracy"] for seed in self.seeds]

    @cached_property
    def _pairs(self) -> tuple[list[float], list[float]]:
        return self.accuracies(self.treated), self.accuracies(self.control)

    @cached_property
    def gain(self) -> float | None:
        """Mean difference of the pairs; `None` without any."""
        treated, control = self._pairs
        return (sum(treated) - sum(control)) / len(treated) if treated else None

    @cached_property
    def t_interval(self) -> tuple[float, float] | None:
        """95% interval of Student's t; `None` with fewer than two pairs or if all differences are equal."""
        result = self._paired
        return None if result is None or result["low"] is None else (result["low"], result["high"])

    @property
    def p_value(self) -> float | None:
        """Two-sided paired t-test of no difference; `None` as for [`t_interval`]."""
        return None if self._paired is None else self._paired["p_value"]

    @cached_property
    def _paired(self) -> dict | None:
        return statistics.paired_difference(*self._pairs) if len(self.seeds) > 1 else None

    @cached_property
    def bootstrap_interval(self) -> tuple[float, float] | None:
        """95% interval of the bootstrap; `None` as for [`t_interval`]."""
        return statistics.bootstrap_interval(*self._pairs) if self.seeds else None

    @property
    def effect_size(self) -> float | None:
        """`d_z`; `None` as for [`t_interval`]."""
        return statistics.effect_size(*self._pairs) if self.seeds else None

    @property
    def paper_gain(self) -> float | None:
        """What the paper of the treated model, HKT's or HSA's, reports on this task; `None` where it reports nothing."""
        result = PAPER_RESULTS[self.task]
        return result.gain if result.paper == (HSA_PAPER if self.treated.kind == "hsa" else PAPER) else None

    @cached_property
    def seeds_needed(self) -> int | None:
        """Seeds to find [`paper_gain`] with, given how the differences scatter; `None` as for either."""
        sd = statistics.difference_sd(*self._pairs) if self.seeds else None
        return statistics.seeds_needed(self.paper_gain, sd) if sd and self.paper_gain is not None else None


def comparisons(section: Section) -> list[Comparison]:
    """The comparisons of a task and protocol, in the order of the report.

    HKT against flat with the same positions; HKT with RoPE against the strongest flat arm ([`strongest_flat`]); ablations of
    all its seeds, and those with a flat twin of their own, against that twin; where one of them is the strongest HKT arm
    ([`strongest_hkt`]), that one against the strongest flat arm; variants of flat, and BERT, against flat, and against the
    variant whose setting they take, and HKT against them; HSA against the same layers on a flat tree, and along a quadtree
    against along a line; ablations against HKT, or the arm whose setting they take; pretrained arms against the same ones
    from scratch; and pretrained HKT against pretrained flat. A comparison is listed once one of its arms has a final run:
    what is missing shows.
    """
    found: list[Comparison] = []

    def compare(treated: ArmRuns, control: ArmRuns, **options) -> None:
        if treated.final or (options.get("is_main") and control.final):
            found.append(Comparison(treated, control, section.task, **options))

    compare(section.arm("hkt", "absolute"), section.arm("flat", "absolute"), is_main=True, is_papers=True)
    flat, strongest, remark = section.arm("flat", "rope"), strongest_flat(section), "the strongest flat arm"
    compare(section.arm("hkt", "rope"), flat, remark=remark if strongest is flat else "", is_main=True, is_papers=True)
    if strongest not in (None, flat):
        compare(section.arm("hkt", "rope"), strongest, remark=remark, is_main=True)
    best, ablations = strongest_hkt(section), [arm for arm in section.arms if arm.kind == "hkt ablation"]
    for arm in ablations:
        twin, remark = section.arm(_own(arm).flat_twin, arm.positions), ""
        if arm is best:
            remark = "the strongest of both" if strongest in (None, twin) else "the strongest HKT arm"
        if twin.name != "flat" or _has_all_seeds(section, arm):
            compare(arm, twin, remark=remark, is_main=True)
        if remark == "the strongest HKT arm":
            compare(arm, strongest, remark="the strongest of both", is_main=True)
    for arm in section.arms:
        if arm.kind == "flat variant" or arm.name == "bert":
            compare(arm, section.arm("flat", arm.positions or "absolute"))
            if _own(arm).setting_of not in (None, "flat"):
                compare(arm, section.arm(_own(arm).setting_of, arm.positions))
    for arm in section.arms:
        if arm.final and (arm.kind == "flat variant" or arm.name == "bert"):
            compare(section.arm("hkt", arm.positions or "absolute"), arm)
    for arm in section.arms:
        if arm.kind == "hsa" and arm.name != "hsa-flat":
            compare(arm, section.arm("hsa-flat", arm.positions), is_papers=arm.name == "hsa")
        if arm.name == "hsa-quadtree":
            compare(arm, section.arm("hsa-line", arm.positions))
    for arm in ablations:
        compare(arm, section.arm(_own(arm).setting_of or "hkt", arm.positions))
    for arm in section.arms:
        if arm.kind == "pretrained":
            compare(arm, section.arm(arm.name.removesuffix(PRETRAINED), arm.positions))
    for arm in section.arms:
        if arm.name == f"hkt{PRETRAINED}":
            compare(arm, section.arm(_own(arm).flat_twin, arm.positions), is_main=True)
    return found


def _own(arm: ArmRuns) -> Arm:
    """The definition of an arm of ours; of one that is no more, that of an ablation."""
    return ARMS.get(arm.name, Arm(arm.name))


def _has_all_seeds(section: Section, arm: ArmRuns) -> bool:
    """Whether the arm has finished at least the seeds that HKT with RoPE has, and that has any."""
    seeds = section.arm("hkt", "rope").finished.keys()
    return bool(seeds) and arm.finished.keys() >= seeds


def strongest_hkt(section: Section) -> ArmRuns | None:
    """Of HKT with RoPE and its ablations, with any positions, those with at least its seeds, the arm that does best.

    Chosen as [`strongest_flat`] is; `None` without finished final runs of HKT with RoPE.
    """
    candidates = [arm for arm in section.arms if arm.kind in ("hkt", "hkt ablation") and _has_all_seeds(section, arm)]
    return max(candidates, key=lambda arm: arm.mean("validation_accuracy"), default=None)


def strongest_flat(section: Section) -> ArmRuns | None:
    """Of flat, its variants and BERT, with any positions and not pretrained, the arm to beat.

    It is chosen by the mean validation accuracy of its final runs, never by the test split, among arms with as many finished
    ones as HKT with RoPE, or with three: fewer than are asked of HKT's, so that no strong rival is left out for want of seeds.
    Of equal ones the first in the order of the report is taken; `None` if there is none.
    """
    least = min(max(len(section.arm("hkt", "rope").finished), 1), FEWEST_SEEDS)
    candidates = [
        arm
        for arm in section.arms
        if len(arm.finished) >= least and (arm.kind in ("flat", "flat variant") or arm.name == "bert")
    ]
    return max(candidates, key=lambda arm: arm.mean("validation_accuracy"), default=None)
