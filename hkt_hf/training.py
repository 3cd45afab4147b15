"""Training and evaluation of one experiment, on the `Trainer` of transformers."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import CONFIG_NAME, cached_file

from .architectures import ARCHITECTURES, architecture
from .architectures import DEFAULT as DEFAULT_ARCHITECTURE
from .card import build_card
from .checkpoints import (
    check_weights,
    last_complete_checkpoint,
    load_checkpoint,
    load_tokenizer,
    local_folder,
    read_config,
)
from .config import ExperimentConfig, TokenizerConfig, differences, load_experiment
from .curves import CurvesCallback, write_curves
from .data import TaskData, load_data
from .environment import environment
from .files import write_json, write_text
from .metrics import ERRORS
from .objectives import OBJECTIVES, Objective, objective_of
from .presets import dump_yaml
from .tokenization import build_tokenizer


logger = logging.getLogger(__name__)

CONFIG_FILE = "hkt.yaml"
METRICS_FILE = "metrics.json"  # written last: its presence means that the run is finished

ONE_WHOLE_MODEL = (
    "`hkt` keeps the whole model in every process (DDP); shard it with a Trainer or PyTorch, see docs/distributed.md"
)

TRAINING_DEFAULTS = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
}


class EpochSeededLengthSampler(LengthGroupedSampler):
    """Length-grouped order that depends on the seed and the epoch alone.

    The stock sampler draws from the global generator, whose state in the middle of a run depends on everything before
    it, dropout included: a resumed run would see another order than an uninterrupted one.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch, also of a resumed one."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class EpochCallback(TrainerCallback):
    """Tells the sampler of the training data which epoch begins, through all that is wrapped around it.

    A resumed run of several processes has one wrapper more than Accelerate looks through: the rest of its first epoch
    would have the order of epoch 0.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Called by the Trainer; a resumed run is somewhere within its epoch."""
        sampler = train_dataloader.batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


class StopwatchCallback(TrainerCallback):
    """Seconds of training, evaluations included, over all sessions of a run.

    Each evaluation is logged with the seconds up to it; a resumed run finds them in the log of its checkpoint.
    """

    def __init__(self):
        self.before = 0.0
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer, once the state of a checkpoint is read."""
        self.before = max((entry["seconds"] for entry in state.log_history if "seconds" in entry), default=0.0)
        self.started = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        """Called by the Trainer when the evaluation is in the log, and before a checkpoint of the step is written."""
        state.log_history[-1]["seconds"] = round(self.seconds, 2)

    @property
    def seconds(self) -> float:
        """Seconds so far, without the steps that an interruption lost."""
        return self.before + time.perf_counter() - self.started


class ExperimentTrainer(Trainer):
    """The `Trainer`, with a training order that a resumed run repeats and an evaluation in the order of the data.

    [`Objective.prepare`] sorts what is evaluated by length, so that a batch needs little padding.
    """

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # Of all processes together: the order of the data does not depend on how many of them share a step.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # `train_dataset` has lost the column of lengths already, as one that the model does not take.
        lengths = self.train_dataset[self.args.length_column_name][:]
        return EpochSeededLengthSampler(batch_size, lengths, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)


def train(
    config: ExperimentConfig,
    *,
    build: Callable[[ExperimentConfig, TaskData], tuple[torch.nn.Module, PreTrainedTokenizerBase]] | None = None,
    pad_to_multiple_of: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    measure: Sequence[str] = ("validation", "test"),
    save_model: bool = True,
) -> dict:
    """Train, evaluate and save one experiment; continue it where it was interrupted.

    Under `torchrun` or `accelerate launch` every process calls it: each has the whole model and its share of a step's
    sequences (DDP), and the first one writes the files.

    The folder `config.output_dir` becomes a checkpoint: weights, code, tokenizer, model card, `hkt.yaml` (the
    configuration), `curves.json`, `curves.png` and, last of all, `metrics.json`. A finished run is not repeated.

    Args:
        config ([`ExperimentConfig`]): what to do.
        build (`Callable`, *optional*): makes model and tokenizer of configuration and data, after the seed is set; by
            default [`build_model_and_tokenizer`]. A model that is no `PreTrainedModel` can't be saved as a checkpoint.
        pad_to_multiple_of (`int`, *optional*): to what each batch is padded; by default to its longest sequence.
        callbacks (sequence of `TrainerCallback`, *optional*): further callbacks; what they add to the log's last entry
            in `on_evaluate` is in `curves.json`.
        measure (sequence of `str`, *optional*): the splits to measure when training is over.
        save_model (`bool`, *optional*, defaults to `True`): with `False` the folder gets neither weights nor card in
            the end, and the Trainer's checkpoints are removed.

    Returns:
        `dict`: the content of `metrics.json`: metrics of the measured splits, parameters, seconds of training (over all
        sessions, evaluations included, without what an interruption lost), versions, machine and commit.

    Raises:
        ValueError: bad values in the configuration or in the data, an output folder that holds something else or that
            not every process sees, processes that do not work together, or FSDP or DeepSpeed in the launcher.
        FileNotFoundError: data that is not there.
    """
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir, config)
    arguments = training_arguments(config)
    state = PartialState()
    finished, checkpoint = _progress(output_dir)
    if finished:
        logger.warning("%s is finished already; its results are returned", output_dir)
        return json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))

    if not state.is_local_main_process:
        datasets.disable_progress_bars()
    objective = OBJECTIVES[config.objective]
    with state.local_main_process_first():
        task = load_data(config.data, need_labels=objective.needs_labels)
    metric_names = objective.metric_names(task)
    best_metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if best_metric not in ("loss", *metric_names):
        raise ValueError(
            f"`training.metric_for_best_model` must be 'loss' or one of {metric_names}, "
            f"got {arguments.metric_for_best_model!r}"
        )
    set_seed(config.seed)
    model, tokenizer = (build or build_model_and_tokenizer)(config, task)
    with state.local_main_process_first():
        splits = objective.prepare(task.splits, tokenizer, config)
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / CONFIG_FILE, dump_yaml(config.to_dict()))
    state.wait_for_everyone()

    main_metric, *_ = metric_names
    trainer_arguments = objective.trainer_arguments(task, tokenizer, config)
    if pad_to_multiple_of is not None:
        trainer_arguments["data_collator"].pad_to_multiple_of = pad_to_multiple_of
    stopwatch = StopwatchCallback()
    try:
        trainer = ExperimentTrainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            **trainer_arguments,
        )
        for callback in (EpochCallback(), stopwatch, *callbacks):
            trainer.add_callback(callback)
        trainer.add_callback(CurvesCallback(output_dir, main_metric))
    except (RuntimeError, ImportError) as error:  # e.g. a tracker in `report_to` that is not installed
        raise ValueError(f"section `training` can't be used here: {error}") from error
    if state.process_index > 0:
        # Masks of dropout of its own in every process. A resumed run goes on with the states that it saved.
        torch.manual_seed(config.seed + state.process_index)
    if checkpoint is not None:
        logger.warning("continuing from %s", checkpoint)
    _fit(trainer, checkpoint, [stopwatch, *callbacks])
    seconds = stopwatch.seconds
    for callback in (CurvesCallback, StopwatchCallback, *callbacks):
        trainer.remove_callback(callback)
    log_history = list(trainer.state.log_history)

    # After the callback has gone: the curves are those of training and validation, not of the final measurements.
    results = {split: _plain_metrics(trainer.evaluate(splits[split], metric_key_prefix="eval")) for split in measure}
    report = {
        **results,
        "main_metric": main_metric,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": round(seconds, 2),
        "resumed": checkpoint is not None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": config.seed,
        "processes": state.num_processes,
        **environment(),
    }
    if trainer.is_world_process_zero():
        write_curves(log_history, output_dir, main_metric)
        if save_model:
            card = build_card(
                trainer.model,
                objective=objective,
                name=output_dir.resolve().name,
                base_model=config.model.get("checkpoint"),
                data=task.description,
                task=config.data.task,
                seed=config.seed,
                metrics={split: {name: values[name] for name in metric_names} for split, values in results.items()},
                training=_training_in_words(trainer),
            )
            _save_final(trainer.model, tokenizer, str(card), output_dir)
        write_json(output_dir / METRICS_FILE, report)
        if not save_model:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
    state.wait_for_everyone()
    return report


def evaluate_checkpoint(
    checkpoint: str | Path, overrides: list[str] | tuple[str, ...] = (), split: str = "test"
) -> dict:
    """Measure a checkpoint on one split of the data it was trained on, or of other data named by overrides.

    Args:
        checkpoint (`str` or `Path`): a run's folder, one of its `checkpoint-N`, or a Hub id.
        overrides (sequence of `str`): as in [`load_experiment`], e.g. `["--data.test_file", "my.csv"]` (with `--data.path`
            the split is cut from that file as from the one before); not of the section `model`, which is trained.
        split (`str`, *optional*, defaults to `"test"`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `dict`: loss and metrics.

    Raises:
        ValueError: unknown split, an override of `model`, an unfinished run, a checkpoint that lacks weights or its
            configuration, or data with other labels.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"`split` must be 'train', 'validation' or 'test', got {split!r}")
    config, objective = checkpoint_experiment(checkpoint, overrides)
    if config.model != checkpoint_experiment(checkpoint)[0].model:
        raise ValueError(
            f"section `model` can't be changed where {str(checkpoint)!r} is evaluated, got overrides {list(overrides)}"
        )
    model, tokenizer = load_checkpoint(checkpoint, objective.auto_class)
    arguments = training_arguments(config, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    with PartialState().local_main_process_first():
        task = load_data(config.data, need_labels=objective.needs_labels)
        objective.check_checkpoint(model, tokenizer, task)
        logger.info("%s split of %s: %d examples", split, task.description, len(task.splits[split]))
        wanted = datasets.DatasetDict({split: task.splits[split]})
        splits = objective.prepare(wanted, tokenizer, config, train_split=None)
    with TemporaryDirectory() as folder:  # the Trainer makes its folder though nothing is written
        arguments.output_dir = folder
        trainer = ExperimentTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            **objective.trainer_arguments(task, tokenizer, config),
        )
        return _plain_metrics(trainer.evaluate(splits[split]))


def checkpoint_experiment(
    checkpoint: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[ExperimentConfig, Objective]:
    """The configuration that a checkpoint was trained with, changed by overrides, and what it was trained for.

    Args:
        checkpoint (`str` or `Path`): a run's folder, one of its `checkpoint-N`, or a Hub id.
        overrides (sequence of `str`): as in [`load_experiment`].

    Raises:
        ValueError: an unfinished run, a checkpoint that lacks its configuration, or an override that is not valid.
    """
    _check_finished(checkpoint)
    objective = _objective_of(checkpoint)
    config = load_experiment(_experiment_file(checkpoint), overrides)
    if config.objective != objective.name:
        raise ValueError(f"`objective` of {str(checkpoint)!r} is {objective.name!r}, not {config.objective!r}")
    return config, objective


def predict(checkpoint: str | Path, texts: list[str]) -> list[list[dict]]:
    """Labels and scores of texts, the best first; of a masked language model, the five best tokens for the mask.

    Args:
        checkpoint (`str` or `Path`): a run's folder or a Hub id.
        texts (`list[str]`): at least one; longer ones than the tokenizer allows are truncated. For a masked language
            model, each holds the mask token once.

    Returns:
        `list[list[dict]]`: for each text a list of `{"label": str, "score": float}`.

    Raises:
        ValueError: no text, a text without a single token or (for a masked language model) without one mask token, or
            a checkpoint that can't be used.
    """
    if not texts:
        raise ValueError("`texts` must hold at least one text, got none")
    _check_finished(checkpoint)
    objective = _objective_of(checkpoint)
    model, tokenizer = load_checkpoint(checkpoint, objective.auto_class)
    for text in texts:
        input_ids = tokenizer(text)["input_ids"]
        if not input_ids:
            raise ValueError(f"`texts` must not hold a text without tokens, got {text!r}")
        if tokenizer.unk_token_id in input_ids:
            logger.warning("the tokenizer does not know every token of %r", text)
    return objective.predict(model, tokenizer, list(texts), segments=_has_segments(checkpoint))


def check_output_dir(output_dir: Path, config: ExperimentConfig) -> None:
    """Refuse a folder that holds anything but a run of the same configuration, or one without any checkpoint yet.

    Raises:
        ValueError: a file in place of the folder, a folder with other content, or a run with other settings (the
            message names them).
    """
    if output_dir.is_file():
        raise ValueError(f"`output_dir` {str(output_dir)!r} is a file; choose a folder")
    # A run that was killed while it wrote its first file leaves only that file's temporary name.
    leftovers = f".{CONFIG_FILE}.*.tmp"
    if not output_dir.is_dir() or all(path.match(leftovers) for path in output_dir.iterdir()):
        return
    if not (output_dir / CONFIG_FILE).is_file():
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds something that is not a run of this program (no {CONFIG_FILE}); "
            "choose an empty or a new folder"
        )
    try:
        found = load_experiment(output_dir / CONFIG_FILE).to_dict()
    except ValueError as error:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds a {CONFIG_FILE} of something else: {error}"
        ) from error
    other = [name for name in differences(found, config.to_dict()) if name != "output_dir"]
    # A run that ended before its first checkpoint gives way to other settings: there is nothing to lose.
    before_checkpoint = (CONFIG_FILE, "curves.json", "curves.png", ".curves.*", leftovers)
    if other and not all(any(map(path.match, before_checkpoint)) for path in output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds a run with other settings ({', '.join(other)}); choose another "
            "folder, or remove this one"
        )


def build_model_and_tokenizer(config: ExperimentConfig, task: TaskData):
    """The model (fresh, or from `model.checkpoint`) with a head for the objective and the data, and its tokenizer."""
    objective = OBJECTIVES[config.objective]
    fields = dict(config.model)
    checkpoint = fields.pop("checkpoint", None)
    fields |= objective.model_fields(task)
    if checkpoint is not None:
        model = _load_backbone(checkpoint, fields, objective.auto_class)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and config.tokenizer.max_length > positions:
            raise ValueError(
                f"`tokenizer.max_length` must be at most {positions}, the `max_position_embeddings` of {checkpoint!r}, "
                f"got {config.tokenizer.max_length}"
            )
        tokenizer = load_tokenizer(checkpoint, model.config)
        tokenizer.model_max_length = config.tokenizer.max_length
        return model, tokenizer
    tokenizer = new_tokenizer(config.tokenizer, task.tokenizer_kind, objective.split_special_tokens)
    fields = {"max_position_embeddings": config.tokenizer.max_length, **fields}
    found = architecture(fields.pop("model_type", DEFAULT_ARCHITECTURE))
    model_config = found.config_class(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **fields)
    return found.model_class(objective.auto_name)(model_config), tokenizer


def new_tokenizer(settings: TokenizerConfig, kind: str, split_special_tokens: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a fresh model: that of `settings.path`, or of `settings.kind`, or by default of `kind`.

    Args:
        settings ([`~hkt_hf.config.TokenizerConfig`]): the section `tokenizer` of an experiment.
        kind (`str`): as in [`~hkt_hf.tokenization.build_tokenizer`].
        split_special_tokens (`bool`, *optional*, defaults to `True`): whether a special token's name in a text is plain text.

    Raises:
        OSError, ValueError: a `settings.path` without a tokenizer, or an unknown kind.
    """
    if settings.path is not None:
        return AutoTokenizer.from_pretrained(settings.path, model_max_length=settings.max_length)
    return build_tokenizer(
        settings.kind or kind,
        model_max_length=settings.max_length,
        add_cls_token=settings.add_cls_token,
        split_special_tokens=split_special_tokens,
    )


def training_arguments(config: ExperimentConfig, **fixed) -> TrainingArguments:
    """`TrainingArguments` of an experiment: our defaults, the section `training`, and what the experiment fixes.

    Raises:
        ValueError: a value that `TrainingArguments` refuses, several processes that do not find each other, or a launcher
            that asks for FSDP or DeepSpeed.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ValueError(f"{variable} is set: {ONE_WHOLE_MODEL}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    values = {
        **TRAINING_DEFAULTS,
        "bf16": on_gpu and torch.cuda.is_bf16_supported() and not config.training.get("fp16", False),
        "dataloader_pin_memory": on_gpu,
        # Without this, processes on a CPU would each train alone.
        "use_cpu": launched > 1 and not torch.accelerator.is_available(),
        # Not the state of the random numbers of each process: all must shuffle alike.
        "data_seed": config.seed,
        **config.training,
        "output_dir": config.output_dir,
        "seed": config.seed,
        **OBJECTIVES[config.objective].training_arguments,
        **fixed,
    }
    if str(values.get("metric_for_best_model")).removeprefix("eval_") in ERRORS:
        values.setdefault("greater_is_better", False)  # `TrainingArguments` takes only losses for better when lower
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"section `training` is not valid: {error}") from error
    if arguments.fsdp or arguments.deepspeed:
        raise ValueError(f"`training.fsdp` and `training.deepspeed` can't be given: {ONE_WHOLE_MODEL}")
    if arguments.world_size < launched:
        raise ValueError(
            f"{launched} processes were started (WORLD_SIZE), but they form groups of {arguments.world_size}: each would "
            f"train alone; `training.use_cpu` is {arguments.use_cpu}, which must be true on a CPU and false elsewhere"
        )
    return arguments


def _fit(trainer: Trainer, checkpoint: Path | None, callbacks: Sequence[TrainerCallback]) -> None:
    """Train from the start, or go on from a checkpoint; the callbacks hear of it even where no step is left."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    # After the last step there is nothing to go on with: in the middle of an epoch, the Trainer would add a step.
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or str(checkpoint))
    for callback in callbacks:
        callback.on_train_begin(trainer.args, state, trainer.control)


def _progress(output_dir: Path) -> tuple[bool, Path | None]:
    """Whether a run is finished, and the checkpoint it goes on from: what the first process sees, for all of them."""
    seen = [(output_dir / METRICS_FILE).is_file(), last_complete_checkpoint(output_dir)]
    finished, checkpoint = broadcast_object_list(list(seen))
    if (finished and not seen[0]) or (checkpoint is not None and not checkpoint.is_dir()):
        raise ValueError(f"`output_dir` {str(output_dir)!r} must be a folder that all nodes share")
    return finished, checkpoint


def _load_backbone(checkpoint: str, fields: dict, auto_class: type):
    """Weights of a checkpoint under a head of the right size; only the head may differ from the file."""
    folder = local_folder(checkpoint)
    if folder is not None:
        read_config(folder)
        check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        for name, value in fields.items():
            if not hasattr(config, name):
                raise ValueError(f"`model.{name}` is no field of the configuration of {checkpoint!r}")
            setattr(config, name, value)
        config.validate()
        # Half precision is for the computation, as `bf16` and `fp16` say: small updates of weights would be lost in it.
        model, info = auto_class.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except StrictDataclassError as error:
        raise ValueError(f"section `model` does not fit `model.checkpoint` {checkpoint!r}: {error}") from error
    except OSError as error:
        missing = "is no local folder and" if folder is None else ""
        raise ValueError(f"`model.checkpoint` {checkpoint!r} {missing} can't be loaded: {error}") from error
    prefix = f"{model.base_model_prefix}."
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    wrong = sorted(key for key in [*info["missing_keys"], *mismatched] if key.startswith(prefix))
    if config.model_type in ARCHITECTURES:  # others may have a pooler that no head of theirs here reads
        parts = tuple(f"{name}." for name, _ in model.base_model.named_children())
        wrong += sorted(key for key in info["unexpected_keys"] if key.removeprefix(prefix).startswith(parts))
    if wrong:
        raise ValueError(
            f"checkpoint {checkpoint!r} does not fit the section `model`: {len(wrong)} weights are missing, have another "
            f"shape or no place, first {wrong[0]!r}"
        )
    return model


def _check_finished(checkpoint: str | Path) -> None:
    folder = Path(checkpoint)
    if (folder / CONFIG_FILE).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} is an unfinished run: continue it with `hkt train`, or name one of its "
            "checkpoint-N folders"
        )


def _experiment_file(checkpoint: str | Path) -> str:
    folder = Path(checkpoint)
    for candidate in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE):
        if candidate.is_file():
            return str(candidate)
    found = (
        None
        if folder.is_dir()
        else cached_file(str(checkpoint), CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
    )
    if found is None:
        raise ValueError(f"checkpoint {str(checkpoint)!r} holds no {CONFIG_FILE}, so its data is not known")
    return found


def _has_segments(checkpoint: str | Path) -> bool:
    """Whether a model was trained with the segments of its texts; not where it does not say how it was trained."""
    try:
        return load_experiment(_experiment_file(checkpoint)).tokenizer.segments
    except (OSError, ValueError):
        return False


def _objective_of(checkpoint: str | Path) -> Objective:
    """What a checkpoint was trained for; classification where no configuration can be read: loading then says why."""
    try:
        folder = local_folder(checkpoint)
        config = read_config(folder) if folder is not None else AutoConfig.from_pretrained(checkpoint).to_dict()
    except (OSError, ValueError):
        config = {}
    return objective_of(config)


def _plain_metrics(metrics: dict) -> dict:
    """Loss and metrics of an evaluation, without its speed and how far training was."""
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    progress = ("epoch", "num_input_tokens_seen")
    names = {key: key.removeprefix("eval_") for key in metrics}
    return {names[key]: value for key, value in metrics.items() if names[key] not in speed + progress}


def _training_in_words(trainer: Trainer) -> str:
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return (
        f"{trainer.state.global_step} steps of {batch} sequences, {args.optim.value}, learning rate "
        f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), weight decay {args.weight_decay:g}, {precision}"
    )


def _save_final(model, tokenizer, card: str, output_dir: Path) -> None:
    """Write model, tokenizer and card into a hidden folder first, then move each file to its place."""
    staging = output_dir / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    write_text(staging / "README.md", card)
    for file in staging.iterdir():
        os.replace(file, output_dir / file.name)
    staging.rmdir()
