"""Stands for the library's test of the pipeline "text-generation"."""

from transformers import pipeline


class TextGenerationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        return pipeline("text-generation", model=model, tokenizer=tokenizer, dtype=dtype), ["t r e e", "h i"]

    def run_pipeline_test(self, write, examples):
        options = {"max_new_tokens": 5, "do_sample": False}
        for text in examples:
            inputs = write.tokenizer(text, return_tensors="pt")
            expected = write.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
            (answer,) = write(text, **options, return_full_text=False)
            assert (
                answer["generated_text"].split() == write.tokenizer.decode(expected, skip_special_tokens=True).split()
            )
            (answer,) = write(text, **options)
            assert answer["generated_text"].startswith(text)
        assert len(write(examples, **options)) == len(examples)
