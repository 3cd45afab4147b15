"""Stands for the library's test of the pipeline "fill-mask"."""

import torch
from transformers import pipeline


class FillMaskPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        mask = tokenizer.mask_token
        return pipeline("fill-mask", model=model, tokenizer=tokenizer, dtype=dtype), [f"t r {mask} e", f"{mask} i"]

    def run_pipeline_test(self, fill, examples):
        tokenizer = fill.tokenizer
        for text in examples:
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = fill.model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0]
            best = logits.softmax(-1).float().sort(descending=True)
            answers = fill(text, top_k=3)
            torch.testing.assert_close(
                torch.tensor([answer["score"] for answer in answers]), best.values[:3], rtol=1e-3, atol=1e-4
            )
            for answer in answers:
                assert answer["token_str"] == tokenizer.decode([answer["token"]])
                assert set(answer) == {"score", "token", "token_str", "sequence"}
            assert {answer["token_str"] for answer in fill(text, targets=["a", "b"])} == {"a", "b"}
        two_masks = fill(f"{tokenizer.mask_token} r {tokenizer.mask_token}", top_k=2)
        assert [len(answers) for answers in two_masks] == [2, 2]
