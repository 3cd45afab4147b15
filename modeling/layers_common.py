# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of a transformer that do not depend on how it attends: rotary positions, feed-forward network, head, pooling."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding, `(B, T, p)` each."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `(p / 2,)` of the original rotary embedding, and the factor 1."""
        base = config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (base**exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For `position_ids (B, T)`, in the dtype of `hidden_states`."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate_half(states: torch.Tensor) -> torch.Tensor:
    """Rotate half of the last dimension: `(a, b)` becomes `(-b, a)`."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `states (B, H, T, p)` by the angles of `cos` and `sin`, each `(B, T, p)`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return states * cos + rotate_half(states) * sin


class MLP(nn.Module):
    """Feed-forward network of two linear layers."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` to the same."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class PredictionHead(nn.Module):
    """What a masked language model does before it scores tokens: linear layer, activation, layer norm (as in BERT)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` to the same."""
        return self.norm(self.act_fn(self.dense(hidden_states)))


def classifier_dropout(config: PreTrainedConfig) -> float:
    """Dropout before a classifier: `config.classifier_dropout`, or `config.hidden_dropout` where that is `None`."""
    return config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector a sequence, `(B, d)`, from `hidden_states (B, T, d)` and a padding mask `(B, T)`.

    Args:
        hidden_states (`torch.Tensor`): `(B, T, d)`.
        attention_mask (`torch.Tensor`, *optional*): `(B, T)`, nonzero = real; `None` = all real.
        pooling (`str`): `"mean"` over the real tokens (zeros where there are none), `"cls"`: the first real token,
            `"last"`: the last real token.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1) if pooling == "mean" else hidden_states[:, 0 if pooling == "cls" else -1]
    mask = attention_mask.to(hidden_states.device) != 0
    if pooling == "mean":
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)
        # The sum of a long sequence is out of the range of float16.
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        return ((hidden_states * mask.unsqueeze(-1)).sum(dim=1, dtype=wide) / count).to(hidden_states.dtype)
    if pooling == "cls":
        column = mask.long().argmax(dim=1)  # the first real token
    else:
        column = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)  # the last one
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), column]
