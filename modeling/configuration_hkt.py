# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""HKT model configuration."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils.type_validators import interval


@strict
class HKTConfig(PreTrainedConfig):
    r"""Configuration of the Hierarchical Kernel Transformer (HKT, arXiv 2604.08829).

    `HKTConfig()` has the size of BERT-base with three levels. `num_levels=1` is plain multi-head attention, the flat
    twin of every comparison. Fields that the paper fixes say so; the others are ours.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522):
            Number of token ids.
        hidden_size (`int`, *optional*, defaults to 768):
            Width `d` of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads `H`.
        head_dim (`int`, *optional*):
            Width `p` of a head; `hidden_size / num_attention_heads` by default.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the attention have biases.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers, a name in `transformers.activations.ACT2FN`.
        norm_placement (`str`, *optional*, defaults to `"pre"`):
            Where the layer norms are: `"pre"`, before attention and feed-forward and after the last layer, or `"post"`,
            after the embeddings and after each residual sum, as in BERT. With two layers and absolute positions `"post"` is
            better on CIFAR-10, 31.9% against 26.7%, means of five seeds; on ListOps, with rotary positions, it changes
            little without levels, 45.1% against 44.5% (`results/reproduce/report.md`). It was not tried in deep models,
            which `"pre"` makes easier to train (Xiong et al. 2020).
        num_levels (`int`, *optional*, defaults to 3):
            Resolutions `L` (the paper's experiments use 3). Level `l` has `ceil(T / 2**l)` blocks. On ListOps each level
            adds accuracy, and less than the one before: 44.5, 46.3, 47.6 and 48.3% with one to four, means of three seeds
            (`results/reproduce/report.md`).
        downsample_kernel_size (`int`, *optional*, defaults to 4):
            Taps `K` of the causal convolution between two levels. The default is what does best: on ListOps 47.6, 48.5 and 49.6%
            with two, three and four, means of three seeds, and on CIFAR-10 29.1 and 30.3% with two and four, of five
            (`results/reproduce/report.md`, where arms have two unless their name says otherwise).
        downsample_type (`str`, *optional*, defaults to `"depthwise"`):
            `"depthwise"` (`K * d` weights a level) or `"dense"` (`K * d * d`). On ListOps, with two taps, the first has 47.6%,
            the second 48.0% (three seeds, a difference within the noise).
        share_level_projections (`bool`, *optional*, defaults to `False`):
            One query and key projection for all levels, or one pair a level. The paper mentions both. On ListOps one for all has
            46.8%, one pair a level 47.6% (three seeds, a difference within the noise).
        score_symmetry (`str`, *optional*, defaults to `"none"`):
            Constraint on the score matrix of each level and head, which holds by construction: `"psd"`, symmetric and
            positive semidefinite (keys are the queries: a Gram matrix, so that Prop. 3.1 of the paper applies), or
            `"symmetric"` (keys are the queries with one trained factor of either sign a feature, with rotary positions a
            pair of features). `"none"`: keys have projections of their own. On ListOps either constraint costs 11 points of
            accuracy (`results/score_symmetry.json`). Ours.
        position_embedding_type (`str`, *optional*, defaults to `"rope"`):
            `"absolute"` (learned, added to the token embeddings) or `"rope"` (rotary; a block of level `l` has the
            position of its first token). The default is what does better: 47.6% against 44.9% on ListOps, 29.1% against
            26.7% on CIFAR-10, means of five seeds (`results/reproduce/report.md`).
        rope_parameters (`dict`, *optional*):
            Parameters of the rotary embedding as everywhere in transformers: `rope_theta` (10000 by default),
            `rope_type` and its options. The whole head is rotated (no `partial_rotary_factor`). `None` with absolute
            positions.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Longest sequence: the size of the position table, or what the rotary embedding is laid out for.
        type_vocab_size (`int`, *optional*, defaults to 0):
            Number of token types, the rows of the table that `token_type_ids` look up; 0 = no such table.
        pooling (`str`, *optional*, defaults to `"mean"`):
            What a sequence classifier reads: `"mean"` over the real tokens, `"cls"` (the first token) or `"last"`
            (the last real token). On ListOps the mean has 47.6%, the first token 47.7% and the last one 47.1% (three seeds,
            differences within the noise).
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of embeddings, attention output and feed-forward output.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights. PyTorch's fused CPU kernel needs 0.
        classifier_dropout (`float`, *optional*):
            Dropout before the classifier; `hidden_dropout` by default.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        is_decoder (`bool`, *optional*, defaults to `False`):
            Whether a token sees only itself and earlier tokens, for [`HKTForCausalLM`].
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a decoder returns what it needs to go on from where it stands.
        pad_token_id (`int`, *optional*, defaults to 0):
            Token id of padding.
        bos_token_id, eos_token_id (`int`, *optional*):
            Token ids that begin and end a text; generation reads them.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the language-model head uses the token embeddings.

    Raises:
        StrictDataclassFieldValidationError: a field of the wrong type or outside its range.
        StrictDataclassClassValidationError: fields that contradict each other. Both errors come from huggingface_hub
            and name the field, its value and what would be right.

    Example:

    ```python
    >>> from hkt_hf import HKTConfig, HKTModel

    >>> config = HKTConfig(hidden_size=128, num_attention_heads=8, num_hidden_layers=2, intermediate_size=512)
    >>> model = HKTModel(config)
    >>> model.config.num_levels
    3

    ```
    """

    model_type = "hkt"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Heads are shared out: each process has the rows of every projection, and of `level_logits`, that its heads need.
    # The levels themselves are computed by all. The FSDP plan is transformers' default.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj.*": "colwise",
        "layers.*.self_attn.k_proj.*": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.level_logits": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = interval(min=1)(default=30522)
    hidden_size: int = interval(min=1)(default=768)
    intermediate_size: int = interval(min=1)(default=3072)
    num_hidden_layers: int = interval(min=1)(default=12)
    num_attention_heads: int = interval(min=1)(default=12)
    head_dim: int | None = None
    attention_bias: bool = False
    hidden_act: str = "gelu"
    norm_placement: Literal["pre", "post"] = "pre"
    num_levels: int = interval(min=1)(default=3)
    downsample_kernel_size: int = interval(min=1)(default=4)
    downsample_type: Literal["depthwise", "dense"] = "depthwise"
    share_level_projections: bool = False
    score_symmetry: Literal["none", "symmetric", "psd"] = "none"
    position_embedding_type: Literal["absolute", "rope"] = "rope"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = interval(min=1)(default=512)
    type_vocab_size: int = 0
    pooling: Literal["mean", "cls", "last"] = "mean"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    is_decoder: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "absolute":
            self.rope_parameters = None
        if self.score_symmetry != "none":
            self.base_model_tp_plan = dict(type(self).base_model_tp_plan)
            del self.base_model_tp_plan["layers.*.self_attn.k_proj.*"]
            if self.score_symmetry == "symmetric":
                self.base_model_tp_plan["layers.*.self_attn.key_factors"] = "colwise"
        if self.norm_placement == "post":
            # The plans of the class, with the one norm outside the layers that there is.
            for name in ("base_model_fsdp_plan", "base_model_pp_plan"):
                plan = dict(getattr(type(self), name))
                plan["embed_norm"] = plan.pop("norm")
                setattr(self, name, plan)

    def validate_architecture(self):
        """Check fields against each other; run by `@strict` when the config is made and when it is saved."""
        if self.head_dim is None:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), or `head_dim` must be given"
            )
        if self.head_dim < 1:
            raise ValueError(f"`head_dim` must be at least 1, got {self.head_dim}")
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even with `position_embedding_type='rope'`, got {self.head_dim}; "
                "choose another width or 'absolute'"
            )
        self._validate_rope_type()
        if 2 ** (self.num_levels - 1) > self.max_position_embeddings:
            raise ValueError(
                f"`num_levels` ({self.num_levels}) is too large: a block of the coarsest level covers "
                f"{2 ** (self.num_levels - 1)} positions, more than `max_position_embeddings` "
                f"({self.max_position_embeddings})"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        # Not `interval(min=0)`: transformers 5.17 reads a lower bound of zero as none.
        if self.type_vocab_size < 0:
            raise ValueError(f"`type_vocab_size` must be at least 0, got {self.type_vocab_size}")
        for name in (
            "hidden_dropout",
            "attention_dropout",
            "classifier_dropout",
            "layer_norm_eps",
            "initializer_range",
        ):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, vocab_size) = [0, {self.vocab_size}), got {self.pad_token_id}"
            )

    def _validate_rope_type(self):
        if self.rope_parameters is None:
            return
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if self.rope_parameters["rope_type"] not in known:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {known}, got {self.rope_parameters['rope_type']!r}"
            )
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters['partial_rotary_factor']` must be 1.0 (the whole head is rotated), got "
                f"{self.rope_parameters['partial_rotary_factor']}"
            )


__all__ = ["HKTConfig"]
