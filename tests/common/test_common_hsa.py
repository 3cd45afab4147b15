"""transformers' own common model tests on every HSA class; see `test_common_hkt.py`."""

import unittest

import common_model_tests
import pytest

from hkt_hf import HSAConfig, HSAForMaskedLM, HSAForSequenceClassification, HSAModel


pytestmark = pytest.mark.common


class HSAModelTester(common_model_tests.ModelTester):
    config_class = HSAConfig
    # Rotary positions, so that the tests of these run.
    config_fields = {"branching": [4, None], "position_embedding_type": "rope"}
    base_model_class = HSAModel


class HSAModelTest(common_model_tests.CommonTests, unittest.TestCase):
    model_tester_class = HSAModelTester
    name_tables = {
        "MODEL_MAPPING_NAMES": "HSAModel",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "HSAForMaskedLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HSAForSequenceClassification",
    }
    all_model_classes = (HSAModel, HSAForMaskedLM, HSAForSequenceClassification)
    trained_class = HSAForMaskedLM
    dropout_fields = ("hidden_dropout",)
    has_attentions = False
    test_torch_exportable = False
    pipeline_model_mapping = {
        "feature-extraction": HSAModel,
        "fill-mask": HSAForMaskedLM,
        "text-classification": HSAForSequenceClassification,
    }
