"""Tells an exhausted memory from every other fault, on CPU and GPU."""

import gc

import torch

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out. The CPU allocator and cuBLAS raise a plain RuntimeError for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR)


def free_memory() -> None:
    """Give back what no tensor holds any more, after an out-of-memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
