"""What can be measured: the operator's backends and the models, HKT beside its peers, each as a [`Step`]."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling import SignalTree, attention_hkt, hierarchical_self_attention
from .decoding import DecodingStep, cache_bytes
from .measurement import NotAvailableError, Step


REFERENCE = "flat"
"""The entry that all ratios refer to: PyTorch's fused attention on level 0, or the flat twin (`num_levels=1`) with it."""

OPERATOR_MODES = ("forward", "forward_backward")
MODEL_MODES = ("forward", "forward_backward", "train_step", "decode_step")
NUM_LABELS = 2
NYSTROMFORMER_LANDMARKS = 64
LONGFORMER_WINDOW = 512
BIG_BIRD_FULL_LENGTH = 704
"""Up to here BigBird of transformers has full attention: 5 + 2 * 3 blocks of 64."""


def sequence_lengths(batch_size: int, length: int) -> list[int]:
    """Real tokens of each sequence of a ragged batch: from `length` down to half of it, in equal steps."""
    shortest = length - length // 2
    return [length - round((length - shortest) * row / max(batch_size - 1, 1)) for row in range(batch_size)]


def padding_mask(batch_size: int, length: int, device: str) -> torch.Tensor:
    """`(B, T)` bool, True = real, of a batch with the lengths of [`sequence_lengths`], padded on the right."""
    lengths = torch.tensor(sequence_lengths(batch_size, length), device=device)
    return torch.arange(length, device=device) < lengths[:, None]


def _bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Operators


@dataclass(frozen=True)
class OperatorSizes:
    """One configuration of the operator: `batch_heads` is `B * H`, `batch_size` the `B` of it."""

    length: int
    width: int
    batch_heads: int = 8
    batch_size: int = 1
    num_levels: int = 3
    is_causal: bool = False
    padding: bool = False
    dtype: str = "float32"
    device: str = "cpu"


HSA_TREES: dict[str, Callable[["OperatorSizes"], SignalTree]] = {
    "hsa": lambda sizes: SignalTree.regular(_lengths(sizes), HSA_BRANCHING, size=sizes.length),
    "hsa-windows": lambda sizes: SignalTree.regular(_lengths(sizes), (HSA_BRANCHING, None), size=sizes.length),
    "hsa-text": lambda sizes: _text_tree(sizes),
}
"""Trees of Hierarchical Self-Attention by the operator's name: groups of 16 up to the root, windows of 16 under a flat root, and
ragged ones as of text."""
HSA_BRANCHING = 16
MAX_SENTENCE = 40
MAX_SENTENCES = 8


def operator_names() -> list[str]:
    """The reference `"flat"`, every backend of `hierarchical_attention`, `"auto"`, which chooses among these, and HSA by tree."""
    return [REFERENCE, *attention_hkt.BACKENDS, "auto", *HSA_TREES]


def _lengths(sizes: "OperatorSizes") -> list[int]:
    return sequence_lengths(sizes.batch_size, sizes.length) if sizes.padding else [sizes.length] * sizes.batch_size


def _text_tree(sizes: "OperatorSizes") -> SignalTree:
    """Sentences of 5 to 40 tokens in paragraphs of 2 to 8 sentences, drawn evenly; paragraphs in groups of 64 at most."""
    generator = torch.Generator().manual_seed(0)

    def runs(low: int, high: int, count: int) -> torch.Tensor:
        lengths = torch.randint(low, high + 1, (-(-count // low),), generator=generator)
        return torch.arange(len(lengths)).repeat_interleave(lengths)[:count]

    sentences = torch.stack([runs(5, MAX_SENTENCE, sizes.length) for _ in range(sizes.batch_size)])
    paragraphs = torch.stack([runs(2, MAX_SENTENCES, sizes.length)[row] for row in sentences])
    mask = torch.arange(sizes.length) < torch.tensor(_lengths(sizes))[:, None]
    return SignalTree.from_segments([sentences, paragraphs], mask, max_family_size=64)


def operator_unavailable(name: str, device: str) -> str | None:
    """Why an operator can't run on a device, whatever the sizes; `None` where it can."""
    if name == "triton" and not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a GPU: --device cuda, or without times to believe in the environment TRITON_INTERPRET=1"
    return None


def operator_step(name: str, mode: str, sizes: OperatorSizes) -> Step:
    """The step of an operator on normal random inputs, the same for every name.

    `"forward"` keeps no graph; `"forward_backward"` takes the gradients of all queries, keys, values and level weights.

    Raises:
        NotAvailableError: the operator can't run on the device.
    """
    if reason := operator_unavailable(name, sizes.device):
        raise NotAvailableError(reason)
    heads = sizes.batch_heads // sizes.batch_size
    dtype = getattr(torch, sizes.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(sizes.device, dtype)

    def levels(count: int) -> list[torch.Tensor]:
        blocks = [-(-sizes.length // 2**level) for level in range(count)]
        return [random(sizes.batch_size, heads, block, sizes.width) for block in blocks]

    tree = HSA_TREES[name](sizes).to(sizes.device) if name in HSA_TREES else None
    has_levels = name != REFERENCE and tree is None
    num_levels = sizes.num_levels if has_levels else 1
    queries, keys, (value, grad_output) = levels(num_levels), levels(num_levels), [levels(1)[0] for _ in range(2)]
    level_weights = random(heads, num_levels, dtype=torch.float32).softmax(dim=-1)
    mask = padding_mask(sizes.batch_size, sizes.length, sizes.device) if sizes.padding else None
    inputs = [*queries, *keys, value, *([level_weights] if has_levels else [])]
    facts: dict[str, object] = {}

    if name == REFERENCE:
        # PyTorch takes a mask or `is_causal`: behind padding on the right, no real query sees a padded key anyway.
        flat_mask = None if mask is None or sizes.is_causal else mask[:, None, None, :]
        if mask is not None and sizes.is_causal:
            facts["note"] = "without the padding mask, which a causal mask makes needless on the right"

        def attend() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                queries[0], keys[0], value, attn_mask=flat_mask, is_causal=sizes.is_causal
            )
    elif tree is not None:
        tree.levels if tree.branching is None else tree.mask  # noqa: B018  built before the clock runs
        facts["note"] = f"{tree!r}, built beforehand"

        def attend() -> torch.Tensor:
            return hierarchical_self_attention(queries[0], keys[0], value, tree, is_causal=sizes.is_causal)
    else:

        def attend() -> torch.Tensor:
            return attention_hkt.hierarchical_attention(
                queries, keys, value, level_weights, key_padding_mask=mask, is_causal=sizes.is_causal, backend=name
            )

    if mode == "forward":
        return Step(torch.no_grad()(attend), resident_bytes=lambda: _bytes_of(inputs), facts=facts)
    for tensor in inputs:
        tensor.requires_grad_()
    return Step(
        lambda: torch.autograd.grad(attend(), inputs, grad_output),
        resident_bytes=lambda: _bytes_of([*inputs, grad_output]),
        facts=facts,
    )


# Models


@dataclass(frozen=True)
class ModelSizes:
    """One configuration of a model.

    What a benchmark varies comes first. Then what it leaves alone, and no result records (`NOT_RECORDED`):
    `num_new_tokens` is what decoding adds to `length` at most; `num_labels` classes, `dropout` (of hidden states and of
    the classifier, never of attention weights) and `pad_token_id` are for training.
    """

    length: int
    batch_size: int = 8
    hidden_size: int = 128
    num_attention_heads: int = 8
    num_hidden_layers: int = 2
    intermediate_size: int = 512
    num_levels: int = 3
    vocab_size: int = 512
    padding: bool = False
    num_new_tokens: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    num_labels: int = NUM_LABELS
    dropout: float = 0.0
    pad_token_id: int = 0


NOT_RECORDED = ("num_new_tokens", "num_labels", "dropout", "pad_token_id")
"""Fields of [`ModelSizes`] that are no part of a result."""


@dataclass(frozen=True)
class Peer:
    """A model that HKT is measured against.

    Args:
        build (`Callable`): `(sizes, is_decoder)` to a classifier of `sizes.num_labels` classes or, as a decoder, a
            causal language model; raises `NotAvailableError` where it can't be built.
        note (`str` or `Callable`): what is special about its configuration, or a function of the sizes that says so; it
            goes into the result.
        has_decoder (`bool`): whether there is a decoder with a cache.
        package (`str`, *optional*): the package to install, where that is not transformers.
        module (`str`, *optional*): its importable name.
    """

    build: Callable[[ModelSizes, bool], nn.Module]
    note: str | Callable[[ModelSizes], str]
    has_decoder: bool = False
    package: str | None = None
    module: str | None = None


class MeanClassifier(nn.Module):
    """A linear classifier of the mean hidden state, for encoders that come without one.

    Args:
        encoder (`nn.Module`): `input_ids (B, T)` and `mask (B, T)` or `None` to hidden states `(B, T, d)`.
        hidden_size (`int`): `d`.
        num_labels (`int`, *optional*, defaults to 2): classes.
        dropout (`float`, *optional*, defaults to 0): of the mean, as in the head of HKT.
    """

    def __init__(
        self,
        encoder: Callable[..., torch.Tensor],
        hidden_size: int,
        num_labels: int = NUM_LABELS,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)  # as transformers does
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids, attention_mask=None, labels=None) -> SequenceClassifierOutput:
        """Logits `(B, num_labels)` and, with `labels (B,)`, the cross-entropy."""
        hidden_states = self.encoder(input_ids, attention_mask)
        if attention_mask is None:
            pooled = hidden_states.mean(dim=1)
        else:
            weights = attention_mask.to(hidden_states.dtype)
            weights = weights / weights.sum(dim=1, keepdim=True)
            pooled = (weights[:, None] @ hidden_states).squeeze(1)
        logits = self.classifier(self.dropout(pooled))
        return SequenceClassifierOutput(
            loss=F.cross_entropy(logits, labels) if labels is not None else None, logits=logits
        )


def library_config(model_type: str, sizes: ModelSizes, is_decoder: bool = False, **fields) -> PreTrainedConfig:
    """The configuration of a model of transformers, with the sizes under the names that most configurations use.

    Args:
        model_type (`str`): that of transformers.
        sizes ([`ModelSizes`]): sizes, dropout and number of classes.
        is_decoder (`bool`, *optional*, defaults to `False`): for a causal language model.
        fields: of the configuration, over those that follow from the sizes.
    """
    return AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_attention_heads,
            "num_hidden_layers": sizes.num_hidden_layers,
            "intermediate_size": sizes.intermediate_size,
            # Room for tables that begin behind the padding id, and for lengths rounded up to a whole block.
            "max_position_embeddings": -(-sizes.length // 64) * 64 + 2 + sizes.pad_token_id + sizes.num_new_tokens,
            "num_labels": sizes.num_labels,
            "pad_token_id": sizes.pad_token_id,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **_dropouts(model_type, sizes.dropout),
            **({"is_decoder": True} if is_decoder else {}),
            **fields,
        },
    )


def config_fields(model_type: str) -> set[str]:
    """Names that the configuration of a `model_type` of transformers gives a meaning to."""
    config_class = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


def _dropouts(model_type: str, dropout: float) -> dict[str, float]:
    """Every dropout that a configuration has, whatever its name.

    Those of attention weights, of the activation within a feed-forward (which BERT hasn't) and of whole layers are 0.
    """
    names = {name for name in config_fields(model_type) if "dropout" in name or name.endswith(("pdrop", "layerdrop"))}
    without = ("attention", "attn", "activation", "layerdrop")
    # `token_dropout` of ESM rescales embeddings and is a bool.
    return {
        name: 0.0 if any(word in name for word in without) else dropout for name in names if name != "token_dropout"
    }


def _library_model(model_type: str, sizes: ModelSizes, is_decoder: bool, **fields) -> nn.Module:
    config = library_config(model_type, sizes, is_decoder, **fields)
    return (AutoModelForCausalLM if is_decoder else AutoModelForSequenceClassification).from_config(config)


def mean_classifier(model: nn.Module, sizes: ModelSizes) -> MeanClassifier:
    """A classifier of the mean over real tokens, for a model of transformers without any head."""
    return MeanClassifier(_LastHiddenState(model), sizes.hidden_size, sizes.num_labels, sizes.dropout)


class _LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, **self.options).last_hidden_state


def _hkt(sizes: ModelSizes, is_decoder: bool, num_levels: int, attn_implementation: str | None) -> nn.Module:
    config = AutoConfig.for_model(
        "hkt",
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_hidden_layers=sizes.num_hidden_layers,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.length + sizes.num_new_tokens,
        num_levels=num_levels,
        num_labels=sizes.num_labels,
        pad_token_id=sizes.pad_token_id,
        hidden_dropout=sizes.dropout,
        is_decoder=is_decoder,
    )
    auto_class = AutoModelForCausalLM if is_decoder else AutoModelForSequenceClassification
    return auto_class.from_config(config, attn_implementation=attn_implementation)


def _hsa(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    config = AutoConfig.for_model(
        "hsa",
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_hidden_layers=sizes.num_hidden_layers,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.length,
        branching=HSA_BRANCHING,
        num_labels=sizes.num_labels,
        pad_token_id=sizes.pad_token_id,
        hidden_dropout=sizes.dropout,
    )
    return AutoModelForSequenceClassification.from_config(config)


def _bert(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    return _library_model("bert", sizes, is_decoder, attn_implementation="sdpa")


def _modernbert(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    return _library_model(
        "modernbert",
        sizes,
        is_decoder,
        attn_implementation="sdpa",
        layer_types=["full_attention"] * sizes.num_hidden_layers,
        classifier_pooling="mean",
        cls_token_id=1,
        sep_token_id=2,
    )


def longformer_window(length: int) -> int:
    """Attention window of Longformer: its 512; of sequences shorter than that a quarter, where 512 would be no window."""
    return LONGFORMER_WINDOW if length >= LONGFORMER_WINDOW else max(2 * (length // 8), 2)


def _longformer(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    return _library_model("longformer", sizes, is_decoder, attention_window=longformer_window(sizes.length))


def _big_bird(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    return _library_model("big_bird", sizes, is_decoder, sep_token_id=2, attention_type="block_sparse")


def _big_bird_note(sizes: ModelSizes) -> str:
    if sizes.length <= BIG_BIRD_FULL_LENGTH:
        return "full attention, to which the library falls back up to 704 tokens"
    return (
        "blocks of 64: 2 global, 3 of a window, 3 random; transformers 5.23 assembles the T x T weights all the same"
    )


def _nystromformer(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    model = _library_model("nystromformer", sizes, is_decoder, **_nystromformer_fields(sizes))
    _mask_keys_of_landmarks(model.nystromformer)
    return model


def nystromformer_encoder(sizes: ModelSizes) -> nn.Module:
    """Nyströmformer without a head, for the one length of `sizes`; errors as of the peer."""
    model = AutoModel.from_config(library_config("nystromformer", sizes, **_nystromformer_fields(sizes)))
    _mask_keys_of_landmarks(model)
    return model


def _nystromformer_fields(sizes: ModelSizes) -> dict[str, int]:
    if sizes.length % NYSTROMFORMER_LANDMARKS:
        raise NotAvailableError(
            f"takes lengths that are multiples of its {NYSTROMFORMER_LANDMARKS} landmarks, got {sizes.length}"
        )
    return {"num_landmarks": NYSTROMFORMER_LANDMARKS, "segment_means_seq_len": sizes.length}


def _mask_keys_of_landmarks(model: nn.Module) -> None:
    """Let Nyströmformer take padding: transformers 5.17 to 5.23 form a mask of T x T, but its queries are 64 landmarks."""

    def to_one_row(module: nn.Module, args: tuple, kwargs: dict[str, object]):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            lowest = torch.finfo(module.dtype).min
            masked = torch.zeros(mask.shape, dtype=module.dtype, device=mask.device).masked_fill(mask == 0, lowest)
            kwargs = {**kwargs, "attention_mask": masked[:, None, None, :]}
        return args, kwargs

    model.register_forward_pre_hook(to_one_row, with_kwargs=True)


def _fnet(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    if sizes.padding:
        raise NotAvailableError("mixes by a Fourier transform, which has no padding mask")
    return _library_model("fnet", sizes, is_decoder)


def _mamba(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    fields = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": 2 * sizes.num_hidden_layers,
        "pad_token_id": sizes.pad_token_id,
        "use_mambapy": importlib.util.find_spec("mambapy") is not None,
    }
    config = AutoConfig.for_model("mamba", **fields)
    if is_decoder:
        return AutoModelForCausalLM.from_config(config)
    return mean_classifier(AutoModel.from_config(config), sizes)


def _mamba_note(sizes: ModelSizes) -> str:
    scan = "a loop over the tokens (no mamba-ssm, no mambapy)"
    if sizes.device.startswith("cuda") and importlib.util.find_spec("mamba_ssm") is not None:
        scan = "the CUDA kernels of mamba-ssm"
    elif importlib.util.find_spec("mambapy") is not None:
        scan = "the parallel scan of mambapy"
    return f"two blocks for each layer (arXiv 2312.00752, section 3.4), one direction; {scan}"


def h_transformer_1d_block(length: int) -> int:
    """Block of h-transformer-1d for lengths up to `length`; it takes no sequence shorter than four of them, padded."""
    return min(128, max((1 << max(length - 1, 1).bit_length()) // 4, 1))


def _h_transformer_1d(sizes: ModelSizes, is_decoder: bool) -> nn.Module:
    from h_transformer_1d import HTransformer1D

    multiple, rest = divmod(sizes.intermediate_size, sizes.hidden_size)
    if rest:
        raise NotAvailableError(
            f"takes feed-forward widths that are multiples of {sizes.hidden_size}, got {sizes.intermediate_size}"
        )
    longest = 1 << max(sizes.length - 1, 1).bit_length()
    model = HTransformer1D(
        num_tokens=sizes.vocab_size,
        dim=sizes.hidden_size,
        depth=sizes.num_hidden_layers,
        max_seq_len=longest,
        heads=sizes.num_attention_heads,
        dim_head=sizes.hidden_size // sizes.num_attention_heads,
        ff_mult=multiple,
        block_size=h_transformer_1d_block(sizes.length),
    )
    model.to_logits = model.to_logits[0]  # its layer norm, without the language-model head
    for attention, _ in model.layers.layers:
        # The layers share one table, which the state would hold under a name for each: safetensors refuses that.
        attention.fn.__dict__["pos_emb"] = attention.fn._modules.pop("pos_emb")
    return MeanClassifier(_Positional(model), sizes.hidden_size, sizes.num_labels, sizes.dropout)


class _Positional(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, mask=None if attention_mask is None else attention_mask.bool())


PEERS: dict[str, Peer] = {
    "hsa": Peer(_hsa, "groups of 16 up to the root, learned positions"),
    "bert": Peer(_bert, "flat SDPA, learned positions", has_decoder=True),
    "modernbert": Peer(
        _modernbert,
        "flat SDPA in every layer (no local ones), rotary positions, gated feed-forward; transformers 5.23 forms the T x T "
        "mask of local layers all the same",
    ),
    "longformer": Peer(
        _longformer,
        "window of 512, or of a quarter of a shorter sequence, to a multiple of which it pads; the first token is global",
    ),
    "big_bird": Peer(
        _big_bird, "blocks of 64, 3 random ones; full attention up to 704 tokens, as the library decides"
    ),
    "nystromformer": Peer(_nystromformer, "64 landmarks"),
    "fnet": Peer(_fnet, "Fourier transforms instead of attention"),
    "h-transformer-1d": Peer(
        _h_transformer_1d,
        "blocks of 128, or of a quarter of a shorter sequence; pads to a power of 2",
        package="h-transformer-1d",
        module="h_transformer_1d",
    ),
    "mamba": Peer(
        _mamba,
        _mamba_note,
        has_decoder=True,
    ),
}
"""Peers by name, which is the `model_type` of transformers or the name of the package that has the model."""


def model_names() -> list[str]:
    """HKT, its flat twin, and all peers. `"hkt:NAME"` besides is HKT with that `attn_implementation`."""
    return [REFERENCE, "hkt", *PEERS]


def check_model_name(name: str) -> None:
    """ValueError for a name that [`model_step`] does not know."""
    kind, separator, implementation = name.partition(":")
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if kind == "hkt" and separator:
        if implementation not in known:
            raise ValueError(
                f"`models` {name!r}: the `attn_implementation` must be one of {known}, got {implementation!r}"
            )
    elif name not in model_names():
        raise ValueError(f"`models` must be among {[*model_names(), 'hkt:ATTN_IMPLEMENTATION']}, got {name!r}")


def model_unavailable(name: str) -> str | None:
    """Why a model can't run here, whatever the sizes; `None` where it can."""
    peer = PEERS.get(name)
    if peer is not None and peer.module is not None and importlib.util.find_spec(peer.module) is None:
        return f"the package {peer.package} is not installed: pip install {peer.package}"
    return None


def peer_note(name: str, sizes: ModelSizes) -> str:
    """What is special about a peer at these sizes."""
    note = PEERS[name].note
    return note if isinstance(note, str) else note(sizes)


def model_step(name: str, mode: str, sizes: ModelSizes) -> Step:
    """The step of a model of random weights, on random tokens.

    `"forward"` computes the logits of a sequence classifier in evaluation mode; `"forward_backward"` its loss and the
    gradients of all parameters; `"train_step"` clears the gradients, does the same and lets AdamW step; `"decode_step"`
    reads one more token with `length` tokens in the cache of a causal language model.

    Raises:
        NotAvailableError: the model can't run here, at this length or in this mode.
    """
    if reason := model_unavailable(name):
        raise NotAvailableError(reason)
    is_decoder = mode == "decode_step"
    kind, _, implementation = name.partition(":")
    torch.manual_seed(0)
    if kind == "hkt":
        model = _hkt(sizes, is_decoder, sizes.num_levels, implementation or None)
    elif kind == REFERENCE:
        model = _hkt(sizes, is_decoder, 1, "sdpa")
    else:
        if is_decoder and not PEERS[name].has_decoder:
            raise NotAvailableError("an encoder has no decoding step")
        model = PEERS[name].build(sizes, is_decoder)
    model = model.to(sizes.device, getattr(torch, sizes.dtype))
    facts: dict[str, object] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if kind in ("hkt", REFERENCE):
        facts["attn_implementation"] = model.config._attn_implementation
    else:
        facts["note"] = peer_note(name, sizes)
    return _decoding(model, sizes, facts) if is_decoder else _training(model, mode, sizes, facts)


def _decoding(model: nn.Module, sizes: ModelSizes, facts: dict[str, object]) -> Step:
    step = DecodingStep(model, sizes.length, sizes.batch_size)
    return Step(
        step,
        resident_bytes=lambda: _bytes_of(_state(model)) + cache_bytes(step.cache),
        facts={**facts, "cache_bytes": cache_bytes(step.cache)},
    )


def _training(model: nn.Module, mode: str, sizes: ModelSizes, facts: dict[str, object]) -> Step:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch_size, sizes.length)
    inputs = {"input_ids": torch.randint(3, sizes.vocab_size, shape, generator=generator).to(sizes.device)}
    if sizes.padding:
        mask = padding_mask(*shape, sizes.device)
        inputs = {"input_ids": inputs["input_ids"].masked_fill(~mask, 0), "attention_mask": mask.long()}
    if mode == "forward":
        model.eval()
        return Step(
            torch.no_grad()(lambda: model(**inputs).logits),
            resident_bytes=lambda: _bytes_of([*_state(model), *inputs.values()]),
            facts=facts,
        )
    model.train()
    labels = torch.randint(sizes.num_labels, shape[:1], generator=generator).to(sizes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        if mode == "train_step":
            optimizer.step()

    def resident() -> int:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return _bytes_of([*_state(model), *inputs.values(), *filter(torch.is_tensor, moments)])

    return Step(step, release=optimizer.zero_grad, resident_bytes=resident, facts=facts)


def _state(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
