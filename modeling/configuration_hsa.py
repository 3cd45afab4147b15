# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""HSA model configuration."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.type_validators import interval


@strict
class HSAConfig(PreTrainedConfig):
    r"""Configuration of an encoder with Hierarchical Self-Attention (HSA, arXiv 2509.15448).

    Tokens attend along a tree: the segments that a batch brings along (`segment_ids`: sentences, paragraphs, ...), or else
    groups of neighbours by `branching`. `branching=[None]` is flat attention. What the paper leaves open is ours.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522):
            Number of token ids.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads.
        head_dim (`int`, *optional*):
            Width of a head; `hidden_size / num_attention_heads` by default.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the attention have biases.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers, a name in `transformers.activations.ACT2FN`.
        branching (`int` or `list`, *optional*, defaults to `[16, None]`):
            Children of a node at each level, from the tokens up, where a batch has no segments; the last may be `None`, all
            that is left. An `int` holds at every level up to the root.
        tree_layout (`str`, *optional*, defaults to `"sequence"`):
            What `branching` groups: `"sequence"`, neighbours in a line, or `"square"`, the pixels of a square picture, row by
            row: blocks of as many rows and columns at each level, with 2 a quadtree.
        max_family_size (`int`, *optional*, defaults to 64):
            Larger segments are split into runs of about one size.
        self_loop (`bool`, *optional*, defaults to `True`):
            Whether a token attends to itself.
        qk_norm (`bool`, *optional*, defaults to `True`):
            Layer norm of queries and keys in each head, as in the paper; that of the keys without weights.
        sibling_positions (`bool`, *optional*, defaults to `True`):
            Trained vectors of the place of a node among its siblings, whose products are added to the scores.
        num_tree_levels (`int`, *optional*, defaults to 4):
            Levels with such vectors of their own; those above share the last. The runs of a split segment have those of the
            level that was split.
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`):
            Of the tokens in the whole sequence: `"absolute"` (trained, added to the embeddings), `"rope"` (queries and keys of
            tokens are rotated, means are of rotated ones) or `"none"`.
        rope_parameters (`dict`, *optional*):
            As everywhere in transformers; the whole head is rotated. `None` unless positions are `"rope"`.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Longest sequence: the size of the position table, or what the rotary embedding is laid out for.
        pooling (`str`, *optional*, defaults to `"mean"`):
            What a sequence classifier reads: `"mean"` over the real tokens, `"cls"` (the first token) or `"last"`.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of embeddings, attention output and feed-forward output.
        classifier_dropout (`float`, *optional*):
            Dropout before the classifier; `hidden_dropout` by default.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        pad_token_id (`int`, *optional*, defaults to 0):
            Token id of padding.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the language-model head uses the token embeddings.

    Raises:
        StrictDataclassFieldValidationError: a field of the wrong type or outside its range.
        StrictDataclassClassValidationError: fields that contradict each other.

    Example:

    ```python
    >>> from hkt_hf import HSAConfig, HSAModel

    >>> config = HSAConfig(hidden_size=128, num_attention_heads=8, num_hidden_layers=2, intermediate_size=512)
    >>> HSAModel(config).config.branching
    [16, None]

    ```
    """

    model_type = "hsa"

    vocab_size: int = interval(min=1)(default=30522)
    hidden_size: int = interval(min=1)(default=768)
    intermediate_size: int = interval(min=1)(default=3072)
    num_hidden_layers: int = interval(min=1)(default=12)
    num_attention_heads: int = interval(min=1)(default=12)
    head_dim: int | None = None
    attention_bias: bool = False
    hidden_act: str = "gelu"
    branching: int | list[int | None] | None = None
    tree_layout: Literal["sequence", "square"] = "sequence"
    max_family_size: int = interval(min=2)(default=64)
    self_loop: bool = True
    qk_norm: bool = True
    sibling_positions: bool = True
    num_tree_levels: int = interval(min=1)(default=4)
    position_embedding_type: Literal["absolute", "rope", "none"] = "absolute"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = interval(min=1)(default=512)
    pooling: Literal["mean", "cls", "last"] = "mean"
    hidden_dropout: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.branching is None:
            self.branching = [16, None]
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None

    def validate_architecture(self):
        """Check fields against each other; run by `@strict` when the config is made and when it is saved."""
        if self.head_dim is None:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), or `head_dim` must be given"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even and at least 2, got {self.head_dim}")
        factors = [self.branching] if isinstance(self.branching, int) else self.branching
        if not factors or None in factors[:-1] or any(factor is not None and factor < 2 for factor in factors):
            raise ValueError(
                f"`branching` must be integers of at least 2, the last one may be None, got {self.branching}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        for name in ("hidden_dropout", "classifier_dropout", "layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, vocab_size) = [0, {self.vocab_size}), got {self.pad_token_id}"
            )


__all__ = ["HSAConfig"]
