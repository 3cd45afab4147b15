"""Where the time of a training step goes, and whether the data keep up with it."""

import statistics
import tempfile
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile
from transformers import set_seed

from .measurement import seconds_of, take_turns
from .registry import ModelSizes, model_step


# Parts of a step, by the first of these words that the name of an operator, or of one that called it, contains.
PARTS = {
    "attention": ("scaled_dot_product", "polyphase_hkt"),
    "optimizer": ("Optimizer.step",),
    "matrix products outside attention": ("aten::mm", "aten::addmm", "aten::bmm"),
    "norms and activations": ("layer_norm", "gelu"),
}
REST = "everything else (downsampling, rotary, lifting, copies, residuals, embedding, loss)"


def part_of(names: Sequence[str]) -> str:
    """The part that an operator belongs to, from its own name and those of the operators that called it."""
    for part, words in PARTS.items():
        if any(word in name for name in names for word in words):
            return part
    return REST


def step_parts(run) -> dict[str, float]:
    """Seconds of each part of one call, from PyTorch's profiler (which makes small operators slower)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    seconds = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.events():
        names, ancestor = [], event
        while ancestor is not None:
            names.append(ancestor.name)
            ancestor = ancestor.cpu_parent
        seconds[part_of(names)] += event.self_cpu_time_total / 1e6
    return seconds


def profile_training_step(
    names: Sequence[str], sizes: ModelSizes, warm_up: int = 2, repeats: int = 10, profiles: int = 3
) -> dict[str, dict[str, object]]:
    """Time training steps of several models turn by turn, and take them apart.

    Args:
        names (sequence of `str`): models of the benchmark, `"flat"` among them.
        sizes ([`ModelSizes`]): their sizes.
        warm_up (`int`), repeats (`int`): turns before and while time is taken.
        profiles (`int`): profiled steps.

    Returns:
        `dict`: for each name `seconds` (median of a step), `ratio` to `"flat"`, and `parts`, medians of the seconds of
        each part in profiled steps.

    Raises:
        NotAvailableError: a model can't be trained at these sizes.
    """
    runs = {name: model_step(name, "train_step", sizes).run for name in names}
    seconds = {name: statistics.median(values) for name, values in take_turns(runs, warm_up, repeats).items()}
    result: dict[str, dict[str, object]] = {}
    for name, run in runs.items():
        parts = [step_parts(run) for _ in range(profiles)]
        result[name] = {
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["flat"],
            "parts": {part: statistics.median(each[part] for each in parts) for part in parts[0]},
        }
    return result


def seconds_of_batches(config, num_batches: int = 50) -> list[float]:
    """Seconds that `Trainer`'s loader takes for each of the first batches of an experiment, one process, no workers.

    Args:
        config ([`ExperimentConfig`]): the experiment; its `output_dir` is not used.
        num_batches (`int`): how many, or as many as an epoch has.

    Raises:
        ValueError, FileNotFoundError: as [`~hkt_hf.training.train`] raises them for the data and the configuration.
    """
    # These need `datasets`, which the rest of the benchmark does without.
    from ..data import load_data
    from ..objectives import OBJECTIVES
    from ..training import ExperimentTrainer, build_model_and_tokenizer, training_arguments

    objective = OBJECTIVES[config.objective]
    task = load_data(config.data, need_labels=objective.needs_labels)
    set_seed(config.seed)
    model, tokenizer = build_model_and_tokenizer(config, task)
    splits = objective.prepare(task.splits, tokenizer, config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ExperimentTrainer(
            model=model,
            args=training_arguments(config, output_dir=folder),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            **objective.trainer_arguments(task, tokenizer, config),
        )
        loader = trainer.get_train_dataloader()
        batches = iter(loader)
        return [seconds_of(lambda: next(batches)) for _ in range(min(num_batches, len(loader)))]
