"""Self-contained model code: what travels with a checkpoint and needs only torch and transformers."""

from .attention_hkt import CausalDownsample, choose_backend, hierarchical_attention, hierarchical_scores, lift
from .configuration_hkt import HKTConfig
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
    "choose_backend",
    "hierarchical_attention",
    "hierarchical_scores",
    "lift",
]
