# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""PyTorch HKT model, top to bottom: attention, layer, model, heads."""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hkt import (
    MODEL_BACKENDS,
    CausalDownsample,
    attend_to_cache,
    attention_backend,
    broadcast_padding_mask,
    dispatch_attention,
)
from .cache_hkt import CacheStep, HKTCacheLayer, plan_next_step, plan_step, prepare_cache
from .checks_common import (
    check_class_labels,
    check_integers,
    check_sequence_labels,
    check_token_labels,
    check_tokens,
    values_can_be_read,
)
from .configuration_hkt import HKTConfig
from .from_flat_hkt import warm_start
from .layers_common import MLP, PredictionHead, RotaryEmbedding, apply_rotary_pos_emb, classifier_dropout, pool
from .layout_hkt import SequenceLayout, find_layout


# What one repository serves: Auto class -> class of this file. Registered by `hkt_hf`, written into every checkpoint.
AUTO_CLASSES = {
    "AutoModel": "HKTModel",
    "AutoModelForCausalLM": "HKTForCausalLM",
    "AutoModelForMaskedLM": "HKTForMaskedLM",
    "AutoModelForMultipleChoice": "HKTForMultipleChoice",
    "AutoModelForQuestionAnswering": "HKTForQuestionAnswering",
    "AutoModelForSequenceClassification": "HKTForSequenceClassification",
    "AutoModelForTokenClassification": "HKTForTokenClassification",
}
AUTO_MAP = {
    "AutoConfig": "configuration_hkt.HKTConfig",
    **{auto_class: f"modeling_hkt.{name}" for auto_class, name in AUTO_CLASSES.items()},
}

# Where sequences begin in packed rows, as data collators tell flash attention.
ROW_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

MAX_FLASH_WIDTH = 256
"""Widest head that the kernels of flash attention take; lifted queries and keys have `num_levels * head_dim` features."""


@dataclass
class HKTModelOutput(BaseModelOutputWithPast):
    """Output of [`HKTModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, d)`): hidden states after the last layer and layer norm.
        past_key_values (`Cache`, of a decoder with `use_cache=True`): what the next call continues from.
        hidden_states (`tuple(torch.Tensor)`, with `output_hidden_states=True`): embeddings and the output of each
            layer, `(B, T, d)` each.
        attentions (`tuple(torch.Tensor)`, with `output_attentions=True` in eager): attention weights of each layer,
            `(B, H, T, T)` each.
        level_weights (`tuple(torch.Tensor)`, with `output_level_weights=True`): convex weights of the levels in each
            layer, float32 `(H, L)` each.
    """

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`HKTForCausalLM`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTMaskedLMOutput(MaskedLMOutput):
    """Output of [`HKTForMaskedLM`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTSequenceClassifierOutput(SequenceClassifierOutput):
    """Output of [`HKTForSequenceClassification`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTTokenClassifierOutput(TokenClassifierOutput):
    """Output of [`HKTForTokenClassification`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Output of [`HKTForQuestionAnswering`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HKTMultipleChoiceOutput(MultipleChoiceModelOutput):
    """Output of [`HKTForMultipleChoice`]: that of transformers, and `level_weights` as in [`HKTModelOutput`]."""

    level_weights: tuple[torch.FloatTensor, ...] | None = None


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, or under tensor parallelism the part of it that this process has."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class HKTAttention(nn.Module):
    """Multi-head attention at `num_levels` resolutions under one softmax (arXiv 2604.08829).

    Level 0 is the input; each further level is a causal downsampling of the one before it. Every level has scores of
    its own queries and keys; they are upsampled and mixed with learned convex weights, one row a head.
    """

    def __init__(self, config: HKTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_levels = config.num_levels
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_decoder
        self.score_symmetry = config.score_symmetry

        width = self.num_heads * self.head_dim
        num_projections = 1 if config.share_level_projections else self.num_levels

        def projections() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Linear(config.hidden_size, width, bias=config.attention_bias) for _ in range(num_projections)
            )

        self.q_proj = projections()
        if self.score_symmetry == "none":
            self.k_proj = projections()
        elif self.score_symmetry == "symmetric":
            # One factor a rotated pair of features: it commutes with the rotation.
            num_factors = self.head_dim // 2 if config.position_embedding_type == "rope" else self.head_dim
            self.key_factors = nn.Parameter(torch.ones(num_projections, self.num_heads, num_factors))
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.downsample = nn.ModuleList(
            CausalDownsample(config.hidden_size, config.downsample_kernel_size, config.downsample_type)
            for _ in range(self.num_levels - 1)
        )
        self.level_logits = nn.Parameter(torch.zeros(self.num_heads, self.num_levels))

    def level_weights(self) -> torch.Tensor:
        """Convex weights of the levels, float32 or wider, `(H, L)`; under tensor parallelism of this process's heads."""
        logits = _local(self.level_logits)
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def levels(
        self,
        hidden_states: torch.Tensor,
        cache_layer: HKTCacheLayer | None = None,
        cache_step: CacheStep | None = None,
    ) -> list[torch.Tensor]:
        """Features of all levels, `L` tensors `(B, ceil(T / 2**l), d)`, from `hidden_states (B, T, d)`.

        With a cache, those of the blocks that start in the step.
        """
        levels = [hidden_states]
        for level, downsample in enumerate(self.downsample, start=1):
            if cache_layer is None:
                levels.append(downsample(levels[-1]))
            else:
                inputs = cache_layer.level_inputs(level, levels[-1], cache_step)
                levels.append(downsample(inputs, has_history=True))
        return levels

    def queries_and_keys(
        self,
        features: torch.Tensor,
        level: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of one level, `(B, H, T_l, p)` each, rotated by `position_embeddings` if there are any.

        With `score_symmetry="psd"` they are the same, with `"symmetric"` the keys are queries times `key_factors`.

        Args:
            features (`torch.Tensor`): of the level, `(B, T_l, d)`.
            level (`int`): which one.
            position_embeddings (`tuple`, *optional*): cosines and sines of the blocks that get a query.
            query_features (`torch.Tensor`, *optional*): of the blocks that get a query, if there are more of these: keys
                are of the last ones.
        """
        projection = min(level, len(self.q_proj) - 1)
        if query_features is None:
            query_features = features
        first = query_features.shape[1] - features.shape[1]
        query = self._split_heads(self.q_proj[projection](query_features))
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query = apply_rotary_pos_emb(query, cos, sin)
        if self.score_symmetry != "none":
            key = query[:, :, first:]
            if self.score_symmetry == "symmetric":
                factors = _local(self.key_factors)[projection, :, None].to(key.dtype)
                key = key * factors.repeat(1, 1, self.head_dim // factors.shape[-1])
            return query, key
        key = self._split_heads(self.k_proj[projection](features))
        if position_embeddings is not None:
            key = apply_rotary_pos_emb(key, cos[:, first:], sin[:, first:])
        return query, key

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        # All heads, or under tensor parallelism those of this process.
        if states.shape[-1] % self.head_dim:
            raise ValueError(
                f"`num_attention_heads` ({self.num_heads}) must be a multiple of the tensor-parallel size: "
                f"{states.shape[-1]} of {self.num_heads * self.head_dim} columns are no whole heads of {self.head_dim}"
            )
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        layout: SequenceLayout | None = None,
        past_key_values: Cache | None = None,
        cache_step: CacheStep | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Attend; returns the output `(B, T, d)`, weights `(B, H, T, T)` or `None`, and level weights `(H, L)`.

        With a `layout`, mask and position embeddings are those of its sequences. `position_embeddings` has a pair for
        each level, of the blocks that get a query.
        """
        if layout is not None:
            hidden_states = layout.to_sequences(hidden_states)
        continues = past_key_values is not None and cache_step.continues
        cache_layer = past_key_values.layers[self.layer_idx] if continues else None
        queries, keys = [], []
        levels = self.levels(hidden_states, cache_layer, cache_step)
        for level, features in enumerate(levels):
            query_features = None
            if continues and level > 0:
                # The first of the new tokens may belong to a block that has started before.
                current = cache_layer.current_block(level).to(features.dtype)
                query_features = torch.cat([current, features], dim=1)
            rotation = None if position_embeddings is None else position_embeddings[level]
            query, key = self.queries_and_keys(features, level, rotation, query_features)
            queries.append(query)
            keys.append(key)
        value = self._split_heads(self.v_proj(hidden_states))
        level_weights = self.level_weights()
        if past_key_values is not None:
            all_keys, all_values = past_key_values.update(keys, value, self.layer_idx, levels, cache_step)
        if continues:
            attn_output, attn_weights = attend_to_cache(
                [query if level == 0 else cache_step.pick(query, level) for level, query in enumerate(queries)],
                all_keys,
                all_values,
                level_weights,
                attention_mask,
                scaling=self.scaling,
                dropout=self.attention_dropout if self.training else 0.0,
                output_weights=self.config._attn_implementation == "eager",
            )
            attn_output = self.o_proj(attn_output.flatten(2))
            attn_weights = None if attn_weights is None else cache_layer.weights_to_rows(attn_weights, layout)
            return attn_output if layout is None else layout.to_rows(attn_output), attn_weights, level_weights

        implementation = self.config._attn_implementation
        backend = attention_backend(implementation, queries, attention_mask)
        if backend is not None or implementation == "auto":
            implementation = "sdpa"
        # `None` stands for eager: it works on the levels themselves.
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
        # A function that no mask is made for, such as that of an inference server, knows itself what the rows hold.
        on_rows = layout is not None and implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        if layout is not None and not on_rows:
            kwargs = {name: value for name, value in kwargs.items() if name not in ROW_BOUNDARIES}
        attn_output, attn_weights = dispatch_attention(
            attention_interface,
            self,
            queries,
            keys,
            value,
            level_weights,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            layout=layout if on_rows else None,
            backend=backend,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.flatten(2))
        if layout is not None and not on_rows:
            attn_output = layout.to_rows(attn_output)
            attn_weights = None if attn_weights is None else layout.weights_to_rows(attn_weights)
        return attn_output, attn_weights, level_weights


class HKTLayer(GradientCheckpointingLayer):
    """Transformer layer: attention and feed-forward, each with a residual connection.

    `config.norm_placement` says whether the layer norms stand before attention and feed-forward ("pre") or after the
    residual sums ("post", as in BERT).
    """

    def __init__(self, config: HKTConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HKTAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.norm_placement = config.norm_placement
        if self.norm_placement == "pre":
            self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if self.norm_placement == "post":
            self.post_feedforward_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        layout: SequenceLayout | None = None,
        past_key_values: Cache | None = None,
        cache_step: CacheStep | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        is_pre_norm = self.norm_placement == "pre"
        attn_output, *_ = self.self_attn(
            self.input_layernorm(hidden_states) if is_pre_norm else hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            layout=layout,
            past_key_values=past_key_values,
            cache_step=cache_step,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attn_output)
        normalized = self.post_attention_layernorm(hidden_states)
        residual = hidden_states if is_pre_norm else normalized
        hidden_states = residual + self.dropout(self.mlp(normalized))
        return hidden_states if is_pre_norm else self.post_feedforward_layernorm(hidden_states)


class HKTPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all HKT models."""

    config: HKTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HKTLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HKTLayer,
        "attentions": HKTAttention,
        "level_weights": OutputRecorder(HKTAttention, index=2),
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """As in transformers; ValueError where the heads are too wide for flash attention."""
        width = self.config.num_levels * self.config.head_dim
        wants_flash = is_flash_attention_requested(requested_attention_implementation=attn_implementation)
        if wants_flash and width > MAX_FLASH_WIDTH:
            raise ValueError(
                f"`attn_implementation` {attn_implementation!r} takes heads of at most {MAX_FLASH_WIDTH} features, and "
                f"those of this model have `num_levels` * `head_dim` = {self.config.num_levels} * "
                f"{self.config.head_dim} = {width}: use 'sdpa' or 'flex_attention'"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, with HKT's own names: "auto" (the default) and the backends of its operator."""
        if requested_attention is None:
            return "auto"
        if requested_attention in ("auto", *MODEL_BACKENDS):
            return requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HKTAttention):
            init.zeros_(module.level_logits)
            if module.score_symmetry == "symmetric":
                init.ones_(module.key_factors)
        elif isinstance(module, CausalDownsample):
            init.copy_(module.weight, module.mean_weight())

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers; when the code travels along, `auto_map` names every class that the checkpoint serves."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        self.config.validate()  # before anything is written
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_flat(
        cls, model_or_path: PreTrainedModel | str | os.PathLike, *, level_0_weight: float = 0.9, **kwargs
    ) -> "HKTPreTrainedModel":
        """Start from a pretrained BERT-like encoder: the first forward is the encoder's, training adds resolution (ours).

        Level 0 takes the encoder's weights. The coarser levels take its key projections and query projections of zero,
        so that their scores are zero at first; the mix gives level 0 the weight `level_0_weight`, and level 0's query
        projection is divided by it. Hidden states equal the encoder's to rounding for sequences padded on the right
        (on the left HKT counts positions from the first real token, as RoBERTa does and BERT does not).

        Args:
            model_or_path (`PreTrainedModel` or `str` or `os.PathLike`): an encoder of the type BERT, RoBERTa, XLM-RoBERTa,
                CamemBERT, ELECTRA (with `embedding_size == hidden_size`) or DistilBERT, with or without a head, or its
                path or Hub id. It is left as it is. Its dtype and device are kept.
            level_0_weight (`float`, *optional*, defaults to 0.9): weight of level 0 in the mix of every head, between 0
                and 1; the other levels share the rest.
            kwargs: fields of [`HKTConfig`] that the encoder leaves open, as `num_levels`, `downsample_kernel_size`,
                `pooling` (the mean by default, which no BERT head uses), dropouts and `num_labels`, and
                `attn_implementation`. Dropouts, labels and special tokens are the encoder's by default.

        Returns:
            `cls`, in evaluation mode. A masked-language-model head is taken along into [`HKTForMaskedLM`], which then
            gives the same logits; so are a classifier of tokens with as many labels and a question-answering head. BERT's
            sequence classifiers read a pooler, which HKT has not: those heads begin untrained. What is not used and
            what is new is logged as a warning.

        Raises:
            ValueError: a model that is not such an encoder (decoders, cross-attention, relative positions, other types),
                a quantized one or one without values, `level_0_weight` outside (0, 1), an unknown field, or one that
                contradicts the encoder or the equality (`share_level_projections=True`, `is_decoder=True`).

        Example:

        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from hkt_hf import HKTForSequenceClassification

        >>> bert = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
        >>> model = HKTForSequenceClassification.from_flat(bert, num_levels=3, num_labels=5)
        >>> model.config.norm_placement, model.config.num_levels, model.config.num_labels
        ('post', 3, 5)

        ```
        """
        return warm_start(cls, model_or_path, level_0_weight, kwargs)


class HKTModel(HKTPreTrainedModel):
    """HKT without a head, token ids to hidden states: an encoder, or with `config.is_decoder` a causal decoder.

    Args:
        config (`HKTConfig`): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from hkt_hf import HKTConfig, HKTModel

    >>> model = HKTModel(HKTConfig(vocab_size=100, hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
    >>> model(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
    torch.Size([1, 3, 32])

    ```
    """

    def __init__(self, config: HKTConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        if config.position_embedding_type == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = RotaryEmbedding(config)
        if config.type_vocab_size > 0:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.norm_placement == "post":
            self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(HKTLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        if config.norm_placement == "pre":
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTModelOutput:
        """Encode a batch of sequences, padded on the right or on the left, or packed several to a row.

        A sequence gives the same numbers wherever it lies: blocks of the coarser levels are counted from its first
        token.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real tokens, 0 for padding, on one
                side of the batch; with a cache `(B, cached + T)`. Or `(1 or B, 1 or H, T, cached + T)`, bool (True =
                attend) or additive: it replaces the mask of the scores (eager and sdpa only). The coarser levels'
                features still mix neighbouring tokens, so it can't keep sequences apart.
            token_type_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): which part of a pair a token belongs to,
                in `[0, type_vocab_size)`; all 0 by default. A model without token types takes only zeros.
            position_ids (`torch.LongTensor` of shape `(B, T)` or `(1, T)`, *optional*): by default they count from the
                first real token of a row. Where they restart at 0 a new sequence begins: packed sequences do not
                attend to each other.
            past_key_values (`Cache`, *optional*): of a decoder, what an earlier call returned, or an empty
                `DynamicCache()`; the input continues the cached tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, d)`, *optional*): instead of `input_ids`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): whether a decoder makes and returns a cache.
                None is made for packed sequences, under gradient checkpointing, and in compiled code.
            kwargs: `output_hidden_states`, `output_attentions` (eager only), `output_level_weights`, `return_dict`;
                `cu_seq_lens_q` (int `(sequences + 1,)`: where each sequence of a single packed row begins, and the row's
                length) stands for `position_ids` where these are not given.

        Returns:
            [`HKTModelOutput`]

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, a token id or type outside its vocabulary, a
                sequence longer than the position table, a mask of another shape, with gaps, or with padding on both sides,
                position ids that neither count on nor restart at 0, a cache for an encoder, a cache that can't hold
                several levels, or a mask or positions that do not continue it. Compiled code raises a RuntimeError for
                a mask with gaps and for packed sequences, when it runs; it does not check token ids. An exported
                program serves every batch size and every length from `2**(num_levels - 1) + 1` on (pad what is
                shorter); ONNX keeps none of these checks.
        """
        if "is_causal" in kwargs:
            raise ValueError(
                f"`is_causal` ({kwargs['is_causal']}) can't be given: the configuration's `is_decoder` "
                f"({self.config.is_decoder}) says it"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        past_length = self._check_cache(past_key_values)
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = _packed_positions(
                kwargs["cu_seq_lens_q"], (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            )
        _check_inputs(self.config, input_ids, attention_mask, position_ids, inputs_embeds, past_length)
        _check_token_types(
            self.config, token_type_ids, (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = use_cache and self.config.is_decoder and not (self.gradient_checkpointing and self.training)
        if past_key_values is not None or (use_cache and not torch.compiler.is_compiling()):
            past_key_values = prepare_cache(past_key_values, self.config)

        layout, past_key_values, cache_step = self._place_tokens(
            inputs_embeds, attention_mask, position_ids, past_key_values, past_length
        )
        hidden_states = self._embed(inputs_embeds, token_type_ids, layout, cache_step)
        position_embeddings = self._rotary_embeddings(hidden_states, layout, cache_step)
        mask = self._attention_mask(hidden_states, attention_mask, layout, cache_step)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                layout=layout,
                past_key_values=past_key_values,
                cache_step=cache_step,
                **kwargs,
            )
        if self.config.norm_placement == "pre":
            hidden_states = self.norm(hidden_states)
        return HKTModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _place_tokens(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        past_length: int,
    ) -> tuple[SequenceLayout | None, Cache | None, CacheStep | None]:
        """Where the tokens lie: the layout of the new columns, the cache, and where they go in it."""
        batch_size, num_columns, device = *inputs_embeds.shape[:2], inputs_embeds.device
        padding_mask = None if _is_score_mask(attention_mask) else attention_mask
        if past_length > 0:
            cache_layer = past_key_values.layers[self._first_layer()]
            layout, cache_step = plan_next_step(cache_layer, padding_mask, position_ids, num_columns, device)
            return layout, past_key_values, cache_step

        layout = find_layout(padding_mask, position_ids, batch_size, num_columns)
        if layout is not None and layout.mask.shape != (batch_size, num_columns):  # packed
            if _is_score_mask(attention_mask):
                raise ValueError("`position_ids` restart within a row: packed sequences need a mask (batch, length)")
            return layout, None, None
        if past_key_values is None:
            return layout, None, None
        real = None if padding_mask is None or (padding_mask != 0).all() else padding_mask.to(device) != 0
        counts = num_columns if real is None else real.sum(1)
        cache_step = plan_step(
            0, counts, real, num_columns, continues=False, num_levels=self.config.num_levels, device=device
        )
        return layout, past_key_values, cache_step

    def _embed(
        self,
        inputs_embeds: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        layout: SequenceLayout | None,
        cache_step: CacheStep | None,
    ) -> torch.Tensor:
        """What the first layer reads: token embeddings with token types, absolute positions and norm, where used."""
        limit = self.config.max_position_embeddings
        if self.config.position_embedding_type == "absolute":
            total = _num_positions(inputs_embeds, layout, cache_step)
            if total > limit:
                raise ValueError(
                    f"the input has {total} tokens, more than `max_position_embeddings` ({limit}): truncate it, for "
                    "instance with `truncation=True` in the tokenizer"
                )
        if self._first_layer() > 0:  # hidden states of the stage before this one
            return self.dropout(inputs_embeds)
        if self.config.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=inputs_embeds.device)
            inputs_embeds = inputs_embeds + self.embed_token_types(token_type_ids)
        if self.config.position_embedding_type == "absolute":
            positions = _positions(inputs_embeds, layout, cache_step)
            if layout is not None:
                positions = positions.expand(layout.mask.shape[0], -1).flatten()[layout.scatter_index]
            inputs_embeds = inputs_embeds + self.embed_positions(positions.clamp(max=limit - 1))  # padded columns
        if self.config.norm_placement == "post":
            inputs_embeds = self.embed_norm(inputs_embeds)
        return self.dropout(inputs_embeds)

    def _rotary_embeddings(
        self, hidden_states: torch.Tensor, layout: SequenceLayout | None, cache_step: CacheStep | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Cosines and sines, for each level of the blocks that get a query; `None` with absolute positions."""
        if self.config.position_embedding_type == "absolute":
            return None
        if cache_step is not None and cache_step.continues:
            block_positions = cache_step.block_positions()
            cos, sin = self.rotary_emb(hidden_states, torch.cat(block_positions, dim=1))
            sizes = [positions.shape[1] for positions in block_positions]
            return list(zip(cos.split(sizes, dim=1), sin.split(sizes, dim=1), strict=True))
        embeddings = [self.rotary_emb(hidden_states, _positions(hidden_states, layout, cache_step))]
        for _ in range(1, self.config.num_levels):
            # A block has the position of its first token.
            cos, sin = embeddings[-1]
            embeddings.append((cos[:, ::2], sin[:, ::2]))
        return embeddings

    def _attention_mask(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout | None,
        cache_step: CacheStep | None,
    ) -> torch.Tensor | None:
        """The mask that the chosen implementation takes, for the sequences."""
        if _is_score_mask(attention_mask):
            return attention_mask
        if cache_step is not None and cache_step.continues:
            return cache_step.causal_mask()
        if layout is not None:
            attention_mask = layout.mask
            hidden_states = hidden_states.new_empty(*layout.mask.shape, 1)  # its shape is what is read
        takes_padding = self.config._attn_implementation in ("auto", "sdpa", *MODEL_BACKENDS)
        if self.config.is_decoder:
            # Sequences are padded on the right, so that causality alone hides the padding from every real token.
            if takes_padding:
                return None
            return create_causal_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
            )
        if not takes_padding:
            return create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        # Not the library's mask, which has T x T entries for every row of the batch.
        if attention_mask is None or (values_can_be_read(attention_mask) and attention_mask.all()):
            return None
        return broadcast_padding_mask(attention_mask != 0)

    def _first_layer(self) -> int:
        """Index of the first layer that this process has.

        Above 0 it is a later stage of a pipeline: its `inputs_embeds` are the hidden states of the stage before it.
        """
        return next((index for index, layer in enumerate(self.layers) if hasattr(layer, "self_attn")), 0)

    def _check_cache(self, past_key_values: Cache | None) -> int:
        """Columns that the cache holds; ValueError where this model can't use it."""
        if past_key_values is None:
            return 0
        if not self.config.is_decoder:
            raise ValueError(
                "`past_key_values` can't be given to an encoder: set `is_decoder=True` in the configuration"
            )
        past_length = prepare_cache(past_key_values, self.config).get_seq_length(self._first_layer())
        if past_length > 0 and self.gradient_checkpointing and self.training:
            raise ValueError(
                f"`past_key_values` ({past_length} tokens) can't be continued under gradient checkpointing: call "
                "`model.eval()` or `model.gradient_checkpointing_disable()`"
            )
        return past_length


def _is_score_mask(attention_mask: torch.Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dim() == 4


def _positions(states: torch.Tensor, layout: SequenceLayout | None, cache_step: CacheStep | None) -> torch.Tensor:
    """Positions of the tokens of each sequence, `(1 or S, M)`."""
    if cache_step is not None:
        return cache_step.positions
    length = states.shape[1] if layout is None else layout.mask.shape[1]
    return torch.arange(length, device=states.device).unsqueeze(0)


def _num_positions(states: torch.Tensor, layout: SequenceLayout | None, cache_step: CacheStep | None) -> int:
    """Positions that the longest sequence needs."""
    if cache_step is not None and cache_step.continues:
        return cache_step.levels[0].capacity
    return states.shape[1] if layout is None else layout.mask.shape[1]


class HKTForCausalLM(HKTPreTrainedModel, GenerationMixin):
    """HKT decoder with a language-model head, tied to the token embeddings by `config.tie_word_embeddings`.

    No paper has an autoregressive HKT; this one is ours. Because every level is causal, `generate` keeps one key for each
    started block and level instead of lifted keys: 1.375 times a flat cache at `num_levels=3`.

    Args:
        config (`HKTConfig`): the configuration, with `is_decoder=True`.

    Raises:
        ValueError: `config.is_decoder` is `False`.

    Example:

    ```python
    >>> import torch
    >>> from hkt_hf import HKTConfig, HKTForCausalLM

    >>> config = HKTConfig(
    ...     vocab_size=100, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, is_decoder=True
    ... )
    >>> model = HKTForCausalLM(config).eval()
    >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _can_compile_fullgraph = False  # without a cache it can; a step with one reads how many tokens each row has
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HKTConfig):
        if not config.is_decoder:
            raise ValueError(
                f"`is_decoder` ({config.is_decoder}) must be True in the configuration of {type(self).__name__}: a "
                "bidirectional model sees the tokens that it is to predict"
            )
        super().__init__(config)
        self.model = HKTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTCausalLMOutput:
        """Score every token of the vocabulary as the next one, at every position.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, past_key_values, inputs_embeds, use_cache, kwargs:
                as in [`HKTModel.forward`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): token ids, -100 to ignore; the loss shifts them.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): logits of the last so many columns, or of
                these columns; 0 = all.

        Returns:
            [`HKTCausalLMOutput`]: `logits (B, T, vocab_size)`.

        Raises:
            ValueError: as [`HKTModel.forward`], or labels of another shape or dtype or outside `[0, vocab_size)`.
        """
        labels = check_token_labels(labels, input_ids, inputs_embeds, "vocab_size", self.config.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, columns])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return HKTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be None or 'dynamic', got {implementation!r}: static, quantized and "
                "offloaded caches can't hold keys of several levels"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Before any token is fed: assisted decoding asks the layers to record what `crop` will need.
        if model_kwargs.get("past_key_values") is not None:
            cache = prepare_cache(model_kwargs["past_key_values"], self.config)
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()


class HKTForMaskedLM(HKTPreTrainedModel):
    """HKT encoder with a masked-language-model head, tied to the token embeddings by `config.tie_word_embeddings`.

    Args:
        config (`HKTConfig`): the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HKTConfig):
        if config.is_decoder:
            raise ValueError("`is_decoder` (True) must be False in the configuration of a masked language model")
        super().__init__(config)
        self.model = HKTModel(config)
        self.head = PredictionHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTMaskedLMOutput:
        """Score every token of the vocabulary at every position.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs: as in [`HKTModel.forward`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): the masked tokens' ids, -100 elsewhere.

        Returns:
            [`HKTMaskedLMOutput`]: `logits (B, T, vocab_size)`.

        Raises:
            ValueError: as [`HKTModel.forward`], or labels of another shape or dtype or outside `[0, vocab_size)`.
        """
        labels = check_token_labels(labels, input_ids, inputs_embeds, "vocab_size", self.config.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(self.head(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return HKTMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )


class HKTForSequenceClassification(HKTPreTrainedModel):
    """HKT encoder with pooling and a linear head: single-label or multi-label classification, or regression.

    `config.problem_type` names the task; when it is `None` it follows from `num_labels` and the dtype of the labels,
    as everywhere in transformers. `config.pooling` says what the head reads.

    Args:
        config (`HKTConfig`): the configuration.
    """

    # The loss is a mean over the sequences of a micro-batch, so the Trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: HKTConfig):
        _check_pooling(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HKTModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTSequenceClassifierOutput:
        """Classify a batch of sequences, one a row.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs: as in [`HKTModel.forward`].
            labels (`torch.Tensor`, *optional*): int64 `(B,)` in `[0, num_labels)` (or -100 to ignore a row) for one
                label, `(B, num_labels)` in `[0, 1]` for several labels, `(B,)` or `(B, num_labels)` for regression.

        Returns:
            [`HKTSequenceClassifierOutput`]

        Raises:
            ValueError: as [`HKTModel.forward`], packed sequences, or labels of another shape or outside their range.
        """
        _check_one_sequence_a_row(attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        tokens = inputs_embeds if input_ids is None else input_ids
        if labels is not None and tokens is not None:
            # In float32 or wider: half precision would round the targets of a regression.
            dtype = torch.promote_types(self.model.embed_tokens.weight.dtype, torch.float32)
            labels = check_sequence_labels(self.config, labels, (tokens.shape[0], self.num_labels), dtype)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.to(dtype), config=self.config)
        return HKTSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )


class HKTForTokenClassification(HKTPreTrainedModel):
    """HKT encoder with a linear classifier of every token.

    Args:
        config (`HKTConfig`): the configuration.
    """

    def __init__(self, config: HKTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HKTModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTTokenClassifierOutput:
        """Classify every token.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs: as in [`HKTModel.forward`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): classes, or -100 to ignore a token.

        Returns:
            [`HKTTokenClassifierOutput`]: `logits (B, T, num_labels)`.

        Raises:
            ValueError: as [`HKTModel.forward`], or labels of another shape or dtype or outside `[0, num_labels)`.
        """
        labels = check_token_labels(labels, input_ids, inputs_embeds, "num_labels", self.num_labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return HKTTokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )


class HKTForQuestionAnswering(HKTPreTrainedModel):
    """HKT encoder with scores for the first and the last token of an answer.

    Args:
        config (`HKTConfig`): the configuration.
    """

    # The loss is a mean over the sequences of a micro-batch, so the Trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: HKTConfig):
        super().__init__(config)
        self.model = HKTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTQuestionAnsweringOutput:
        """Score every token as the first and as the last of the answer.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs: as in [`HKTModel.forward`].
            start_positions, end_positions (`torch.LongTensor` of shape `(B,)`, *optional*): columns of the first and of
                the last token of the answer; columns beyond the input (a truncated answer) are ignored, as everywhere
                in transformers.

        Returns:
            [`HKTQuestionAnsweringOutput`]: `start_logits` and `end_logits`, `(B, T)` each.

        Raises:
            ValueError: as [`HKTModel.forward`], one of the positions without the other, positions of another shape or
                dtype or below 0, or positions in packed sequences.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("`start_positions` and `end_positions` must be given together")
        tokens = inputs_embeds if input_ids is None else input_ids
        if start_positions is not None and tokens is not None:
            if attention_mask is None or attention_mask.dim() == 2:
                _check_one_sequence_a_row(attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
            start_positions = _check_answer("start_positions", start_positions, tokens.shape[0])
            end_positions = _check_answer("end_positions", end_positions, tokens.shape[0])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None:
            positions = (columns.to(start_logits.device) for columns in (start_positions, end_positions))
            loss = self.loss_function(start_logits.float(), end_logits.float(), *positions)
        return HKTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )


class HKTForMultipleChoice(HKTPreTrainedModel):
    """HKT encoder that gives each of several sequences one score; `config.pooling` says what the score is read from.

    Args:
        config (`HKTConfig`): the configuration.
    """

    # The loss is a mean over the questions of a micro-batch, so the Trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: HKTConfig):
        _check_pooling(config)
        super().__init__(config)
        self.model = HKTModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HKTMultipleChoiceOutput:
        """Score the `C` choices of each question.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, C, T)`, *optional*): token ids.
            attention_mask, token_type_ids, position_ids (`torch.Tensor` of shape `(B, C, T)`, *optional*): as in
                [`HKTModel.forward`].
            inputs_embeds (`torch.FloatTensor` of shape `(B, C, T, d)`, *optional*): instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): the right choice, in `[0, C)`, or -100 to ignore a
                question.
            kwargs: as in [`HKTModel.forward`].

        Returns:
            [`HKTMultipleChoiceOutput`]: `logits (B, C)`.

        Raises:
            ValueError: as [`HKTModel.forward`], inputs without a dimension of choices, packed sequences, or labels of
                another shape or dtype or outside `[0, C)`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        name, tokens, rank = ("inputs_embeds", inputs_embeds, 4) if input_ids is None else ("input_ids", input_ids, 3)
        if tokens.dim() != rank or tokens.shape[1] < 1:
            shape = "(batch, choices, length" + (", hidden_size)" if rank == 4 else ")")
            raise ValueError(f"`{name}` must have shape {shape} with at least 1 choice, got {tuple(tokens.shape)}")
        batch_size, num_choices = tokens.shape[:2]
        for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if tensor is not None and tensor.shape != tokens.shape[:3]:
                raise ValueError(
                    f"`{name}` must have shape (batch, choices, length) = {tuple(tokens.shape[:3])}, "
                    f"got {tuple(tensor.shape)}"
                )

        def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        attention_mask, position_ids = flat(attention_mask), flat(position_ids)
        _check_one_sequence_a_row(attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        if labels is not None:
            labels = check_class_labels(labels, (batch_size,), "choices", num_choices)
        outputs = self.model(
            input_ids=flat(input_ids),
            attention_mask=attention_mask,
            token_type_ids=flat(token_type_ids),
            position_ids=position_ids,
            inputs_embeds=flat(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled)).view(batch_size, num_choices)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
        return HKTMultipleChoiceOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_weights=outputs.level_weights,
        )


def _check_inputs(config, input_ids, attention_mask, position_ids, inputs_embeds, past_length=0) -> None:
    batch_size, length = check_tokens(input_ids, inputs_embeds, config.vocab_size)
    if attention_mask is not None:
        total = past_length + length
        if attention_mask.dim() == 4:
            _check_score_mask(config, attention_mask, batch_size, length, total)
        elif tuple(attention_mask.shape) != (batch_size, total):
            name = "(batch, length)" if past_length == 0 else "(batch, cached + new)"
            raise ValueError(
                f"`attention_mask` must have shape {name} = {(batch_size, total)}, got {tuple(attention_mask.shape)}"
            )
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
            raise ValueError(
                f"`position_ids` must have shape {(batch_size, length)} or {(1, length)}, "
                f"got {tuple(position_ids.shape)}"
            )


def _packed_positions(boundaries: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """`position_ids (1, T)` of one row of packed sequences, from where each begins and the last one ends."""
    batch_size, length = shape
    is_one_row = batch_size == 1 and boundaries.dim() == 1 and boundaries.shape[0] > 1
    if not is_one_row or (values_can_be_read(boundaries) and (boundaries[0] != 0 or boundaries[-1] != length)):
        raise ValueError(
            f"`cu_seq_lens_q` must be where each sequence of a single row begins, from 0 on, and the row's length, {length}; "
            f"got {boundaries.tolist() if values_can_be_read(boundaries) else tuple(boundaries.shape)} for {batch_size} rows"
        )
    starts = boundaries[:-1].repeat_interleave(boundaries.diff(), output_size=length)
    return (torch.arange(length, device=boundaries.device) - starts)[None]


def _check_token_types(config: HKTConfig, token_type_ids: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if token_type_ids is None:
        return
    if tuple(token_type_ids.shape) != tuple(shape):
        raise ValueError(
            f"`token_type_ids` must have shape (batch, length) = {tuple(shape)}, got {tuple(token_type_ids.shape)}"
        )
    if not values_can_be_read(token_type_ids):
        return
    outside = (token_type_ids < 0) | (token_type_ids >= max(config.type_vocab_size, 1))
    if outside.any():
        found = token_type_ids[outside][0].item()
        if config.type_vocab_size == 0:
            raise ValueError(
                f"`token_type_ids` must be all 0 in a model without token types (`type_vocab_size` is 0), got {found}"
            )
        raise ValueError(
            f"`token_type_ids` must lie in [0, type_vocab_size) = [0, {config.type_vocab_size}), got {found}"
        )


def _check_score_mask(config, mask, batch_size, length, total) -> None:
    rows, heads, *lengths = mask.shape
    if rows not in (1, batch_size) or heads not in (1, config.num_attention_heads) or lengths != [length, total]:
        raise ValueError(
            f"a 4-D `attention_mask` must have shape (1 or batch, 1 or heads, length, all keys) = (1 or {batch_size}, 1 "
            f"or {config.num_attention_heads}, {length}, {total}), got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D `attention_mask` must be bool (True = attend) or additive, got {mask.dtype}")
    if config._attn_implementation not in ("auto", "eager", "sdpa"):
        raise ValueError(
            "a 4-D `attention_mask` needs `attn_implementation` 'auto', 'eager' or 'sdpa', got "
            f"{config._attn_implementation!r}"
        )


def _check_pooling(config: HKTConfig) -> None:
    if config.is_decoder and config.pooling != "last":
        raise ValueError(
            f"`pooling` ({config.pooling!r}) must be 'last' with `is_decoder=True`: only the last token of a causal model "
            "has seen the whole sequence"
        )


def _check_one_sequence_a_row(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, boundaries: torch.Tensor | None
) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` must have shape (batch, length) where sequences are pooled, got "
            f"{tuple(attention_mask.shape)}"
        )
    if position_ids is None and boundaries is not None and boundaries.shape[0] > 2:
        raise ValueError(
            f"`cu_seq_lens_q` names {boundaries.shape[0] - 1} sequences: packed sequences can't be pooled, give one a row"
        )
    if position_ids is None or not values_can_be_read(position_ids):
        return
    starts = position_ids == 0
    if attention_mask is not None:
        if attention_mask.shape[1] != position_ids.shape[-1]:
            return  # the model names the one of wrong shape
        starts = starts & (attention_mask != 0)
    if (starts.sum(dim=-1) > 1).any():
        raise ValueError("`position_ids` restart within a row: packed sequences can't be pooled, give one a row")


def _check_answer(name: str, columns: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Columns of answers as int64 `(B,)`; ValueError for another shape or dtype, or below 0."""
    if tuple(columns.shape) not in ((batch_size,), (batch_size, 1)):
        raise ValueError(f"`{name}` must have shape {(batch_size,)}, got {tuple(columns.shape)}")
    check_integers(name, columns)
    if values_can_be_read(columns) and (columns < 0).any():
        raise ValueError(f"`{name}` must be columns of the input, at least 0, got {columns[columns < 0][0].item()}")
    return columns.long().view(batch_size)


__all__ = [
    "HKTForCausalLM",
    "HKTForMaskedLM",
    "HKTForMultipleChoice",
    "HKTForQuestionAnswering",
    "HKTForSequenceClassification",
    "HKTForTokenClassification",
    "HKTModel",
    "HKTPreTrainedModel",
]
