# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Memory on the CPU, for operators that make and free many tensors of some MiB."""

import functools

import torch


@functools.cache
def keep_freed_memory() -> None:
    """Once: free a block of 31 MiB, after which glibc keeps freed blocks of up to that size for the next tensors.

    Otherwise every such tensor is mapped anew, at a page fault for each 4 KiB. Other allocators do not mind.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
