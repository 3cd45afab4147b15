"""transformers' own common model tests on every HKT class, as they run on a model that ships inside transformers.

The tests come from the source distribution of the installed version and are skipped where it can't be had.
"""

import tempfile
import unittest

import common_model_tests
import pytest

from hkt_hf import (
    HKTConfig,
    HKTForCausalLM,
    HKTForMaskedLM,
    HKTForMultipleChoice,
    HKTForQuestionAnswering,
    HKTForSequenceClassification,
    HKTForTokenClassification,
    HKTModel,
)


pytestmark = pytest.mark.common

NAME_TABLES = {
    "MODEL_MAPPING_NAMES": "HKTModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HKTForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "HKTForMaskedLM",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "HKTForMultipleChoice",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "HKTForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HKTForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "HKTForTokenClassification",
}


class AutoIsTheDefault:
    """The one common test that HKT answers in its own way: the default attention is "auto" and not "sdpa"."""

    def test_sdpa_can_dispatch_non_composite_models(self):
        """What is asked for is what runs, and without a wish it is "auto"."""
        for model_class in self.all_model_classes:
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            with tempfile.TemporaryDirectory() as folder:
                model_class(config).save_pretrained(folder)
                self.assertEqual(model_class.from_pretrained(folder).config._attn_implementation, "auto")
                for wish in ("auto", "sdpa", "eager", "polyphase"):
                    model = model_class.from_pretrained(folder, attn_implementation=wish)
                    found = {
                        module.config._attn_implementation for module in model.modules() if hasattr(module, "config")
                    }
                    self.assertEqual(found, {wish})


class HKTModelTester(common_model_tests.ModelTester):
    config_class = HKTConfig
    base_model_class = HKTModel


class HKTDecoderModelTester(HKTModelTester):
    causal_lm_class = HKTForCausalLM
    # No dropout, as in the library's decoders: the tests on several processes compare training with one process.
    config_fields = {"is_decoder": True, "pooling": "last", "hidden_dropout": 0.0}


class HKTModelTest(AutoIsTheDefault, common_model_tests.CommonTests, unittest.TestCase):
    model_tester_class = HKTModelTester
    name_tables = NAME_TABLES
    all_model_classes = (
        HKTModel,
        HKTForMaskedLM,
        HKTForSequenceClassification,
        HKTForTokenClassification,
        HKTForQuestionAnswering,
        HKTForMultipleChoice,
    )
    trained_class = HKTForMaskedLM
    dropout_fields = ("hidden_dropout",)
    pipeline_model_mapping = {
        "feature-extraction": HKTModel,
        "fill-mask": HKTForMaskedLM,
        "text-classification": HKTForSequenceClassification,
        "token-classification": HKTForTokenClassification,
        "zero-shot": HKTForSequenceClassification,
    }


class HKTDecoderModelTest(AutoIsTheDefault, common_model_tests.CommonDecoderTests, unittest.TestCase):
    model_tester_class = HKTDecoderModelTester
    name_tables = NAME_TABLES
    all_model_classes = (
        HKTModel,
        HKTForCausalLM,
        HKTForSequenceClassification,
        HKTForTokenClassification,
        HKTForQuestionAnswering,
        HKTForMultipleChoice,
    )
    trained_class = HKTForCausalLM
    pipeline_model_mapping = {
        "feature-extraction": HKTModel,
        "text-classification": HKTForSequenceClassification,
        "text-generation": HKTForCausalLM,
        "token-classification": HKTForTokenClassification,
        "zero-shot": HKTForSequenceClassification,
    }
