"""Tokenizers of the from-scratch models: ListOps tokens, UTF-8 bytes and pixels.

They are plain `PreTrainedTokenizerFast`: `AutoTokenizer.from_pretrained` loads a saved one without this package.
"""

import difflib
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data.listops import CLOSE, DIGITS, OPERATORS


SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _vocabulary(symbols: Sequence[str]) -> dict[str, int]:
    return {symbol: index for index, symbol in enumerate([*SPECIAL_TOKENS.values(), *symbols])}


def _word_level(symbols: Sequence[str]) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(_vocabulary(symbols), unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _listops() -> Tokenizer:
    return _word_level([*DIGITS, *OPERATORS, CLOSE])


def _pixels() -> Tokenizer:
    backend = _word_level([str(level) for level in range(256)])
    # Faster in `encode_batch_fast` than a split at any white space.
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    return backend


def _bytes() -> Tokenizer:
    # BPE without merges leaves one token per byte, and is the fastest model to do so.
    backend = Tokenizer(models.BPE(_vocabulary(_byte_symbols()), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_symbols() -> list[str]:
    """The characters that `tokenizers` writes for the bytes 0 to 255 (those of GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_BUILDERS = {"listops": _listops, "bytes": _bytes, "pixels": _pixels}
TOKENIZER_KINDS = tuple(_BUILDERS)


def build_tokenizer(
    kind: str, *, model_max_length: int, add_cls_token: bool = False, split_special_tokens: bool = True
) -> PreTrainedTokenizerFast:
    """Tokenizer of a from-scratch model.

    In each, the ids 0 to 4 are `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]` and `[MASK]`. In the byte tokenizer, byte `b` has the
    id `5 + b`; a text decodes to itself, and one that contains `"[PAD]"` yields five bytes, not the special token, unless
    `split_special_tokens` is `False`.

    Args:
        kind (`str`): `"listops"` (words: digits, operators, `]`), `"bytes"` (UTF-8 bytes) or `"pixels"` (words: `0` to
            `255`).
        model_max_length (`int`): number of tokens that `truncation=True` cuts to, special tokens included.
        add_cls_token (`bool`, *optional*, defaults to `False`): begin every sequence with `[CLS]`.
        split_special_tokens (`bool`, *optional*, defaults to `True`): in the byte tokenizer, read `"[MASK]"` in a text as
            six bytes. With `False` it is the mask token, as the fill-mask pipeline needs it, and likewise for the other
            special tokens.

    Returns:
        `PreTrainedTokenizerFast`

    Raises:
        ValueError: an unknown kind, or a `model_max_length` that leaves no room for text.
    """
    if kind not in _BUILDERS:
        nearest = difflib.get_close_matches(str(kind), TOKENIZER_KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"`kind` must be one of {list(TOKENIZER_KINDS)}, got {kind!r}; the nearest is {nearest!r}")
    least = 2 if add_cls_token else 1
    if not isinstance(model_max_length, int) or isinstance(model_max_length, bool) or model_max_length < least:
        raise ValueError(f"`model_max_length` must be an integer of at least {least}, got {model_max_length!r}")
    backend = _BUILDERS[kind]()
    if add_cls_token:
        backend.post_processor = _begin_with_cls(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL_TOKENS,
        model_max_length=model_max_length,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=split_special_tokens,
        hkt_kind=kind,
    )


def _begin_with_cls(backend: Tokenizer) -> processors.TemplateProcessing:
    cls = SPECIAL_TOKENS["cls_token"]
    return processors.TemplateProcessing(
        single=f"{cls} $A", pair=f"{cls} $A $B:1", special_tokens=[(cls, backend.token_to_id(cls))]
    )


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Token ids of a batch of texts, truncated and not padded: what `tokenizer(texts, truncation=True)` gives, faster.

    For the tokenizers of [`build_tokenizer`] it is about twice as fast, and its cost does not grow with the part of a
    byte text that truncation drops. Any other tokenizer is called as usual.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer.
        texts (sequence of `str`): the texts.
        max_length (`int`, *optional*): most tokens, special ones included; by default `tokenizer.model_max_length`.

    Returns:
        `list[list[int]]`: ids, one list per text.
    """
    max_length = tokenizer.model_max_length if max_length is None else max_length
    kind = tokenizer.init_kwargs.get("hkt_kind")
    if kind not in _BUILDERS or tokenizer.truncation_side != "right" or not tokenizer.split_special_tokens:
        return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    if kind == "bytes":
        texts = [text[:max_length] for text in texts]  # a character is at least one byte
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids[:max_length] for encoding in backend.encode_batch_fast(list(texts))]
