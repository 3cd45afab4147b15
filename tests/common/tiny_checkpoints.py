"""Checkpoints with tokenizers for the pipeline tests, which load their models from a folder or the Hub."""

import os
from pathlib import Path

import clients


# What the library notes of each of its tiny models: which tokenizers and processors lie beside the weights.
SUMMARY_ENTRY = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}


def write_checkpoint(model_class, model_tester, folder: str | os.PathLike) -> None:
    """Write a tiny model and a tokenizer into `folder/<model type>/<class>`, where the pipeline tests look for them."""
    tokenizer = clients.tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "eos_token": "[EOS]"})
    config = model_tester.get_config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=3,
    )
    target = Path(folder) / config.model_type / model_class.__name__
    model_class(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
