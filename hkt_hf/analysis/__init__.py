"""What a trained model does: the theorems of the HKT paper as measurements, and maps of its attention."""

from .approximation import approximation_report, decay_rates
from .constructions import as_causal_convolution, as_standard_attention
from .directions import directional_report
from .gaussianity import GaussianityCallback, gaussianity_report, mardia_test
from .kernels import kernel_report


__all__ = [
    "GaussianityCallback",
    "approximation_report",
    "as_causal_convolution",
    "as_standard_attention",
    "decay_rates",
    "directional_report",
    "gaussianity_report",
    "kernel_report",
    "mardia_test",
]
