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
        """A batch of examples; ValueError where one has no `segment_ids`, or some that do not fit its tokens or the others."""
        examples = [dict(example) for example in examples]
        segments = []
        for index, example in enumerate(examples):
            levels = example.pop("segment_ids", None)
            if levels is None or len(levels) == 0 or any(len(ids) != len(example["input_ids"]) for ids in levels):
                found = None if levels is None else [len(ids) for ids in levels]
                raise ValueError(
                    f"`segment_ids` of example {index} must be lists of {len(example['input_ids'])} ids, got {found}"
                )
            if segments and len(levels) != len(segments[0]):
                raise ValueError(
                    f"`segment_ids` of example {index} must have {len(segments[0])} levels, as example 0, got {len(levels)}"
                )
            segments.append(levels)
            if "label" in example:
                example["labels"] = example.pop("label")
        batch = dict(
            self.tokenizer.pad(
                examples,
                padding=True,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
        size = batch["input_ids"].shape[1]
        padded = torch.full((len(examples), len(segments[0]), size), -1)
        for row, levels in enumerate(segments):
            length = len(levels[0])
            first = size - length if self.tokenizer.padding_side == "left" else 0
            padded[row, :, first : first + length] = torch.stack([torch.as_tensor(ids) for ids in levels])
        batch["segment_ids"] = padded
        return batch


class SegmentTextClassificationPipeline(TextClassificationPipeline):
    """The pipeline of transformers, for a model that was trained with the segments of its texts: it is told them.

    The plain pipeline gives a model no segments; it then attends along the trees of its configuration.
    """

    def preprocess(
        self, inputs: str, truncation: bool = True, max_length: int | None = None, **tokenizer_kwargs
    ) -> dict[str, torch.Tensor]:
        """Token ids and segments of one text.

        Args:
            inputs (`str`): the text.
            truncation (`bool`, *optional*, defaults to `True`): texts are always cut.
            max_length (`int`, *optional*): where they are cut, at the tokenizer's `model_max_length` by default.
            tokenizer_kwargs: none; others are refused by name.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids` and `attention_mask (1, N)` and `segment_ids (1, N, S)`: the pipeline pads the
            second dimension to make a batch.

        Raises:
            ValueError: an input that is no text, `truncation` other than `True`, or further arguments.
        """
        if not isinstance(inputs, str):
            raise ValueError(f"`inputs` must be a text or a list of texts, got {type(inputs).__name__}")
        if truncation is not True:
            raise ValueError(f"`truncation` must be True, got {truncation!r}")
        if tokenizer_kwargs:
            raise ValueError(
                f"no arguments but `truncation` and `max_length` can be given, got {sorted(tokenizer_kwargs)}"
            )
        columns = tokenize_with_segments([inputs], self.tokenizer, max_length)
        batch = SegmentCollator(self.tokenizer)([{name: values[0] for name, values in columns.items()}])
        return batch | {"segment_ids": batch["segment_ids"].transpose(1, 2)}

    def _forward(self, model_inputs: dict[str, torch.Tensor]):
        return super()._forward(model_inputs | {"segment_ids": model_inputs["segment_ids"].transpose(1, 2)})
