"""Stands for the library's test of the pipeline "zero-shot-classification"."""

from transformers import pipeline


class ZeroShotClassificationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        model.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
        model.config.id2label = {index: label for label, index in model.config.label2id.items()}
        classify = pipeline(
            "zero-shot-classification", model=model, tokenizer=tokenizer, dtype=dtype, candidate_labels=["a", "b"]
        )
        return classify, ["t r e e", "h i"]

    def run_pipeline_test(self, classify, examples):
        for text in examples:
            answer = classify(text, candidate_labels=["a", "b", "c"], hypothesis_template="x {}")
            assert answer["sequence"] == text
            assert sorted(answer["labels"]) == ["a", "b", "c"]
            assert abs(sum(answer["scores"]) - 1) < 1e-3
            assert answer["scores"] == sorted(answer["scores"], reverse=True)
            several = classify(text, candidate_labels=["a", "b"], hypothesis_template="x {}", multi_label=True)
            assert all(0 <= score <= 1 for score in several["scores"])
