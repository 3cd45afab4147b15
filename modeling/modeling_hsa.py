# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""PyTorch HSA encoder, top to bottom: sibling positions, attention, layer, model, heads."""

import itertools
import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_hsa import check_is_tree, hierarchical_self_attention, tree_levels
from .checks_common import check_sequence_labels, check_token_labels, check_tokens
from .configuration_hsa import HSAConfig
from .layers_common import MLP, PredictionHead, RotaryEmbedding, apply_rotary_pos_emb, classifier_dropout, pool
from .tree_hsa import SignalTree


AUTO_CLASSES = {
    "AutoModel": "HSAModel",
    "AutoModelForMaskedLM": "HSAForMaskedLM",
    "AutoModelForSequenceClassification": "HSAForSequenceClassification",
}
AUTO_MAP = {
    "AutoConfig": "configuration_hsa.HSAConfig",
    **{auto_class: f"modeling_hsa.{name}" for auto_class, name in AUTO_CLASSES.items()},
}

SIBLING_POSITION_INIT = 0.1


class HSASiblingPositions(nn.Module):
    """Position vectors of the places among siblings: sinusoids with trained amplitudes, by level and head (ours).

    Their products are `sum_f amplitude[f]^2 cos((place - other place) * frequency[f])`: a trained bias by distance, for families
    of any size, small at first.
    """

    def __init__(self, config: HSAConfig):
        super().__init__()
        self.num_levels = config.num_tree_levels
        self.num_frequencies = config.head_dim // 2
        self.amplitude = nn.Parameter(
            torch.full(
                (config.num_tree_levels, config.num_attention_heads, self.num_frequencies), SIBLING_POSITION_INIT
            )
        )

    def forward(self, sizes: Sequence[int], levels: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Vectors `(H, size, 2 * frequencies)` for families of at most these sizes, one size a level of the tree.

        `levels` are the tree's `unsplit_levels`, which choose the amplitudes: runs of a large family have those of the family.
        """
        device = self.amplitude.device
        dtype = torch.promote_types(self.amplitude.dtype, torch.float32)
        frequencies = 1e4 ** -(torch.arange(self.num_frequencies, device=device, dtype=dtype) / self.num_frequencies)
        vectors = []
        for level, size in zip(range(len(sizes)) if levels is None else levels, sizes, strict=True):
            angles = torch.arange(size, device=device)[:, None] * frequencies
            amplitude = self.amplitude[min(level, self.num_levels - 1)][:, None].to(dtype)
            vectors.append(torch.cat([amplitude * angles.cos(), amplitude * angles.sin()], dim=-1))
        return vectors


class HSAAttention(nn.Module):
    """Multi-head self-attention along a tree (arXiv 2509.15448)."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        if config.sibling_positions:
            self.sibling_positions = HSASiblingPositions(config)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tree: SignalTree,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, None]:
        """Attend: `(B, N, hidden_size)` to the same."""
        query, key, value = (
            self._split_heads(projection(hidden_states)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query = self.q_norm(query)
            key = F.layer_norm(key, (self.head_dim,), eps=self.config.layer_norm_eps)
        if position_embeddings is not None:
            query, key = (apply_rotary_pos_emb(states, *position_embeddings) for states in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self._is_flat(tree):
            mask = None if bool(tree.mask.all()) else tree.mask[:, None, None, :]
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        else:
            output = hierarchical_self_attention(
                query,
                key,
                value,
                tree,
                eps=self._eps(tree),
                self_loop=self.config.self_loop,
                scale=self.scaling,
            )
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def _is_flat(self, tree: SignalTree) -> bool:
        """Whether this is plain attention, which PyTorch's kernels do without a matrix."""
        is_plain = self.config.self_loop and not self.config.sibling_positions
        return is_plain and tree.branching == (None,) and bool(tree.mask.any(1).all())

    def _eps(self, tree: SignalTree) -> list[torch.Tensor] | None:
        if not self.config.sibling_positions:
            return None
        sizes = [int(family.max()) if len(family) else 1 for family in tree.family_sizes()]
        if tree.branching is not None:
            sizes = [max(size, factor or 1) for size, factor in zip(sizes, tree_levels(tree), strict=True)]
        return self.sibling_positions(sizes, tree.unsplit_levels)


class HSALayer(GradientCheckpointingLayer):
    """Transformer layer with layer norms before attention and feed-forward."""

    def __init__(self, config: HSAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HSAAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tree: SignalTree,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states), tree=tree, position_embeddings=position_embeddings, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class HSAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all HSA models."""

    config: HSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HSALayer"]
    _can_record_outputs = {"hidden_states": HSALayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HSASiblingPositions):
            init.constant_(module.amplitude, SIBLING_POSITION_INIT)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers; when the code travels along, `auto_map` names every class that the checkpoint serves."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        self.config.validate()  # before anything is written
        super().save_pretrained(save_directory, *args, **kwargs)


class HSAModel(HSAPreTrainedModel):
    """HSA encoder without a head, token ids to hidden states.

    Args:
        config (`HSAConfig`): the configuration.

    Example:

    ```python
    >>> import torch
    >>> from hkt_hf import HSAConfig, HSAModel

    >>> model = HSAModel(HSAConfig(vocab_size=100, hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
    >>> sentences = torch.tensor([[0, 0, 1, 1, 1]])
    >>> model(torch.tensor([[5, 6, 7, 8, 9]]), segment_ids=sentences[:, None]).last_hidden_state.shape
    torch.Size([1, 5, 32])

    ```
    """

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        if config.position_embedding_type == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding_type == "rope":
            self.rotary_emb = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(HSALayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        tree: SignalTree | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode a batch of sequences.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 1 for real tokens, 0 for padding, on either side.
            segment_ids (`torch.LongTensor` of shape `(B, S, N)`, *optional*): which segment of each of `S` levels, from fine to
                coarse, a token is in, as [`SignalTree.from_segments`] reads them.
            inputs_embeds (`torch.FloatTensor` of shape `(B, N, hidden_size)`, *optional*): instead of `input_ids`.
            tree ([`SignalTree`], *optional*): the hierarchy itself, instead of `segment_ids`. Its leaves are the real tokens, with
                or without an `attention_mask`.
            kwargs: `output_hidden_states`, `return_dict`.

        Returns:
            `BaseModelOutput`

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, both `segment_ids` and `tree`, a token id outside the
                vocabulary, shapes that do not belong together, an `attention_mask` of other tokens than the leaves of `tree`, or
                more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        if segment_ids is not None and tree is not None:
            raise ValueError("at most one of `segment_ids` and `tree` can be given")
        shape = check_tokens(input_ids, inputs_embeds, self.config.vocab_size)
        if attention_mask is not None and tuple(attention_mask.shape) != shape:
            raise ValueError(f"`attention_mask` must have shape {shape}, got {tuple(attention_mask.shape)}")
        if tree is not None:
            check_is_tree(tree)
        if tree is not None and (tree.batch_size, tree.size) == shape:  # the operator refuses a tree of another batch
            tree = tree.to((inputs_embeds if input_ids is None else input_ids).device)
            attention_mask = _mask_of(tree, attention_mask)
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
        if tree is None:
            tree = self._tree(inputs_embeds, attention_mask, segment_ids)
        positions = _positions(inputs_embeds, attention_mask)
        limit = self.config.max_position_embeddings
        position_embeddings = None
        if self.config.position_embedding_type == "absolute":
            if positions.numel() and int(positions.max()) >= limit:
                raise ValueError(
                    f"the input has {int(positions.max()) + 1} tokens, more than `max_position_embeddings` ({limit}): "
                    "truncate it, for instance with `truncation=True` in the tokenizer"
                )
            inputs_embeds = inputs_embeds + self.embed_positions(positions)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(inputs_embeds, positions)
        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(hidden_states, tree=tree, position_embeddings=position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _tree(self, states: torch.Tensor, attention_mask, segment_ids) -> SignalTree:
        batch_size, size = states.shape[:2]
        mask = None if attention_mask is None else attention_mask.to(states.device) != 0
        if segment_ids is not None:
            if segment_ids.dim() != 3 or (segment_ids.shape[0], segment_ids.shape[2]) != (batch_size, size):
                raise ValueError(
                    f"`segment_ids` must have shape (batch, levels, length) = ({batch_size}, levels, {size}), got "
                    f"{tuple(segment_ids.shape)}"
                )
            if mask is None:
                mask = torch.ones(batch_size, size, dtype=torch.bool, device=states.device)
            levels = segment_ids.to(states.device).unbind(1)
            return SignalTree.from_segments(levels, mask, max_family_size=self.config.max_family_size)
        branching = self.config.branching
        if self.config.tree_layout == "square":
            return self._square_tree(batch_size, size, mask).to(states.device)
        if mask is None:
            lengths = torch.full((batch_size,), size, device=states.device)
            return SignalTree.regular(lengths, self._branching_for(size), size=size)
        lengths = mask.sum(1)
        if bool((mask == (torch.arange(size, device=mask.device) < lengths[:, None])).all()):
            return SignalTree.regular(lengths, self._branching_for(size), size=size)
        # Padding in front: groups are counted from the first real token.
        positions = mask.long().cumsum(1) - 1
        ids, width = [], 1
        for factor in itertools.repeat(branching) if isinstance(branching, int) else branching:
            if factor is None or width >= size:
                break
            width *= factor
            ids.append(positions // width)
        return SignalTree.from_segments(ids, mask)

    def _square_tree(self, batch_size: int, size: int, mask: torch.Tensor | None) -> SignalTree:
        side = math.isqrt(size)
        if side**2 != size or (mask is not None and not bool(mask.all())):
            raise ValueError(
                "`tree_layout` 'square' needs sequences of a square number of tokens without padding, got "
                f"{size} tokens{'' if side**2 != size else ' with padding'}: give `segment_ids` or `tree` for others"
            )
        return SignalTree.from_grid(side, side, self._branching_for(side), batch_size=batch_size)

    def _branching_for(self, size: int) -> int | list[int | None]:
        """The configuration's branching, with all that is left at the root where it leaves more than one."""
        branching = self.config.branching
        if isinstance(branching, int):
            return branching
        left = size
        for factor in branching:
            left = min(left, 1) if factor is None else -(-left // factor)
        return branching if left <= 1 else [*branching, None]


def _mask_of(tree: SignalTree, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are leaves, bool `(B, N)`; ValueError where a mask, which may be `None`, says otherwise."""
    if attention_mask is not None and bool(((attention_mask != 0).to(tree.device) != tree.mask).any()):
        raise ValueError(
            "`attention_mask` must be of the leaves of `tree`, or be left out, got others: "
            f"{(attention_mask != 0).sum(1).tolist()} real tokens and {tree.lengths.tolist()} leaves"
        )
    return tree.mask


def _positions(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions counted from the first real token, `(1 or B, N)`; 0 where there is padding."""
    if attention_mask is None:
        return torch.arange(states.shape[1], device=states.device)[None]
    mask = attention_mask.to(states.device) != 0
    positions = torch.arange(states.shape[1], device=states.device) - mask.long().argmax(1, keepdim=True)
    return positions.masked_fill(~mask, 0)


class HSAForMaskedLM(HSAPreTrainedModel):
    """HSA encoder with a masked-language-model head, tied to the token embeddings by `config.tie_word_embeddings`.

    Args:
        config (`HSAConfig`): the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.model = HSAModel(config)
        self.head = PredictionHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        tree: SignalTree | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Score every token of the vocabulary at every position.

        Args:
            input_ids, attention_mask, segment_ids, inputs_embeds, tree, kwargs: as in [`HSAModel.forward`].
            labels (`torch.LongTensor` of shape `(B, N)`, *optional*): the masked tokens' ids, -100 elsewhere.

        Returns:
            `MaskedLMOutput`: `logits (B, N, vocab_size)`.

        Raises:
            ValueError: as [`HSAModel.forward`], or labels of another shape or dtype or outside `[0, vocab_size)`.
        """
        labels = check_token_labels(labels, input_ids, inputs_embeds, "vocab_size", self.config.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            tree=tree,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(self.head(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HSAForSequenceClassification(HSAPreTrainedModel):
    """HSA encoder with pooling and a linear head: single-label or multi-label classification, or regression.

    Args:
        config (`HSAConfig`): the configuration.
    """

    # The loss is a mean over the sequences of a micro-batch, so the Trainer must divide it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HSAModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        tree: SignalTree | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify a batch of sequences, one a row.

        Args:
            input_ids, attention_mask, segment_ids, inputs_embeds, tree, kwargs: as in [`HSAModel.forward`].
            labels (`torch.Tensor`, *optional*): int64 `(B,)` in `[0, num_labels)` (or -100 to ignore a row) for one
                label, `(B, num_labels)` in `[0, 1]` for several labels, `(B,)` or `(B, num_labels)` for regression.

        Returns:
            `SequenceClassifierOutput`

        Raises:
            ValueError: as [`HSAModel.forward`], or labels of another shape or outside their range.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        if labels is not None and tokens is not None:
            # In float32 or wider: half precision would round the targets of a regression.
            dtype = torch.promote_types(self.model.embed_tokens.weight.dtype, torch.float32)
            labels = check_sequence_labels(self.config, labels, (tokens.shape[0], self.num_labels), dtype)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            tree=tree,
            return_dict=True,
            **kwargs,
        )
        mask = attention_mask if tree is None else tree.mask
        pooled = pool(outputs.last_hidden_state, mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.to(dtype), config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["HSAForMaskedLM", "HSAForSequenceClassification", "HSAModel", "HSAPreTrainedModel"]
