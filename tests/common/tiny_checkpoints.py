"""Checkpoints with tokenizers for the pipeline tests, in the folder that the library's own setting names."""

import os
from pathlib import Path

import clients

import hkt_hf


# What the library keeps of each of its tiny models: which tokenizers and processors lie beside the weights.
SUMMARY = {
    name: {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": [], "model_classes": [name]}
    for name in hkt_hf.modeling.modeling_hkt.AUTO_CLASSES.values()
}


def tokenizer_with_mask_and_end():
    tokenizer = clients.tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "eos_token": "[EOS]"})
    return tokenizer


def write_checkpoint(model_class, folder: str | os.PathLike, **fields) -> None:
    """Write a tiny model and a tokenizer into `folder/hkt/<class>`, where the pipeline tests look for them."""
    tokenizer = tokenizer_with_mask_and_end()
    config = clients.tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **fields)
    target = Path(folder) / config.model_type / model_class.__name__
    model_class(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
