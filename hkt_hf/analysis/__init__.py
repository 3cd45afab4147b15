"""What a trained model does: the theorems of the HKT paper as measurements, and maps of its attention."""

from importlib import import_module


_MODULES = {
    "GaussianityCallback": "gaussianity",
    "approximation_report": "approximation",
    "as_causal_convolution": "constructions",
    "as_standard_attention": "constructions",
    "decay_rates": "approximation",
    "directional_report": "directions",
    "gaussianity_report": "gaussianity",
    "kernel_report": "kernels",
    "mardia_test": "gaussianity",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    # When asked for: the command `hkt` looks into this package, and must not need what its reports need.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
