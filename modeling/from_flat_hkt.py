# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Warm start from a pretrained flat encoder (ours): level 0 takes its weights, coarser levels begin without a say.

The combined scores are `sum_l w_l <q_l, k_l>`. Here the queries of the coarser levels begin at zero, so that their
scores are exactly zero whatever the mix, and level 0's query projection is divided by its weight `w_0`, so that the
scores are the encoder's. All gradients that lead away from there exist: those of the coarse queries, because their keys
(copies of level 0's) and their weights are not zero, and those of the mix.
"""

import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .configuration_hkt import HKTConfig


# Below the logger of transformers, so that `transformers.logging.set_verbosity_error()` holds here too.
logger = logging.get_logger("transformers.models.hkt.from_flat_hkt")


class FlatFamily(NamedTuple):
    """How one family of encoders names its modules and its configuration.

    Args:
        modules (`dict[str, str]`): module of the encoder -> module of [`HKTModel`], `*` for the number of the layer.
        masked_lm (`dict[str, str]`): module of its masked-language-model head -> module of [`HKTForMaskedLM`].
        fields (`dict[str, str]`): field of [`HKTConfig`] -> field of its configuration.
        constants (`dict`): field of [`HKTConfig`] -> value that the family always has.
        masked_lm_act (`str`, *optional*): activation of its masked-language-model head, where the configuration does
            not say it.
        positions_after_padding (`bool`): whether positions count from `pad_token_id + 1`, as in RoBERTa.
    """

    modules: dict[str, str]
    masked_lm: dict[str, str]
    fields: dict[str, str]
    constants: dict[str, Any] = {}
    masked_lm_act: str | None = None
    positions_after_padding: bool = False


def _bert_like(masked_lm: dict[str, str], **kwargs) -> FlatFamily:
    return FlatFamily(
        modules={
            "embeddings.word_embeddings": "embed_tokens",
            "embeddings.position_embeddings": "embed_positions",
            "embeddings.token_type_embeddings": "embed_token_types",
            "embeddings.LayerNorm": "embed_norm",
            "encoder.layer.*.attention.self.query": "layers.*.self_attn.q_proj.0",
            "encoder.layer.*.attention.self.key": "layers.*.self_attn.k_proj.0",
            "encoder.layer.*.attention.self.value": "layers.*.self_attn.v_proj",
            "encoder.layer.*.attention.output.dense": "layers.*.self_attn.o_proj",
            "encoder.layer.*.attention.output.LayerNorm": "layers.*.post_attention_layernorm",
            "encoder.layer.*.intermediate.dense": "layers.*.mlp.up_proj",
            "encoder.layer.*.output.dense": "layers.*.mlp.down_proj",
            "encoder.layer.*.output.LayerNorm": "layers.*.post_feedforward_layernorm",
        },
        masked_lm=masked_lm,
        fields={
            **{name: name for name in _SAME_FIELDS},
            "intermediate_size": "intermediate_size",
            "hidden_act": "hidden_act",
            "layer_norm_eps": "layer_norm_eps",
            "type_vocab_size": "type_vocab_size",
            "hidden_dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "classifier_dropout": "classifier_dropout",
        },
        **kwargs,
    )


_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_BERT = _bert_like(
    {
        "cls.predictions.transform.dense": "head.dense",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.predictions.decoder": "lm_head",
    }
)
_ROBERTA = _bert_like(
    {"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm", "lm_head.decoder": "lm_head"},
    masked_lm_act="gelu",
    positions_after_padding=True,
)
_ELECTRA = _bert_like(
    {
        "generator_predictions.dense": "head.dense",
        "generator_predictions.LayerNorm": "head.norm",
        "generator_lm_head": "lm_head",
    },
    masked_lm_act="gelu",
)
_DISTILBERT = FlatFamily(
    modules={
        "embeddings.word_embeddings": "embed_tokens",
        "embeddings.position_embeddings": "embed_positions",
        "embeddings.LayerNorm": "embed_norm",
        "transformer.layer.*.attention.q_lin": "layers.*.self_attn.q_proj.0",
        "transformer.layer.*.attention.k_lin": "layers.*.self_attn.k_proj.0",
        "transformer.layer.*.attention.v_lin": "layers.*.self_attn.v_proj",
        "transformer.layer.*.attention.out_lin": "layers.*.self_attn.o_proj",
        "transformer.layer.*.sa_layer_norm": "layers.*.post_attention_layernorm",
        "transformer.layer.*.ffn.lin1": "layers.*.mlp.up_proj",
        "transformer.layer.*.ffn.lin2": "layers.*.mlp.down_proj",
        "transformer.layer.*.output_layer_norm": "layers.*.post_feedforward_layernorm",
    },
    masked_lm={"vocab_transform": "head.dense", "vocab_layer_norm": "head.norm", "vocab_projector": "lm_head"},
    fields={
        **{name: name for name in _SAME_FIELDS},
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    constants={"layer_norm_eps": 1e-12, "type_vocab_size": 0},
)

# `model_type` of the configuration -> family. What is not here is refused.
FLAT_FAMILIES = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}

# Fields that say how the encoder computes: another value could not give its numbers.
_FIXED_FIELDS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "is_decoder",
    "layer_norm_eps",
    "max_position_embeddings",
    "norm_placement",
    "num_attention_heads",
    "num_hidden_layers",
    "position_embedding_type",
    "rope_parameters",
    "score_symmetry",
    "share_level_projections",
    "tie_word_embeddings",
    "type_vocab_size",
    "vocab_size",
)


# Parameters that a flat encoder does not have.
_OF_LEVELS = re.compile(r"\.self_attn\.([qk]_proj\.[1-9]|downsample\.|level_logits)")


def warm_start(
    model_class: type[PreTrainedModel],
    model_or_path: PreTrainedModel | str | os.PathLike,
    level_0_weight: float,
    overrides: dict[str, Any],
) -> PreTrainedModel:
    """The work of [`HKTPreTrainedModel.from_flat`], which documents it, for the class `model_class`."""
    if _has_task(model_class, "CausalLM"):
        raise ValueError(
            f"`{model_class.__name__}` can't start from a flat encoder, which sees later tokens: no causal model could give "
            "its numbers"
        )
    is_number = isinstance(level_0_weight, int | float) and not isinstance(level_0_weight, bool)
    if not is_number or not 0.0 < level_0_weight < 1.0:
        raise ValueError(f"`level_0_weight` must be a number between 0 and 1, without these, got {level_0_weight!r}")
    source_config = _source_config(model_or_path)
    family = FLAT_FAMILIES[source_config.model_type]
    config = _flat_config(family, source_config, overrides)
    model = model_class(config)  # checks what the class asks of its configuration, before anything is loaded
    source = _source_model(model_or_path, source_config)

    tensors, unused = _encoder_tensors(family, source, config)
    head_tensors, unused_head = _head_tensors(family, source, model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()} | head_tensors
    model = model.to(device=source.device, dtype=source.dtype)
    model.config.dtype = source.dtype
    fresh = _copy_tensors(model, tensors)
    for layer in model.base_model.layers:
        _start_at_level_0(layer.self_attn, level_0_weight)
    _report(model, source, unused + unused_head, fresh)
    return model.eval()


def _source_config(model_or_path: PreTrainedModel | str | os.PathLike) -> PreTrainedConfig:
    """The configuration of the encoder; ValueError where it is not one that HKT can compute."""
    if isinstance(model_or_path, PreTrainedModel):
        config, name = model_or_path.config, type(model_or_path).__name__
    elif isinstance(model_or_path, str | os.PathLike):
        name = repr(str(model_or_path))
        try:
            config = AutoConfig.from_pretrained(model_or_path, trust_remote_code=False)
        except ValueError as error:
            raise ValueError(f"`model_or_path` ({name}) has no configuration that can be used: {error}") from error
    else:
        raise ValueError(
            f"`model_or_path` must be a PreTrainedModel or the path or Hub id of one, got {type(model_or_path).__name__}"
        )

    def refuse(reason: str):
        raise ValueError(
            f"`model_or_path` ({name}) {reason}. Supported are bidirectional encoders with absolute positions of the "
            f"types {', '.join(sorted(FLAT_FAMILIES))}"
        )

    if config.model_type == HKTConfig.model_type:
        refuse("is an HKT model already: load it with `from_pretrained`")
    if config.model_type not in FLAT_FAMILIES:
        refuse(f"is of type {config.model_type!r}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        refuse("is a decoder (`is_decoder` or `add_cross_attention` is set)")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        refuse(f"has `position_embedding_type` {positions!r}")
    embedding_size = getattr(config, "embedding_size", config.hidden_size)
    if embedding_size != config.hidden_size:
        refuse(f"projects embeddings of width {embedding_size} to `hidden_size` {config.hidden_size}")
    return config


def _flat_config(family: FlatFamily, source_config: PreTrainedConfig, overrides: dict[str, Any]) -> HKTConfig:
    """The configuration of the result: the encoder's, what HKT adds, and the caller's `overrides`."""
    fields = {name: getattr(source_config, theirs, None) for name, theirs in family.fields.items()}
    fields |= family.constants
    fields |= {
        "attention_bias": True,
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "is_decoder": False,
        "norm_placement": "post",
        "position_embedding_type": "absolute",
        "rope_parameters": None,
        "score_symmetry": "none",
        "share_level_projections": False,
    }
    if family.positions_after_padding:
        fields["max_position_embeddings"] -= source_config.pad_token_id + 1
    if not {"num_labels", "id2label", "label2id"} & set(overrides):
        fields |= {name: getattr(source_config, name) for name in ("id2label", "label2id", "problem_type")}

    possible = {field.name for field in dataclasses.fields(HKTConfig)} | {
        "num_labels",
        "attn_implementation",
        "output_attentions",
        "output_level_weights",
    }
    for name, value in overrides.items():
        if name in ("dtype", "torch_dtype"):
            raise ValueError(
                f"`{name}` ({value!r}) can't be given: dtype and device are the encoder's; convert the result with `.to()`"
            )
        if name not in possible:
            raise ValueError(
                f"`{name}` ({value!r}) is not a field of HKTConfig; options of `from_pretrained` belong to the encoder: "
                "load it and give the model"
            )
        if name in _FIXED_FIELDS and value != fields[name]:
            raise ValueError(
                f"`{name}` ({value!r}) must be {fields[name]!r}: with another value the first forward could not be that of "
                "the encoder"
            )
    return HKTConfig(**{**fields, **overrides})


def _source_model(model_or_path: PreTrainedModel | str | os.PathLike, config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder, with its head where the checkpoint has one; ValueError where its weights can't be taken."""
    source = model_or_path
    if not isinstance(model_or_path, PreTrainedModel):
        # The class that wrote the checkpoint: AutoModel would lose a head.
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        is_known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        if not is_known or model_class.config_class is not type(config):
            model_class = AutoModel
        source = model_class.from_pretrained(model_or_path, trust_remote_code=False)
    for name, parameter in source.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"`model_or_path` ({type(source).__name__}) has no values: `{name}` is on the meta device"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"`model_or_path` ({type(source).__name__}) is quantized: `{name}` is {parameter.dtype}; load it without"
            )
    return source


def _encoder_tensors(
    family: FlatFamily, source: PreTrainedModel, config: HKTConfig
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Parameters of the encoder under the names of [`HKTModel`], and the names of those without a place (a pooler)."""
    tensors, unused, unknown = {}, [], []
    encoder = source.base_model
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        target = family.modules.get(re.sub(r"\.\d+\.", ".*.", module))
        if target is not None:
            number = re.search(r"\.(\d+)\.", module)
            tensors[f"{target.replace('*', number[1]) if number else target}.{leaf}"] = parameter.detach()
        else:
            (unused if name.startswith("pooler.") else unknown).append(name)
    if unknown:
        raise ValueError(
            f"`model_or_path` ({type(source).__name__}) has parameters that an encoder of the type "
            f"{source.config.model_type!r} does not have: {', '.join(sorted(unknown)[:3])}; adapters must be merged first"
        )
    if family.positions_after_padding:
        tensors["embed_positions.weight"] = tensors["embed_positions.weight"][-config.max_position_embeddings :]
    prefix = "" if encoder is source else f"{source.base_model_prefix}."
    return tensors, [f"{prefix}{name}" for name in unused]


def _head_tensors(
    family: FlatFamily, source: PreTrainedModel, model: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Parameters of the encoder's head under the names of `model`'s, and the names of those without a place.

    A head is taken whole or not at all, and only where it computes the same as ours.
    """
    if source.base_model is source:
        return {}, []
    names = {}
    if _has_task(type(model), "MaskedLM") and family.masked_lm_act in (None, model.config.hidden_act):
        names = family.masked_lm
    for task, module in (("TokenClassification", "classifier"), ("QuestionAnswering", "qa_outputs")):
        if _has_task(type(model), task) and _has_task(type(source), task):
            names = {module: module}

    parameters = {
        name: parameter.detach()
        for name, parameter in source.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{source.base_model_prefix}.")
    }
    own = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items() for leaf in ("weight", "bias")]
    tensors = {}
    if all(theirs in parameters and parameters[theirs].shape == own[ours].shape for theirs, ours in pairs):
        tensors = {ours: parameters[theirs] for theirs, ours in pairs}
    # By tensors, not by names: a tied one has several.
    used = {tensor.data_ptr() for tensor in (*source.base_model.parameters(), *tensors.values())}
    return tensors, sorted(name for name, tensor in parameters.items() if tensor.data_ptr() not in used)


def _has_task(model_class: type[PreTrainedModel], task: str) -> bool:
    return any(parent.__name__.endswith(f"For{task}") for parent in model_class.__mro__)


@torch.no_grad()
def _copy_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Copy `tensors` into the parameters of `model`; returns the names in its head that got none."""
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    fresh = []
    for name, parameter in model.named_parameters():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape != parameter.shape:
            raise ValueError(
                f"`model_or_path` has a tensor of shape {tuple(tensor.shape)} where its configuration asks for "
                f"{tuple(parameter.shape)} (`{name}`)"
            )
        if tensor is not None:
            parameter.copy_(tensor)
        elif id(parameter) not in encoder:
            fresh.append(name)
        elif not _OF_LEVELS.search(name):
            raise ValueError(f"`model_or_path` lacks a tensor that its type should have (here `{name}`)")
    return fresh


@torch.no_grad()
def _start_at_level_0(attention: nn.Module, level_0_weight: float) -> None:
    """Give the levels of one attention module the weights that leave the scores those of level 0 alone."""
    num_coarse = attention.num_levels - 1
    for level in range(1, num_coarse + 1):
        query, key = attention.q_proj[level], attention.k_proj[level]
        key.load_state_dict(attention.k_proj[0].state_dict())
        for parameter in query.parameters():
            parameter.zero_()
    attention.level_logits.zero_()
    if num_coarse > 0:
        attention.level_logits[:, 0] = math.log(num_coarse * level_0_weight / (1.0 - level_0_weight))
    # The weight that the logits give after rounding, not the one that was asked for.
    weight = attention.level_weights()[0, 0]
    for parameter in attention.q_proj[0].parameters():
        parameter.copy_(parameter.to(torch.promote_types(parameter.dtype, torch.float32)) / weight)


def _report(model: PreTrainedModel, source: PreTrainedModel, unused: list[str], fresh: list[str]) -> None:
    def modules(names: list[str]) -> str:
        return ", ".join(sorted({name.removesuffix(".weight").removesuffix(".bias") for name in names}))

    parts = []
    if unused:
        parts.append(f"not used of {type(source).__name__}: {modules(unused)}")
    if fresh:
        parts.append(f"newly initialised, to be trained: {modules(fresh)}")
    if parts:
        logger.warning("%s.from_flat: %s", type(model).__name__, "; ".join(parts))
