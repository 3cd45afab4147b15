"""The architectures of this package by `model_type`: their configuration, and which class serves which Auto class."""

import difflib
from dataclasses import dataclass
from types import ModuleType

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling import HKTConfig, HSAConfig, modeling_hkt, modeling_hsa


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        config_class (`type`): its configuration.
        module (`ModuleType`): where its models are, with `AUTO_CLASSES` and `AUTO_MAP`.
    """

    config_class: type[PreTrainedConfig]
    module: ModuleType

    def model_class(self, auto_name: str) -> type[PreTrainedModel]:
        """The model behind an Auto class, e.g. `"AutoModelForMaskedLM"`."""
        return getattr(self.module, self.module.AUTO_CLASSES[auto_name])


ARCHITECTURES = {
    HKTConfig.model_type: Architecture(HKTConfig, modeling_hkt),
    HSAConfig.model_type: Architecture(HSAConfig, modeling_hsa),
}
DEFAULT = HKTConfig.model_type


def architecture(model_type: str = DEFAULT) -> Architecture:
    """The architecture of a `model_type`.

    Raises:
        ValueError: an unknown one; the message names the nearest.
    """
    if model_type not in ARCHITECTURES:
        nearest = difflib.get_close_matches(str(model_type), ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`model.model_type` must be one of {list(ARCHITECTURES)}, got {model_type!r}; the nearest one is {nearest!r}"
        )
    return ARCHITECTURES[model_type]
