"""HKT attention contains standard attention and causal convolutions, and more (Prop. 3.4 of arXiv 2604.08829), by construction.

The weights are ours; the paper's public text states the proposition only.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention

from ..modeling import HKTConfig
from ..modeling.layers_common import RotaryEmbedding
from ..modeling.modeling_hkt import HKTAttention


SHARPNESS = 40.0
"""Nats between the tap that a head looks at and the next one: exp(-40) is below the rounding of float64."""

MIN_HEAD_DIM = 16
"""Least width of a head: fewer rotary frequencies come back to nearly the same angles too soon."""

MAX_SCORE_ERROR = 0.1
"""Nats that rounding may move a score."""


def as_standard_attention(attention: nn.Module, num_levels: int = 1) -> HKTAttention:
    """An HKT layer that computes what a standard multi-head self-attention layer does.

    Level 0 has its weights. Coarser levels, if there are any, have queries of zero, so that they add nothing whatever their
    weight in the mix, and level 0's queries are divided by its weight.

    Args:
        attention (`nn.Module`): `BertSelfAttention` or `BertAttention` of transformers (without its residual sum and layer
            norm), or `nn.MultiheadAttention` with equal widths of queries, keys and values. Copied, not shared.
        num_levels (`int`, *optional*, defaults to 1): levels of the result.

    Returns:
        [`~hkt_hf.modeling.modeling_hkt.HKTAttention`]: in evaluation mode, in the dtype of `attention`; called with hidden states
        `(B, T, d)`, it returns a tuple whose first element is the output. `BertSelfAttention` has no output projection: there
        it is the identity.

    Raises:
        TypeError: another type of module.
        ValueError: causal or cross-attention, key or value widths of their own, `add_bias_kv` or `add_zero_attn`.
    """
    output = None
    if isinstance(attention, BertAttention):
        attention, output = attention.self, attention.output.dense
    if isinstance(attention, BertSelfAttention):
        if attention.is_decoder or attention.is_causal:
            raise ValueError("`attention` must be bidirectional, got a decoder's")
        linears = [attention.query, attention.key, attention.value]
        heads, dropout = attention.num_attention_heads, attention.dropout.p
        parts = [(linear.weight, linear.bias) for linear in linears]
    elif isinstance(attention, nn.MultiheadAttention):
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "`attention` must have queries, keys and values of one width, and neither `add_bias_kv` nor `add_zero_attn`"
            )
        heads, dropout, output = attention.num_heads, attention.dropout, attention.out_proj
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        parts = list(zip(attention.in_proj_weight.chunk(3), biases, strict=True))
    else:
        raise TypeError(
            "`attention` must be a BertSelfAttention, BertAttention or nn.MultiheadAttention, got "
            f"{type(attention).__name__}"
        )
    weight = parts[0][0]
    width = weight.shape[1]
    config = _config(width, heads, width // heads, num_levels, "absolute", attention_dropout=dropout)
    result = HKTAttention(config, layer_idx=0).to(weight.device, weight.dtype).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
        for linear, (weight, bias) in zip((result.q_proj[0], result.k_proj[0], result.v_proj), parts, strict=True):
            _copy(linear, weight, bias)
        for part in result.downsample:
            part.reset_parameters()
        result.q_proj[0].weight /= result.level_weights()[0, 0].to(weight.dtype)
        result.q_proj[0].bias /= result.level_weights()[0, 0].to(weight.dtype)
        if output is None:
            result.o_proj.weight.copy_(torch.eye(width))
        else:
            _copy(result.o_proj, output.weight, output.bias)
    return result


class AttentionConvolution(nn.Module):
    """A causal convolution computed by one [`~hkt_hf.modeling.modeling_hkt.HKTAttention`]: `(B, T, C_in)` to `(B, T, C_out)`.

    One head a tap: with rotary positions and queries and keys that are constant, head `tau` looks exactly `tau` tokens back
    whatever these hold, its value is the input there, and the output projection is the tap. A softmax row can't be zero, so
    zero tokens stand before the first one, where the convolution would see padding; their outputs are dropped. Made by
    [`as_causal_convolution`].
    """

    def __init__(self, convolution: nn.Conv1d, max_length: int):
        super().__init__()
        taps = convolution.kernel_size[0]
        self.dilation = convolution.dilation[0]
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.history = (taps - 1) * self.dilation
        self.max_length = max_length
        head_dim = max(MIN_HEAD_DIM, self.in_channels + self.in_channels % 2)  # rotary positions turn pairs
        width = max(self.in_channels, self.out_channels)
        config = _config(width, taps, head_dim, 1, "rope")
        self.attention = HKTAttention(config, layer_idx=0)
        self.rotary_emb = RotaryEmbedding(config)
        self.to(convolution.weight.device, convolution.weight.dtype)
        self._set_weights(convolution)

    @torch.no_grad()
    def _set_weights(self, convolution: nn.Conv1d) -> None:
        attention, taps = self.attention, convolution.kernel_size[0]
        for parameter in attention.parameters():
            parameter.zero_()
        pairs = attention.head_dim // 2
        frequencies = self.rotary_emb.inv_freq.double().cpu()
        # <R_i b_q, R_j b_k> with b_q = b_k turned back by tau is the sum of cos((i - j - tau) f) over the frequencies.
        distances = torch.arange(1, self.max_length + 2 * self.history + 1, dtype=torch.float64)
        gap = (1 - (distances[:, None] * frequencies).cos()).sum(1).min().item()
        # The largest score by what rounding leaves of it: the angles are those of float32 in any dtype.
        if SHARPNESS / gap * pairs * torch.finfo(torch.float32).eps > MAX_SCORE_ERROR:
            raise ValueError(
                f"`max_length` ({self.max_length}) and the convolution's {self.history} tokens of history are too long: two of "
                f"their rotary angles differ too little for float32 (by {gap:.1e})"
            )
        amplitude = math.sqrt(SHARPNESS / (gap * attention.scaling))
        kernel = _dense_kernel(convolution)
        query_bias = torch.zeros(taps, attention.head_dim, dtype=torch.float64)
        key_bias = torch.zeros_like(query_bias)
        key_bias[:, :pairs] = amplitude
        for tap in range(taps):
            angle = tap * self.dilation * frequencies
            query_bias[tap, :pairs] = amplitude * angle.cos()
            query_bias[tap, pairs:] = -amplitude * angle.sin()
            rows = slice(tap * attention.head_dim, tap * attention.head_dim + self.in_channels)
            attention.v_proj.weight[rows, : self.in_channels] = torch.eye(self.in_channels)
            attention.o_proj.weight[: self.out_channels, rows] = kernel[:, :, taps - 1 - tap]
        attention.q_proj[0].bias.copy_(query_bias.flatten())
        attention.k_proj[0].bias.copy_(key_bias.flatten())
        if convolution.bias is not None:
            attention.o_proj.bias[: self.out_channels] = convolution.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Convolve `(B, T, C_in)`; ValueError for another number of channels or more than `max_length` tokens."""
        if hidden_states.shape[-1] != self.in_channels or hidden_states.shape[1] > self.max_length:
            raise ValueError(
                f"`hidden_states` must be (batch, at most {self.max_length}, {self.in_channels}), got "
                f"{tuple(hidden_states.shape)}"
            )
        width = self.attention.config.hidden_size
        padded = F.pad(hidden_states, (0, width - self.in_channels, self.history, 0))
        positions = torch.arange(padded.shape[1], device=padded.device)[None]
        output = self.attention(padded, position_embeddings=[self.rotary_emb(padded, positions)])[0]
        return output[:, self.history :, : self.out_channels]


def as_causal_convolution(convolution: nn.Conv1d, max_length: int = 512) -> AttentionConvolution:
    """A module around one HKT attention layer that computes a convolution padded on the left with zeros.

    Args:
        convolution (`nn.Conv1d`): stride 1; any channels, groups, dilation and signs. Its own padding is not looked at: the
            result sees `(kernel_size - 1) * dilation` zeros before the first token, and nothing after the last.
        max_length (`int`, *optional*, defaults to 512): longest input. The further rotary angles must be told apart, the
            larger the constants.

    Returns:
        [`AttentionConvolution`]: in the dtype and on the device of `convolution`.

    Raises:
        TypeError: not an `nn.Conv1d`.
        ValueError: a stride above 1, or `max_length` below 1 or so large that rotary angles come too near to each other.
    """
    if type(convolution) is not nn.Conv1d:
        raise TypeError(f"`convolution` must be an nn.Conv1d, got {type(convolution).__name__}")
    if convolution.stride[0] != 1:
        raise ValueError(f"`convolution` must have stride 1, got {convolution.stride[0]}")
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, got {max_length}")
    return AttentionConvolution(convolution, max_length)


def log_odds_shift(attention: HKTAttention, hidden_states: torch.Tensor, changed: torch.Tensor, triple) -> float:
    """What no flat attention can do: the log-odds between two keys change with a token that is none of the three involved.

    Flat attention, with one head of any width and any weights, has `log(A[i, j] / A[i, k]) = s(x_i, x_j) - s(x_i, x_k)`: it
    depends on three tokens and their positions. In HKT a coarse score depends on neighbours, too.

    Args:
        attention (`HKTAttention`): without rotary positions; its first head is looked at.
        hidden_states, changed (`torch.Tensor`): `(1, T, d)` each, which agree at the three positions.
        triple (`tuple[int, int, int]`): query `i` and keys `j`, `k`.

    Returns:
        `float`: by how much the log-odds differ, in nats; 0 for every flat attention.

    Raises:
        ValueError: inputs that differ at one of the three positions.
    """
    i, j, k = triple
    if not torch.equal(hidden_states[:, [i, j, k]], changed[:, [i, j, k]]):
        raise ValueError(f"`changed` must agree with `hidden_states` at the positions {list(triple)}")
    odds = []
    with torch.no_grad():
        for states in (hidden_states, changed):
            levels = attention.levels(states)
            pairs = [attention.queries_and_keys(features, level) for level, features in enumerate(levels)]
            weights = attention.level_weights().to(states.dtype)
            odds.append(
                sum(
                    weights[0, level]
                    * attention.scaling
                    * query[0, 0, i >> level]
                    @ (key[0, 0, j >> level] - key[0, 0, k >> level])
                    for level, (query, key) in enumerate(pairs)
                )
            )
    return abs(odds[0] - odds[1]).item()


def _config(width: int, heads: int, head_dim: int, num_levels: int, positions: str, **fields) -> HKTConfig:
    config = HKTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        head_dim=head_dim,
        num_levels=num_levels,
        position_embedding_type=positions,
        attention_bias=True,
        **fields,
    )
    config._attn_implementation = "eager"
    return config


def _copy(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)


def _dense_kernel(convolution: nn.Conv1d) -> torch.Tensor:
    """Weight `(C_out, C_in, taps)`, with the zeros between groups written out."""
    if convolution.groups == 1:
        return convolution.weight
    blocks = convolution.weight.unflatten(0, (convolution.groups, -1))
    by_tap = [torch.block_diag(*blocks[..., tap]) for tap in range(convolution.kernel_size[0])]
    return torch.stack(by_tap, dim=-1)
