"""Trees of nested signals, with the constructor that needs a tokenizer and a sentence splitter."""

import re
from collections.abc import Sequence

import sentencex
import torch
from transformers import PreTrainedTokenizerBase

from ..modeling import tree_hsa


WHITESPACE = re.compile(r"\s")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n\s*|(?:<br\s*/?>\s*){2,}", re.IGNORECASE)


class SignalTree(tree_hsa.SignalTree):
    """[`~hkt_hf.modeling.tree_hsa.SignalTree`], and [`SignalTree.from_text`]."""

    @classmethod
    def from_text(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        max_family_size: int | None = 64,
    ) -> "SignalTree":
        """Sentences and paragraphs of texts, for the batch that `tokenizer(texts, truncation=True, padding=True)` gives.

        Args:
            texts (sequence of `str`): at least one. Paragraphs end at blank lines, or at two line breaks of HTML.
            tokenizer (`PreTrainedTokenizerBase`): a fast one: it tells where tokens stand. Special tokens become children of
                the root.
            max_length (`int`, *optional*): longer texts are cut, at the tokenizer's `model_max_length` by default.
            max_family_size (`int`, *optional*, defaults to 64): longer sentences are split into runs of about one size.

        Raises:
            ValueError: no text, one text that is not in a list, or a tokenizer that has no offsets.
        """
        segment_ids, mask, _ = text_segments(texts, tokenizer, max_length=max_length)
        return cls.from_segments(segment_ids, mask, max_family_size=max_family_size)


def text_segments(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Which sentence and which paragraph each token is in, and which tokens are real.

    Args:
        texts, tokenizer, max_length: as in [`SignalTree.from_text`].

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]`: ids of sentences and of paragraphs, the attention mask and the
        token ids, int64 `(B, N)` each. A token is in the segment of its first character that is no whitespace; each special
        token is a sentence and a paragraph of its own.

    Raises:
        ValueError: no text, one text that is not in a list, or a tokenizer that has no offsets.
    """
    if isinstance(texts, str):
        raise ValueError(f"`texts` must be a sequence of texts, got one text, {texts[:50]!r}")
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` must hold at least one text, got none")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`texts` must hold texts, got {text!r} at index {index}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"`tokenizer` must be a fast one, which knows where its tokens stand, got {type(tokenizer).__name__}"
        )
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=True,
        return_attention_mask=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    sentences = torch.full_like(encoded["input_ids"], -1)
    paragraphs = torch.full_like(encoded["input_ids"], -1)
    for row, text in enumerate(texts):
        starts = {"sentence": sentence_starts(text), "paragraph": paragraph_starts(text)}
        offsets = encoded["offset_mapping"][row].tolist()
        first_characters = torch.tensor([first_character(text, start, end) for start, end in offsets])
        for ids, name in ((sentences, "sentence"), (paragraphs, "paragraph")):
            ids[row] = torch.searchsorted(torch.tensor(starts[name]), first_characters, right=True)
        special = encoded["special_tokens_mask"][row].bool()
        alone = -1 - torch.arange(int(special.sum()))
        sentences[row, special], paragraphs[row, special] = alone, alone
    return [sentences, paragraphs], encoded["attention_mask"], encoded["input_ids"]


def first_character(text: str, start: int, end: int) -> int:
    """Where the first character of a token stands that is no whitespace; the last of a token that is nothing else.

    Byte-level tokenizers give a word the space before it, which belongs to the sentence before.
    """
    return max(start, min(end - len(text[start:end].lstrip()), end - 1))


def sentence_starts(text: str, language: str = "en") -> list[int]:
    """Where each sentence of a text begins, in characters; the first is 0.

    Sentences are those that the library sentencex finds in each paragraph.

    Args:
        text (`str`): the text.
        language (`str`, *optional*, defaults to `"en"`): its code, as the library has it.
    """
    starts, begin = [], 0
    for end, following in [
        *((match.start(), match.end()) for match in PARAGRAPH_BREAK.finditer(text)),
        (len(text), 0),
    ]:
        # Plain spaces only: the library panics where whitespace of several bytes follows an initial.
        paragraph = WHITESPACE.sub(" ", text[begin:end])
        for sentence in sentencex.segment(language, paragraph):
            starts.append(begin)
            begin += len(sentence)
        begin = following
    return starts if starts[:1] == [0] else [0, *starts]


def paragraph_starts(text: str) -> list[int]:
    """Where each paragraph of a text begins, in characters: the first at 0, others after a blank line or HTML's `<br /><br />`."""
    return [0, *(match.end() for match in PARAGRAPH_BREAK.finditer(text) if match.end() < len(text))]
