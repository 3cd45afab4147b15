"""Hierarchical attention on the Hugging Face stack. Importing this package registers HKT with the Auto classes."""

import transformers

from .modeling import (
    CausalDownsample,
    HKTConfig,
    HKTForCausalLM,
    HKTForMaskedLM,
    HKTForMultipleChoice,
    HKTForQuestionAnswering,
    HKTForSequenceClassification,
    HKTForTokenClassification,
    HKTModel,
    HKTPreTrainedModel,
    choose_backend,
    hierarchical_attention,
    hierarchical_scores,
    lift,
    modeling_hkt,
)
from .presets import preset


__version__ = "0.1.0"


def _register_auto_classes() -> None:
    """Make the Auto classes know HKT, and let `save_pretrained` copy the code that a checkpoint needs elsewhere."""
    transformers.AutoConfig.register(HKTConfig.model_type, HKTConfig, exist_ok=True)
    HKTConfig.register_for_auto_class()
    for auto_name, class_name in modeling_hkt.AUTO_CLASSES.items():
        model_class = getattr(modeling_hkt, class_name)
        getattr(transformers, auto_name).register(HKTConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_name)


_register_auto_classes()

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
    "preset",
]
