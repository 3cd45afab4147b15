"""Stands for the library's test of the pipeline "text-classification"."""

import torch
from transformers import pipeline


class TextClassificationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        return pipeline("text-classification", model=model, tokenizer=tokenizer, dtype=dtype), ["t r e e", "h i"]

    def run_pipeline_test(self, classify, examples):
        for text in examples:
            with torch.no_grad():
                scores = classify.model(**classify.tokenizer(text, return_tensors="pt")).logits[0].float().softmax(-1)
            (best,) = classify(text)
            assert best["label"] == classify.model.config.id2label[scores.argmax().item()]
            assert abs(best["score"] - scores.max().item()) < 1e-3
            every = classify(text, top_k=None)
            assert {answer["label"] for answer in every} == set(classify.model.config.id2label.values())
            assert abs(sum(answer["score"] for answer in every) - 1) < 1e-3
        assert len(classify(examples)) == len(examples)
