"""Stands for the library's test of the pipeline "token-classification"."""

import torch
from transformers import pipeline


class TokenClassificationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        return pipeline("token-classification", model=model, tokenizer=tokenizer, dtype=dtype), ["t r e e", "h i"]

    def run_pipeline_test(self, classify, examples):
        for text in examples:
            with torch.no_grad():
                scores = classify.model(**classify.tokenizer(text, return_tensors="pt")).logits[0].float().softmax(-1)
            answers = classify(text)
            assert [answer["word"] for answer in answers] == text.split()
            for answer, expected in zip(answers, scores, strict=True):
                assert answer["entity"] == classify.model.config.id2label[expected.argmax().item()]
                assert abs(answer["score"] - expected.max().item()) < 1e-3
                assert text[answer["start"] : answer["end"]] == answer["word"]
        grouped = classify(examples[0], aggregation_strategy="simple")
        assert " ".join(answer["word"] for answer in grouped).split() == examples[0].split()
