"""transformers' own common model tests on every HKT class, as they run on a model that ships inside transformers.

The tests come from the source distribution of the installed version and are skipped where it can't be had.
"""

import os
import unittest
from unittest import mock

import library_tests
import pytest
import tiny_checkpoints
import torch
from source_distribution import SourceDistributionUnavailable
from transformers.models.auto import modeling_auto

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


try:
    library_tests.install()
except SourceDistributionUnavailable as error:
    pytest.skip(f"transformers' common tests can't be had: {error}", allow_module_level=True)

from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_training_mixin import TrainingTesterMixin


pytestmark = pytest.mark.common

# Models inside the library are in these tables of names; the tests read them to choose inputs for a class.
NAME_TABLES = {
    "MODEL_MAPPING_NAMES": "HKTModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HKTForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "HKTForMaskedLM",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "HKTForMultipleChoice",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "HKTForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HKTForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "HKTForTokenClassification",
}
# The tests on several processes run only for models on these lists.
for module, name in (
    (test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES"),
    (test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES"),
):
    getattr(module, name).add(HKTConfig.model_type)


class HKTModelTester:
    """Tiny configuration and inputs; the attributes are those that the library's tests read."""

    base_model_class = HKTModel
    causal_lm_class = None
    config_fields = {}

    batch_size = 13
    seq_length = 7
    num_choices = 4
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return HKTConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_levels=3,
            max_position_embeddings=64,
            **self.config_fields,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of growing length: HKT takes padding on a side, not the gaps of a random mask.
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class HKTDecoderModelTester(HKTModelTester):
    causal_lm_class = HKTForCausalLM
    # No dropout, as in the library's decoders: the tests on several processes compare training with one process.
    config_fields = {"is_decoder": True, "pooling": "last", "hidden_dropout": 0.0}


class HKTCommonTests(ModelTesterMixin, PipelineTesterMixin, test_tensor_parallel_mixin.TensorParallelTesterMixin):
    """All mixins that apply to encoders and decoders alike."""

    model_tester = None
    model_tester_class = HKTModelTester

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for table, name in NAME_TABLES.items():
            patch = mock.patch.dict(getattr(modeling_auto, table), {HKTConfig.model_type: name})
            patch.start()
            cls.addClassCleanup(patch.stop)
        for model_class in cls.pipeline_model_mapping.values():
            tiny_checkpoints.write_checkpoint(
                model_class, os.environ[library_tests.TINY_MODELS], **cls.model_tester_class.config_fields
            )

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=HKTConfig, hidden_size=32, num_attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()


class HKTModelTest(HKTCommonTests, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        HKTModel,
        HKTForMaskedLM,
        HKTForSequenceClassification,
        HKTForTokenClassification,
        HKTForQuestionAnswering,
        HKTForMultipleChoice,
    )
    pipeline_model_mapping = {
        "feature-extraction": HKTModel,
        "fill-mask": HKTForMaskedLM,
        "text-classification": HKTForSequenceClassification,
        "token-classification": HKTForTokenClassification,
        "zero-shot": HKTForSequenceClassification,
    }

    def _get_trainable_model_class(self):
        return HKTForMaskedLM

    def _get_tp_model_class(self):
        return HKTForMaskedLM


class HKTDecoderModelTest(
    HKTCommonTests,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester_class = HKTDecoderModelTester
    all_model_classes = (
        HKTModel,
        HKTForCausalLM,
        HKTForSequenceClassification,
        HKTForTokenClassification,
        HKTForQuestionAnswering,
        HKTForMultipleChoice,
    )
    pipeline_model_mapping = {"text-generation": HKTForCausalLM}
