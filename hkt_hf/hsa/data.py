"""Segments of texts as columns of a dataset, and the collator that brings them to the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextClassificationPipeline

from .tree import text_segments


def tokenize_with_segments(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list]:
    """Token ids of texts, and which sentence and paragraph each token is in; for `Dataset.map(..., batched=True)`.

    Args:
        texts (sequence of `str`): at least one.
        tokenizer (`PreTrainedTokenizerBase`): a fast one.
        max_length (`int`, *optional*): longer texts are cut, at the tokenizer's `model_max_length` by default.

    Returns:
        `dict[str, list]`: `input_ids`, and `segment_ids`, for each text a list of sentences' ids and one of paragraphs'; without
        padding.

    Raises:
        ValueError: as [`~hkt_hf.hsa.tree.text_segments`].
    """
    levels, mask, input_ids = text_segments(texts, tokenizer, max_length=max_length)
    real = mask.bool()
    return {
        "input_ids": [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)],
        "segment_ids": [[ids[row][keep].tolist() for ids in levels] for row, keep in enumerate(real)],
    }


@dataclass
class SegmentCollator:
    """Pads examples with `segment_ids` to a batch: `(B, S, N)`, -1 where there is no token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): pads all else, on its side.
        pad_to_multiple_of (`int`, *optional*): to what the length is padded.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of examples; ValueError where one has no `segment_ids`, or one that do not fit its tokens."""
        examples = [dict(example) for example in examples]
        segments = []
        for index, example in enumerate(examples):
            levels = example.pop("segment_ids", None)
            if levels is None or any(len(ids) != len(example["input_ids"]) for ids in levels):
                found = None if levels is None else [len(ids) for ids in levels]
                raise ValueError(
                    f"`segment_ids` of example {index} must be lists of {len(example['input_ids'])} ids, got {found}"
                )
            segments.append(levels)
            if "label" in example:
                example["labels"] = example.pop("label")
        batch = dict(
            self.tokenizer.pad(examples, padding=True, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")
        )
        size = batch["input_ids"].shape[1]
        padded = torch.full((len(examples), len(segments[0]), size), -1)
        for row, levels in enumerate(segments):
            length = len(levels[0])
            first = size - length if self.tokenizer.padding_side == "left" else 0
            padded[row, :, first : first + length] = torch.tensor(levels)
        batch["segment_ids"] = padded
        return batch


class SegmentTextClassificationPipeline(TextClassificationPipeline):
    """The pipeline of transformers, for a model that was trained with the segments of its texts: it is told them.

    The plain pipeline gives a model no segments; it then attends along the trees of its configuration.
    """

    def preprocess(self, inputs: str, **tokenizer_kwargs) -> dict[str, torch.Tensor]:
        """Token ids and segments of one text, cut at the tokenizer's `model_max_length`."""
        columns = tokenize_with_segments([inputs], self.tokenizer)
        return SegmentCollator(self.tokenizer)([{name: values[0] for name, values in columns.items()}])
