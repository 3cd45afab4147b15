"""Self-contained model code: what travels with a checkpoint and needs only torch and transformers."""

from .attention_hkt import CausalDownsample, choose_backend, hierarchical_attention, hierarchical_scores, lift
from .attention_hsa import hierarchical_self_attention, hsa_energy, hsa_matrix
from .configuration_hkt import HKTConfig
from .configuration_hsa import HSAConfig
from .modeling_hkt import (
    HKTForCausalLM,
    HKTForMaskedLM,
    HKTForMultipleChoice,
    HKTForQuestionAnswering,
    HKTForSequenceClassification,
    HKTForTokenClassification,
    HKTModel,
    HKTPreTrainedModel,
)
from .modeling_hsa import HSAForMaskedLM, HSAForSequenceClassification, HSAModel, HSAPreTrainedModel
from .tree_hsa import SignalTree


__all__ = [
    "CausalDownsample",
    "HKTConfig",
    "HKTForCausalLM",
    "HKTForMaskedLM",
    "HKTForMultipleChoice",
    "HKTForQuestionAnswering",
    "HKTForSequenceClassification",
    "HKTForTokenClassification",
    "HKTModel",
    "HKTPreTrainedModel",
    "HSAConfig",
    "HSAForMaskedLM",
    "HSAForSequenceClassification",
    "HSAModel",
    "HSAPreTrainedModel",
    "SignalTree",
    "choose_backend",
    "hierarchical_attention",
    "hierarchical_scores",
    "hierarchical_self_attention",
    "hsa_energy",
    "hsa_matrix",
    "lift",
]
