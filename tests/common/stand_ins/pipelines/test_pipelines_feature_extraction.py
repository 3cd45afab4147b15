"""Stands for the library's test of the pipeline "feature-extraction"."""

import torch
from transformers import pipeline


class FeatureExtractionPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        return pipeline("feature-extraction", model=model, tokenizer=tokenizer, dtype=dtype), ["t r e e", "h i"]

    def run_pipeline_test(self, extractor, examples):
        for text in examples:
            inputs = extractor.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                expected = extractor.model(**inputs).last_hidden_state
            features = torch.tensor(extractor(text))
            assert features.shape == (1, len(text.split()), extractor.model.config.hidden_size)
            torch.testing.assert_close(features.to(expected.dtype), expected, rtol=1e-3, atol=1e-3)
            assert torch.is_tensor(extractor(text, return_tensors=True))
        assert len(extractor(examples)) == len(examples)
