"""The library's mixins, put together for one model: what `test_common_hkt.py` runs on HKT.

Importing this needs the library's own tests; a test file that can't have them is skipped and says why.
"""

import os
from unittest import mock

import library_tests
import pytest
import tiny_checkpoints
import torch
from source_distribution import SourceDistributionUnavailable
from transformers.models.auto import modeling_auto


try:
    library_tests.install()
except SourceDistributionUnavailable as error:
    pytest.skip(f"transformers' common tests can't be had: {error}", allow_module_level=True)

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin

from tests import test_fsdp_mixin, test_pipeline_mixin, test_tensor_parallel_mixin


# Four ranks on two cores are slow, not wrong.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 4


class ModelTester:
    """Tiny configuration and inputs of a text model; the attributes are those that the library's tests read."""

    config_class = None
    config_fields = {}
    base_model_class = None
    causal_lm_class = None

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

    def get_config(self, **fields):
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        }
        return self.config_class(**{**sizes, **self.config_fields, **fields})

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of growing length, as for the library's decoders; padding with gaps is no input of HKT.
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CommonTests(
    ModelTesterMixin,
    test_pipeline_mixin.PipelineTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    TrainingTesterMixin,
):
    """All mixins that apply to encoders and decoders alike.

    A subclass gives `model_tester_class`, `all_model_classes`, `pipeline_model_mapping`, and in `trained_class` the class
    that the tests of training and of tensor parallelism use.
    """

    model_tester = None
    model_tester_class = None
    pipeline_model_mapping = {}
    trained_class = None
    dropout_fields = ()
    # Class names as they stand in the library's tables for a model inside it; the tests choose inputs by them.
    name_tables = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        tester = cls.model_tester_class(cls)
        model_type = tester.config_class.model_type
        for table, name in cls.name_tables.items():
            patch = mock.patch.dict(getattr(modeling_auto, table), {model_type: name})
            patch.start()
            cls.addClassCleanup(patch.stop)
        # The tests on several processes run only for models on these lists.
        for types in (
            test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES,
            test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES,
        ):
            types.add(model_type)
        for model_class in set(cls.pipeline_model_mapping.values()):
            tiny_checkpoints.write_checkpoint(model_class, tester, os.environ[library_tests.TINY_MODELS])
            test_pipeline_mixin.tiny_model_summary[model_class.__name__] = tiny_checkpoints.SUMMARY_ENTRY

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=self.model_tester.config_class, hidden_size=32, num_attention_heads=4
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _get_trainable_model_class(self):
        return self.trained_class

    def _get_tp_model_class(self):
        # An encoder has no class for the tests of `generate`, which then skip themselves; the others run on it.
        if "generation" in self._testMethodName and not self.trained_class.can_generate():
            return None
        return self.trained_class

    def _get_tp_config(self, *args, **kwargs):
        # The ranks' losses are compared with one process's, which draws other dropout masks.
        config = super()._get_tp_config(*args, **kwargs)
        for name in self.dropout_fields:
            setattr(config, name, 0.0)
        return config


class CommonDecoderTests(CommonTests, GenerationTesterMixin, test_fsdp_mixin.FSDPTesterMixin):
    """With the tests of `generate`, and those of FSDP, which train a causal language model."""
