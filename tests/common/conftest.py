"""The library's own tests: collected when asked for, each skip with a reason that is known."""

import re


collect_ignore = ["stand_ins"]
LIBRARY_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for mark in LIBRARY_MARKS:
        config.addinivalue_line("markers", f"{mark}: set by the library's tests")


def pytest_ignore_collect(collection_path, config):
    """Collecting the library's tests downloads them, so only `-m common` does."""
    if collection_path.name.startswith("test_common_"):
        return not re.search(r"(?<!not )\bcommon\b", config.getoption("markexpr")) or None
    return None
