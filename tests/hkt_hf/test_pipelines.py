"""The pipelines of transformers over saved checkpoints: batches with padding give what a text alone gives."""

import pytest
import torch
from tiny_models import tiny_head
from transformers import pipeline

from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES
from hkt_hf.tokenization import build_tokenizer


TOKENIZER = build_tokenizer("bytes", model_max_length=64, split_special_tokens=False)
TEXTS = ["A film to remember.", "Dull.", "Two hours I will not get back"]
NAMES = {0: "contradiction", 1: "neutral", 2: "entailment"}
TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-classification": "AutoModelForSequenceClassification",
}


@pytest.fixture(scope="module")
def make_pipeline(tmp_path_factory):
    """Makes a pipeline from a checkpoint folder, as users do; returns it and the model that was saved."""

    def make(task):
        folder = tmp_path_factory.mktemp(task)
        labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
        # A wide initial range, so that not every token gets the same class.
        model = tiny_head(TASKS[task], vocab_size=len(TOKENIZER), initializer_range=1.0, **labels)
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        loaded = pipeline(task, model=str(folder), batch_size=2)
        assert type(loaded.model).__name__ == AUTO_CLASSES[TASKS[task]]
        return loaded, model

    return make


@torch.no_grad()
def alone(model, text):
    """The first output of the model for one text without padding, `(T, ...)` or `(num_labels,)`."""
    return model(**TOKENIZER(text, return_tensors="pt"))[0][0]


def test_feature_extraction(make_pipeline):
    extract, model = make_pipeline("feature-extraction")
    for text, features in zip(TEXTS, extract(TEXTS, return_tensors=True), strict=True):
        real = features[0, : len(text)]  # a batch returns its padded columns too
        torch.testing.assert_close(real, alone(model, text), rtol=1e-5, atol=1e-5)


def test_text_classification(make_pipeline):
    classify, model = make_pipeline("text-classification")
    for text, scores in zip(TEXTS, classify(TEXTS, top_k=None), strict=True):
        found = {entry["label"]: entry["score"] for entry in scores}
        expected = alone(model, text).softmax(-1).tolist()
        assert [found[NAMES[index]] for index in range(3)] == pytest.approx(expected, abs=1e-5)


def test_token_classification(make_pipeline):
    tag, model = make_pipeline("token-classification")
    for text, entities in zip(TEXTS, tag(TEXTS, ignore_labels=[]), strict=True):
        probabilities = alone(model, text).softmax(-1)
        assert [(entity["start"], entity["end"]) for entity in entities] == [(i, i + 1) for i in range(len(text))]
        assert [entity["entity"] for entity in entities] == [NAMES[i] for i in probabilities.argmax(-1).tolist()]
        scores = [entity["score"] for entity in entities]
        assert scores == pytest.approx(probabilities.max(-1).values.tolist(), abs=1e-5)


def test_token_classification_joins_tokens_of_one_class(make_pipeline):
    tag, _ = make_pipeline("token-classification")
    (groups,) = tag(TEXTS[:1], aggregation_strategy="simple", ignore_labels=[])
    assert "".join(group["word"] for group in groups) == TEXTS[0]
    assert [group["start"] for group in groups[1:]] == [group["end"] for group in groups[:-1]]
    assert 1 < len(groups) < len(TEXTS[0])


def test_fill_mask(make_pipeline):
    fill, model = make_pipeline("fill-mask")
    texts = ["A fi[MASK]m to remember.", "D[MASK]ll.", "Two [MASK]ours"]
    for text, proposals in zip(texts, fill(texts, top_k=3), strict=True):
        column = text.index("[MASK]")
        values, ids = alone(model, text)[column].softmax(-1).topk(3)
        assert [entry["token"] for entry in proposals] == ids.tolist()
        assert [entry["score"] for entry in proposals] == pytest.approx(values.tolist(), abs=1e-5)
        for entry in proposals:
            shown = TOKENIZER.decode([entry["token"]], skip_special_tokens=True)
            assert entry["sequence"] == text.replace("[MASK]", shown)
    targets = fill("A fi[MASK]m", targets=["l", "r"])
    assert {entry["token_str"] for entry in targets} == {"l", "r"}


def test_text_generation(make_pipeline):
    generate, model = make_pipeline("text-generation")
    generate.tokenizer.padding_side = "left"
    results = generate(TEXTS, max_new_tokens=6, do_sample=False, return_full_text=False)
    for text, (result,) in zip(TEXTS, results, strict=True):
        batch = TOKENIZER(text, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert result["generated_text"] == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_zero_shot_classification(make_pipeline):
    classify, model = make_pipeline("zero-shot-classification")
    labels = ["good", "unbearable"]
    for text, result in zip(TEXTS, classify(TEXTS, labels, hypothesis_template=" {}"), strict=True):
        entailment = torch.stack([alone(model, f"{text} {label}")[2] for label in labels]).softmax(-1).tolist()
        found = dict(zip(result["labels"], result["scores"], strict=True))
        assert [found[label] for label in labels] == pytest.approx(entailment, abs=1e-5)


def test_a_configuration_that_records_level_weights_serves_pipelines_too(tmp_path):
    model = tiny_head("AutoModelForSequenceClassification", vocab_size=len(TOKENIZER), output_level_weights=True)
    classify = pipeline("text-classification", model=model, tokenizer=TOKENIZER, batch_size=2)
    assert len(classify(TEXTS)) == 3
