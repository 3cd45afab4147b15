"""What a run may learn: the label of a text, or the tokens that were masked in it. All that differs is here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import datasets
import transformers
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import TaskData
from .hsa.data import SegmentCollator, SegmentTextClassificationPipeline, tokenize_with_segments
from .masking import EpochOfMasks, MaskingCollator, TokenMasker
from .metrics import MASKED_LM_METRIC_NAMES, METRIC_NAMES, compute_metrics_for, masked_lm_metrics, sum_masked_tokens
from .tokenization import encode_texts


class Objective(ABC):
    """One way to train: the model, its data, its metrics and its use.

    Attributes:
        name (`str`): what a run's configuration calls it.
        auto_name (`str`): the Auto class that loads such a model.
        pipeline (`str`): task of the pipeline that uses such a model, and tag of its card.
        needs_labels (`bool`): whether data without labels is of no use.
        split_special_tokens (`bool`): whether a new byte tokenizer takes `"[MASK]"` in a text for six bytes.
        training_arguments (mapping): fields of `TrainingArguments` that it can't do without.
    """

    name: str
    auto_name: str
    pipeline: str
    needs_labels: bool
    split_special_tokens: bool
    training_arguments: Mapping[str, Any] = {}

    @property
    def auto_class(self) -> type:
        """The Auto class that loads such a model, of any architecture."""
        return getattr(transformers, self.auto_name)

    @abstractmethod
    def model_fields(self, task: TaskData) -> dict[str, Any]:
        """Fields of the model's configuration that follow from the data."""

    @abstractmethod
    def kind(self, config: PreTrainedConfig) -> str:
        """The kind of problem in words, from the configuration of a trained model."""

    @abstractmethod
    def check_checkpoint(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TaskData) -> None:
        """Refuse a trained model and its tokenizer that can't be measured on the data: ValueError."""

    @abstractmethod
    def metric_names(self, task: TaskData) -> tuple[str, ...]:
        """What is measured beside the loss; tables and curves show the first."""

    @abstractmethod
    def prepare(
        self,
        splits: datasets.DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        config,
        train_split: str | None = "train",
    ) -> datasets.DatasetDict:
        """Tokenize a task's splits.

        Args:
            splits (`datasets.DatasetDict`): as in [`~hkt_hf.data.TaskData`].
            tokenizer (`PreTrainedTokenizerBase`): tokenizer.
            config ([`~hkt_hf.config.ExperimentConfig`]): of the run.
            train_split (`str`, *optional*): the split to train on; the others are evaluated, with the longest first.

        Raises:
            ValueError: a text that can't be learned from (the message names split and row).
        """

    @abstractmethod
    def trainer_arguments(self, task: TaskData, tokenizer: PreTrainedTokenizerBase, config) -> dict[str, Any]:
        """Arguments of the `Trainer` that collate batches and measure."""

    @abstractmethod
    def predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], segments: bool = False
    ) -> list[list[dict[str, Any]]]:
        """For each text a list of `{"label": str, "score": float}`, the best first; ValueError for an unfit text.

        With `segments` a classifier is told the sentences and paragraphs of each text.
        """


class SequenceClassification(Objective):
    """Tell the label of a text: one class, several, or a number."""

    name = "sequence_classification"
    auto_name = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    needs_labels = True
    split_special_tokens = True

    def model_fields(self, task):
        """Kind of problem and names of the labels."""
        return {
            "problem_type": task.problem_type,
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {name: index for index, name in enumerate(task.label_names)},
        }

    def kind(self, config):
        """The problem type of transformers."""
        return config.problem_type

    def check_checkpoint(self, model, tokenizer, task):
        """Refuse a model with other labels."""
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if names != list(task.label_names):
            raise ValueError(f"the data has the labels {task.label_names}, the checkpoint {names}")

    def metric_names(self, task):
        """Those of the kind of problem."""
        return METRIC_NAMES[task.problem_type]

    def prepare(self, splits, tokenizer, config, train_split="train"):
        """Token ids (`input_ids`), `labels` and `length` of all splits."""
        splits = splits.rename_column("label", "labels")
        return _tokenize(splits, tokenizer, config.tokenizer, train_split)

    def trainer_arguments(self, task, tokenizer, config):
        """Padding, and the metrics of the kind of problem."""
        collator = SegmentCollator if config.tokenizer.segments else DataCollatorWithPadding
        return {
            "data_collator": collator(tokenizer),
            "compute_metrics": compute_metrics_for(task.problem_type),
        }

    def predict(self, model, tokenizer, texts, segments=False):
        """All labels of each text."""
        pipeline_class = SegmentTextClassificationPipeline if segments else None
        classify = transformers.pipeline(
            self.pipeline, model=model, tokenizer=tokenizer, pipeline_class=pipeline_class
        )
        return classify(texts, truncation=True, top_k=None)


class MaskedLM(Objective):
    """Tell the tokens of a text that were masked (Devlin et al. 2019, arXiv 1810.04805).

    A text longer than the tokenizer allows is cut off, as for classification, and not spread over several examples.
    """

    name = "masked_lm"
    auto_name = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    needs_labels = False
    split_special_tokens = False  # the pipeline reads texts that name the mask token
    training_arguments = {"remove_unused_columns": False}  # the collator reads the column `example`

    def model_fields(self, task):
        """None: the head has the size of the vocabulary."""
        return {}

    def kind(self, config):
        """Masked language modeling."""
        return "masked language modeling"

    def check_checkpoint(self, model, tokenizer, task):
        """Refuse a tokenizer without a mask token."""
        TokenMasker(tokenizer, probability=0.5)

    def metric_names(self, task):
        """Accuracy and perplexity of masked tokens."""
        return MASKED_LM_METRIC_NAMES

    def prepare(self, splits, tokenizer, config, train_split="train"):
        """Token ids (`input_ids`), `length` and row (`example`) of the split to train on, which is masked in training.

        The others are masked here, once, and have `labels`: any model meets the same masks at every evaluation on the
        same data. They depend on `data.seed` alone.
        """
        masker = TokenMasker(tokenizer, config.mlm_probability)
        splits = datasets.DatasetDict(
            {
                name: split.select_columns("text").add_column("example", range(len(split)))
                for name, split in splits.items()
            }
        )
        if config.tokenizer.segments:
            raise ValueError("`tokenizer.segments` is for classification, not for the objective 'masked_lm'")
        encoded = _tokenize(splits, tokenizer, config.tokenizer, train_split)
        for name, split in encoded.items():
            masker.check(split, name)
            if name != train_split:
                encoded[name] = masker.mask_for_evaluation(split, config.data.seed)
        return encoded

    def trainer_arguments(self, task, tokenizer, config):
        """Masking and padding, and the metrics of masked tokens."""
        collator = MaskingCollator(TokenMasker(tokenizer, config.mlm_probability), config.seed)
        return {
            "data_collator": collator,
            "compute_metrics": masked_lm_metrics,
            "preprocess_logits_for_metrics": sum_masked_tokens,
            "callbacks": [EpochOfMasks(collator)],
        }

    def predict(self, model, tokenizer, texts, segments=False):
        """The five best tokens for the one mask token of each text."""
        limit = tokenizer.model_max_length
        for text in texts:
            num_masks = tokenizer(text)["input_ids"][:limit].count(tokenizer.mask_token_id)
            if num_masks != 1:
                raise ValueError(
                    f"`texts` must each hold {tokenizer.mask_token} once in their first {limit} tokens, for a masked "
                    f"language model to fill; {text!r} holds it {num_masks} times"
                )
        fill = transformers.pipeline(self.pipeline, model=model, tokenizer=tokenizer)
        filled = [fill(text, tokenizer_kwargs={"truncation": True}) for text in texts]
        return [[{"label": each["token_str"], "score": each["score"]} for each in answers] for answers in filled]


OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (SequenceClassification(), MaskedLM())}


def objective_of(config: Mapping[str, Any]) -> Objective:
    """What a checkpoint was trained for, by the content of its `config.json`.

    One that names no architecture, or another kind, is taken for a classifier: loading it as one says what is missing.
    """
    architecture = next(iter(config.get("architectures") or []), "")
    return OBJECTIVES[MaskedLM.name if architecture.endswith("ForMaskedLM") else SequenceClassification.name]


def _tokenize(
    splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, settings, train_split: str | None
) -> datasets.DatasetDict:
    """Token ids (`input_ids`) and `length` in place of the column `text`; what is evaluated has the longest first.

    With `settings.segments` also `segment_ids`; settings are a [`~hkt_hf.config.TokenizerConfig`].
    """

    def encode(batch: dict) -> dict:
        if settings.segments:
            columns = tokenize_with_segments(batch["text"], tokenizer, settings.max_length)
        else:
            columns = {"input_ids": encode_texts(tokenizer, batch["text"], settings.max_length)}
        return {**columns, "length": [len(ids) for ids in columns["input_ids"]]}

    encoded = splits.map(encode, batched=True, remove_columns=["text"], desc="tokenizing")
    for name, split in encoded.items():
        lengths = split["length"][:]
        if min(lengths) == 0:
            raise ValueError(f"row {lengths.index(0)} of split {name!r} has a text without tokens")
        if name != train_split:
            encoded[name] = split.sort("length", reverse=True)
    return encoded
