"""Peers as arms of an experiment: sequence classifiers of other architectures, at the sizes of HKT, for the `Trainer`.

What a peer reads of a sequence to classify it:

- `"bert"`, `"nystromformer"`, `"mamba"`, `"h-transformer-1d"`: [`~hkt_hf.benchmark.registry.MeanClassifier`], a linear
  layer on the mean over the real tokens, as HKT does. None of these encoders but BERT has a pooler of its own; BERT's reads
  a `[CLS]` token that pretraining has shaped, and is left out. The authors of Nyströmformer also take the mean in their
  experiments from scratch (its `LRA/code/lra_config.py`). `"bert"` is thereby the standalone multi-head model outside
  our code.
- `"modernbert"`: the mean over the real tokens, then its own head (dense, GELU, norm, linear; arXiv 2412.13663).
- `"longformer"`, `"big_bird"`: their own heads on the first token, which sees all and is seen by all (global attention,
  arXiv 2004.05150 section 3, 2007.14062 section 2). Longformer's window is 512, or a quarter of a shorter `length`.
- `"fnet"`: its own pooler on the first token, which holds the sum over all tokens after each Fourier transform.
- any other `model_type` of transformers: its own head for sequence classification, which reads the first token of most
  encoders and the last real one of most decoders; where there is none, the mean over the real tokens.

Beyond 704 tokens BigBird of transformers draws the same random blocks in every training step, and in evaluation takes the
first block in place of each: its accuracy there is that of the library, and may be below that of the architecture.

A model that reads the first token reads `[CLS]` only where the tokenizer writes one (`tokenizer.add_cls_token`).

`dropout` applies to hidden states and before the classifier, as `hidden_dropout` of HKT; dropout of attention weights is 0.
Mamba and h-transformer-1d have no dropout inside: only their classifier has it. Of the other model types, most decoders
have none in their classifier, and those since Llama none at all.
"""

import difflib

from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, AutoModel
from transformers import AutoModelForSequenceClassification as AutoClassifier
from transformers.modeling_outputs import SequenceClassifierOutput

from ..benchmark.measurement import NotAvailableError
from ..benchmark.registry import (
    BIG_BIRD_FULL_LENGTH,
    NYSTROMFORMER_LANDMARKS,
    PEERS,
    ModelSizes,
    config_fields,
    h_transformer_1d_block,
    library_config,
    mean_classifier,
    model_unavailable,
    nystromformer_encoder,
)


# Other names of the width of the feed-forward.
_FEED_FORWARD_FIELDS = (
    "hidden_dim",
    "n_inner",
    "d_inner",
    "ffn_dim",
    "dff",
    "d_ff",
    "ffn_hidden_size",
    "feed_forward_size",
)
# Defaults of large models, which have to follow the sizes here: field to the size that it takes.
_HEAD_FIELDS = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "head_width",
    "d_head": "head_width",
    "rotary_dim": "head_width",
}
_SIZE_FIELDS = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")


def build_peer(
    name: str,
    *,
    vocab_size: int,
    num_labels: int,
    length: int,
    hidden_size: int,
    num_attention_heads: int,
    num_hidden_layers: int,
    intermediate_size: int,
    dropout: float = 0.0,
    pad_token_id: int = 0,
) -> nn.Module:
    """A classifier with one label a sequence, of random weights; the module's docstring says what it reads.

    `forward(input_ids, attention_mask, labels)`, tensors of int64 and shapes `(B, T)`, `(B, T)` and `(B,)`, gives a
    `SequenceClassifierOutput` (or one of its kind) with `logits (B, num_labels)` and the cross-entropy `loss`. Batches
    must be padded on the right as [`peer_padding`] says.

    Args:
        name (`str`): one of `PEERS` of [`~hkt_hf.benchmark.registry`], or any other `model_type` of transformers.
        vocab_size (`int`): tokens; the ids 0 to 2 are among them.
        num_labels (`int`): classes, at least 2.
        length (`int`): most tokens of a sequence.
        hidden_size, num_attention_heads, num_hidden_layers, intermediate_size (`int`): those of HKT. Mamba has two blocks
            for each layer and no heads, FNet no heads.
        dropout (`float`, *optional*, defaults to 0): of hidden states and before the classifier.
        pad_token_id (`int`, *optional*, defaults to 0): the tokenizer's.

    Raises:
        ValueError: an unknown name (the message has the nearest one), or a size out of range.
        NotAvailableError: the package is missing, or the architecture can't be built at these sizes; the message is the
            reason.
    """
    _check_name(name)
    least = {"num_labels": 2, "vocab_size": 3, "pad_token_id": 0}
    for argument, value in {
        "vocab_size": vocab_size,
        "num_labels": num_labels,
        "length": length,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "intermediate_size": intermediate_size,
        "pad_token_id": pad_token_id,
    }.items():
        if value < least.get(argument, 1):
            raise ValueError(f"`{argument}` must be at least {least.get(argument, 1)}, got {value!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1), got {dropout!r}")
    if pad_token_id >= vocab_size:
        raise ValueError(f"`pad_token_id` must be less than `vocab_size` ({vocab_size}), got {pad_token_id}")
    if hidden_size % num_attention_heads:
        raise ValueError(f"`hidden_size` must be a multiple of the {num_attention_heads} heads, got {hidden_size}")
    padded_length = peer_padding(name, length)
    sizes = ModelSizes(
        length=padded_length or length,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_hidden_layers=num_hidden_layers,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        num_labels=num_labels,
        dropout=dropout,
        pad_token_id=pad_token_id,
    )
    if reason := model_unavailable(name):
        raise NotAvailableError(reason)
    if name == "bert":
        config = library_config(name, sizes, attn_implementation="sdpa")
        model = mean_classifier(AutoModel.from_config(config, add_pooling_layer=False), sizes)
    elif name == "nystromformer":
        model = mean_classifier(nystromformer_encoder(sizes), sizes)
    elif name in PEERS:
        model = PEERS[name].build(sizes, False)
    else:
        model = _library_peer(name, sizes)
    return model if padded_length is None else _OneLength(model, name, padded_length, takes_mask=name != "fnet")


def peer_padding(name: str, length: int) -> int | None:
    """To a multiple of what each batch must be padded, as `DataCollatorWithPadding(pad_to_multiple_of=...)` takes it.

    `None` is the longest sequence of the batch, which is enough where the mask hides the padding from every real token.
    Longformer also pads by itself, to a multiple of its window. The others take one length, `length` or somewhat more, so
    that each batch has it:

    - `"nystromformer"`: the multiple of 64 that its landmarks are spread over. Padding has a share in them.
    - `"fnet"`: it has no mask, so that a sequence's output depends on how far it is padded; it was trained with padding up
      to one length, and the documentation of transformers recommends the same length for fine-tuning and inference.
    - `"big_bird"` beyond 704 tokens: a batch of 704 or less turns it to full attention for good. Up to 704 it has full
      attention anyway, and needs no padding.
    - `"h-transformer-1d"`: it takes no batch shorter than 4 blocks, and a real token attends to a block of padding alone.

    Args:
        name (`str`): as in [`build_peer`].
        length (`int`): most tokens of a sequence.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(name)
    if name == "nystromformer":
        return _round_up(length, NYSTROMFORMER_LANDMARKS)
    if name == "fnet":
        return length
    if name == "big_bird" and length > BIG_BIRD_FULL_LENGTH:
        return _round_up(length, 64)
    if name == "h-transformer-1d":
        return _round_up(length, 4 * h_transformer_1d_block(length))
    return None


def peer_names() -> list[str]:
    """All names that [`build_peer`] knows: the peers of the benchmark first, then every other `model_type`."""
    return [*PEERS, *(name for name in sorted(CONFIG_MAPPING) if name not in PEERS and is_peer(name))]


def is_peer(name: str) -> bool:
    """Whether [`build_peer`] knows a name."""
    return name in PEERS or (name in CONFIG_MAPPING and name != "hkt")


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check_name(name: str) -> None:
    if not is_peer(name):
        nearest = difflib.get_close_matches(str(name), peer_names(), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`name` must be one of {list(PEERS)} or another `model_type` of transformers, got {name!r}; the nearest one "
            f"is {nearest!r}"
        )


def _library_peer(name: str, sizes: ModelSizes) -> nn.Module:
    """A model of transformers that is none of `PEERS`; its sizes must have names that are known here."""
    try:
        known = config_fields(name)
        config_class = CONFIG_MAPPING[name]
        fields = _renamed_sizes(known, sizes)
        if "use_cache" in known:
            fields["use_cache"] = False  # of keys and values, which no classifier needs
        config = library_config(name, sizes, **fields)
        if getattr(config, "is_encoder_decoder", False):
            raise NotAvailableError(
                "an encoder-decoder: its classifier reads an end-of-sequence token, which these sequences don't have"
            )
        if config_class in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return AutoClassifier.from_config(config)
        if config_class in MODEL_MAPPING:
            return mean_classifier(AutoModel.from_config(config), sizes)
    except NotAvailableError:
        raise
    except Exception as error:
        # Whatever another library's constructor refuses is the reason.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotAvailableError(f"transformers can't build it at these sizes: {reason}") from error
    raise NotAvailableError("transformers has no model of it that reads text")


def _renamed_sizes(known: set[str], sizes: ModelSizes) -> dict[str, int]:
    """Sizes under other names, where the configuration knows them; a name that it does not know would do nothing."""
    fields: dict[str, int] = {}
    if "intermediate_size" not in known:
        fields |= {field: sizes.intermediate_size for field in _FEED_FORWARD_FIELDS if field in known}
    missing = [size for size in _SIZE_FIELDS if size not in known and not (size == "intermediate_size" and fields)]
    if missing:
        raise NotAvailableError(f"its configuration has no field for {', '.join(missing)}")
    values = {
        "num_attention_heads": sizes.num_attention_heads,
        "head_width": sizes.hidden_size // sizes.num_attention_heads,
    }
    return fields | {field: values[size] for field, size in _HEAD_FIELDS.items() if field in known}


class _OneLength(nn.Module):
    """A classifier that takes batches of one length: others could be computed, but as something else."""

    def __init__(self, model: nn.Module, name: str, length: int, takes_mask: bool):
        super().__init__()
        self.model = model
        self.name = name
        self.length = length
        self.takes_mask = takes_mask

    def forward(self, input_ids, attention_mask=None, labels=None) -> SequenceClassifierOutput:
        """As the model; a model without a mask ignores it."""
        if input_ids.shape[1] != self.length:
            raise ValueError(
                f"`input_ids` of {self.name!r} must be padded to {self.length} tokens, as `peer_padding` says, got "
                f"{input_ids.shape[1]}"
            )
        mask = {"attention_mask": attention_mask} if self.takes_mask else {}
        return self.model(input_ids, labels=labels, **mask)
