"""Hierarchical Self-Attention (arXiv 2509.15448): trees, the operator, and its use in pretrained encoders without training."""

from ..modeling.attention_hsa import hierarchical_self_attention, hsa_energy, hsa_matrix
from .cost import attention_operations, hsa_operations
from .data import SegmentCollator, SegmentTextClassificationPipeline, tokenize_with_segments
from .gap import gap_report
from .inject import inject, load, restore
from .tree import SignalTree


__all__ = [
    "SegmentCollator",
    "SegmentTextClassificationPipeline",
    "SignalTree",
    "attention_operations",
    "gap_report",
    "hierarchical_self_attention",
    "hsa_energy",
    "hsa_matrix",
    "hsa_operations",
    "inject",
    "load",
    "restore",
    "tokenize_with_segments",
]
