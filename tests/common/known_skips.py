"""Why a test of the library may be skipped for HKT and HSA, and nothing else: an unlisted reason is a failure.

Each reason holds for models inside the library too; `results/common_tests.md` names one for every test.
"""

import re


# Pattern of the reason that a test gives -> what it means here.
KNOWN_SKIPS = {
    r"test requires (accelerator|multiple accelerators|MPS|CUDA|GPU)": "the machine has no such device",
    r"test requires (Flash Attention( \d)?|the kernels library|deepspeed|bitsandbytes)": "needs a GPU package",
    r"Test requires torchao": "a package for quantised weights",
    r"test requires (Timm|PyTesseract|av|vision)": "a task of images or video",
    r"test is slow": "needs an accelerator as well",
    r"is not in `self.pipeline_model_mapping`": "a pipeline of another modality or of another head",
    r"`run_pipeline_test` is currently not implemented": "skipped for every model",
    r"No conversion found for": "no old checkpoint format to convert",
    r"has no _keep_in_fp32_modules": "no module must stay in float32",
    r"partial rope|axial RoPE|does not support RoPE scaling|no standardized RoPE": "another kind of rotary embedding",
    r"grouped_mm|sparse experts|output_router_logits|MoE model|expert parallel plan": "no mixture of experts",
    r"[Nn]ot (a )?composite|No subconfigs|does not support SDPA": "one model, not several in one",
    r"No sequence-to-sequence language modeling head|No decoder-only language modeling head": "no such head",
    r"does not support sliding window mask": "no sliding window",
    r"does not have position embeddings": "no position table that is resized",
    r"Model tester has neither causal_lm_class": "an encoder does not generate",
}


# Of HSA alone.
HSA_SKIPS = {
    r"does not (support|output) (output_)?attentions|setting its attention dynamically": "HSA has no attention weights",
    r"does not have a (TP|tensor parallel) plan": "HSA has no tensor parallelism",
    r"`test_torch_exportable` is False": "trees are built from values, which `torch.export` does not see",
}


def explanation(reason: str, is_hsa: bool = False) -> str | None:
    """What the reason of a skip means, or `None` for one that is not known."""
    known = KNOWN_SKIPS | (HSA_SKIPS if is_hsa else {})
    return next((meaning for pattern, meaning in known.items() if re.search(pattern, reason)), None)
