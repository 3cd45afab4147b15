# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of what a model is given, shared by the architectures."""

import torch
from transformers.configuration_utils import PreTrainedConfig


def values_can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a check may look at values: not on the meta device, not while a graph is recorded."""
    return tensor.device.type != "meta" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def check_tokens(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, vocab_size: int
) -> tuple[int, int]:
    """Batch size and length of the one that is given; ValueError for another shape or an id outside the vocabulary."""
    name, tokens, rank = ("inputs_embeds", inputs_embeds, 3) if input_ids is None else ("input_ids", input_ids, 2)
    if tokens.dim() != rank or tokens.shape[1] < 1:
        shape = "(batch, length, hidden_size)" if rank == 3 else "(batch, length)"
        raise ValueError(f"`{name}` must have shape {shape} with a length of at least 1, got {tuple(tokens.shape)}")
    if input_ids is not None and values_can_be_read(input_ids):
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"`input_ids` must lie in [0, vocab_size) = [0, {vocab_size}), got {input_ids[outside][0].item()}"
            )
    return tokens.shape[0], tokens.shape[1]


def check_integers(name: str, tensor: torch.Tensor) -> None:
    """ValueError where `tensor`, the argument `name`, holds no integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers, got {tensor.dtype}")


def check_class_labels(labels: torch.Tensor, shape: tuple[int, ...], bound_name: str, bound: int) -> torch.Tensor:
    """The labels as int64; ValueError for another shape or dtype, or outside `[0, bound)` and not -100."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`labels` must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    check_integers("labels", labels)
    labels = labels.long().contiguous()
    if values_can_be_read(labels):
        outside = ((labels < 0) | (labels >= bound)) & (labels != -100)
        if outside.any():
            raise ValueError(f"`labels` must lie in [0, {bound_name}) = [0, {bound}), got {labels[outside][0].item()}")
    return labels


def check_sequence_labels(
    config: PreTrainedConfig, labels: torch.Tensor, logits_shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The labels as int64 or `dtype`, whichever the loss takes; ValueError where they do not fit the logits."""
    batch_size, num_labels = logits_shape
    problem_type = config.problem_type
    if problem_type is None:  # as the loss itself decides
        integers = labels.dtype in (torch.long, torch.int)
        problem_type = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if num_labels == 1 else problem_type

    one_a_row = problem_type == "single_label_classification" or (problem_type == "regression" and num_labels == 1)
    shapes = [(batch_size,), (batch_size, 1)] if one_a_row else [(batch_size, num_labels)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"`labels` must have shape {' or '.join(map(str, shapes))} for {problem_type} with `num_labels` = "
            f"{num_labels}, got {tuple(labels.shape)}"
        )
    if problem_type == "regression":
        return labels.to(dtype)
    if problem_type == "single_label_classification":
        return check_class_labels(labels, labels.shape, "num_labels", num_labels)
    labels = labels.to(dtype)
    allowed = (labels >= 0) & (labels <= 1)
    if values_can_be_read(labels) and not allowed.all():
        raise ValueError(f"`labels` must lie in [0, 1], got {labels[~allowed][0].item()}")
    return labels


def check_token_labels(
    labels: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    bound_name: str,
    bound: int,
) -> torch.Tensor | None:
    """[`check_class_labels`] for one label a token."""
    tokens = inputs_embeds if input_ids is None else input_ids
    if labels is None or tokens is None:  # the model refuses a call without tokens
        return labels
    return check_class_labels(labels, tokens.shape[:2], bound_name, bound)
