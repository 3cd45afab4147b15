"""BERT and Llama in the same tests: what models inside the library skip.

Run by `report.py`, which compares; not collected by itself.
"""

import unittest

import common_model_tests
import pytest
import transformers


pytestmark = pytest.mark.common


class BertModelTester(common_model_tests.ModelTester):
    config_class = transformers.BertConfig
    base_model_class = transformers.BertModel


class LlamaModelTester(common_model_tests.ModelTester):
    config_class = transformers.LlamaConfig
    base_model_class = transformers.LlamaModel
    causal_lm_class = transformers.LlamaForCausalLM
    config_fields = {"num_key_value_heads": 2, "pad_token_id": 0}


class BertModelTest(common_model_tests.CommonTests, unittest.TestCase):
    model_tester_class = BertModelTester
    all_model_classes = (
        transformers.BertModel,
        transformers.BertForMaskedLM,
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
        transformers.BertForQuestionAnswering,
        transformers.BertForMultipleChoice,
    )
    trained_class = transformers.BertForMaskedLM
    dropout_fields = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    pipeline_model_mapping = {
        "feature-extraction": transformers.BertModel,
        "fill-mask": transformers.BertForMaskedLM,
        "text-classification": transformers.BertForSequenceClassification,
        "token-classification": transformers.BertForTokenClassification,
        "zero-shot": transformers.BertForSequenceClassification,
    }


class LlamaModelTest(common_model_tests.CommonDecoderTests, unittest.TestCase):
    model_tester_class = LlamaModelTester
    all_model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
        transformers.LlamaForQuestionAnswering,
    )
    trained_class = transformers.LlamaForCausalLM
    pipeline_model_mapping = {
        "feature-extraction": transformers.LlamaModel,
        "text-classification": transformers.LlamaForSequenceClassification,
        "text-generation": transformers.LlamaForCausalLM,
        "token-classification": transformers.LlamaForTokenClassification,
        "zero-shot": transformers.LlamaForSequenceClassification,
    }
