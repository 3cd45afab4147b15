"""Which classes stand behind a `model_type`."""

import pytest
import transformers

from hkt_hf import HKTConfig, HSAConfig
from hkt_hf.architectures import ARCHITECTURES, architecture


def test_every_architecture_is_what_the_auto_classes_give():
    assert {name: found.config_class for name, found in ARCHITECTURES.items()} == {"hkt": HKTConfig, "hsa": HSAConfig}
    assert architecture().config_class is HKTConfig
    for name, found in ARCHITECTURES.items():
        assert type(transformers.AutoConfig.for_model(name)) is found.config_class
        for auto_name in found.module.AUTO_CLASSES:
            mapping = getattr(transformers, auto_name)._model_mapping
            assert mapping[found.config_class] is found.model_class(auto_name)


@pytest.mark.parametrize("name, nearest", [("hkd", "hkt"), ("hsb", "hsa")])
def test_unknown_ones_are_refused(name, nearest):
    with pytest.raises(ValueError, match=f"`model.model_type` must be one of .* the nearest one is '{nearest}'"):
        architecture(name)
