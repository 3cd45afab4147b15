"""Makes the library's test files importable under the names they give each other: `tests.test_modeling_common` etc.

The source distribution has only some of them. `stand_ins/` has files of our own for the others that the mixins import; a
file that a distribution does have comes first.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from source_distribution import library_source


STAND_INS = Path(__file__).resolve().parent / "stand_ins"
# The library's own setting for pipeline tests that do not load their models from the Hub.
TINY_MODELS = "TRANSFORMERS_TINY_MODEL_PATH"


def install() -> None:
    """Make the package `tests`, if it is not there yet.

    Raises:
        SourceDistributionUnavailable: as [`library_source`].
    """
    if hasattr(sys.modules.get("tests"), "source"):
        return
    package = ModuleType("tests")
    package.source = library_source()
    package.__path__ = [str(package.source / "tests"), str(STAND_INS)]
    sys.modules["tests"] = package
    if TINY_MODELS not in os.environ:
        package.tiny_models = tempfile.TemporaryDirectory(prefix="hkt-hf-tiny-models-")
        os.environ[TINY_MODELS] = package.tiny_models.name
        reports = Path(package.tiny_models.name) / "reports"
        reports.mkdir()
        (reports / "tiny_model_summary.json").write_text("{}", encoding="utf-8")  # filled by the tests
