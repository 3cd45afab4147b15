"""The library's own tests: collected when asked for, each skip with a reason that is known."""

import re

import pytest
from known_skips import explanation


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that is skipped for a reason of its own, or since a change of the model, does not go unnoticed."""
    report = yield
    if report.skipped and item.path.name.startswith("test_common_"):
        reason = report.longrepr[2]
        if explanation(reason, item.path.name == "test_common_hsa.py") is None:
            report.outcome = "failed"
            report.longrepr = f"{reason}\nThis reason to skip is not in tests/common/known_skips.py."
    return report
