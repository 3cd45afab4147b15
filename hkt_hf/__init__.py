"""Hierarchical attention on the Hugging Face stack. Importing this package registers HKT and HSA with the Auto classes."""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    HSAConfig,
    HSAForMaskedLM,
    HSAForSequenceClassification,
    HSAModel,
    HSAPreTrainedModel,
    choose_backend,
    hierarchical_attention,
    hierarchical_scores,
    lift,
    modeling_hkt,
    modeling_hsa,
)
from .presets import preset


__version__ = "0.1.0"


def _register_auto_classes() -> None:
    """Make the Auto classes know HKT and HSA, and let `save_pretrained` copy the code that a checkpoint needs elsewhere."""
    for config_class, module in ((HKTConfig, modeling_hkt), (HSAConfig, modeling_hsa)):
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_name, class_name in module.AUTO_CLASSES.items():
            model_class = getattr(module, class_name)
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_name)
    # Where `Trainer` looks whether labels have to be shifted before it smooths them.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(HKTConfig.model_type, HKTForCausalLM.__name__)


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
    "HSAConfig",
    "HSAForMaskedLM",
    "HSAForSequenceClassification",
    "HSAModel",
    "HSAPreTrainedModel",
    "choose_backend",
    "hierarchical_attention",
    "hierarchical_scores",
    "lift",
    "preset",
]
