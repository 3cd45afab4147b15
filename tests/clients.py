"""Tiny checkpoints, and fresh Python processes that use them."""

import os
import subprocess
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hkt_hf import HKTConfig


WORDS = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = ["h i e r a r c h y", "t r e e"]

# Stands before a script that must not need this project: users of a checkpoint have not installed it.
WITHOUT_PROJECT = """
import sys

class _Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hkt_hf", "modeling"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, _Blocker())
"""


def tiny_config(**kwargs):
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return HKTConfig(**{**sizes, **kwargs})


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        padding_side="right",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def run_python(script, cwd, environment, *arguments):
    """Run `script` in a fresh process in the folder `cwd`; fail with its output when it fails."""
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore", **environment}
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process.stdout
