"""Settings for all tests: no network, caches of their own, one seed."""

import os
import tempfile


# Before any Hugging Face library is imported: no test may reach a Hub or read what a developer has cached.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hkt-hf-tests-"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings


settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


if not torch.cuda.is_available():
    # Before anything imports Triton: its interpreter runs our kernels, which nothing else could.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
