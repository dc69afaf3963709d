"""The processes of a group that train one sample together, and what they tell each other.

One process is a group too: then nothing is sent and nothing waits. Every process of a group makes the same calls in
the same order; whatever one of them alone knows (its memory ran out) is told to all before any of them acts on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from duet_ray.errors import ResourceError
from duet_ray.training.base import Stopped


class OutOfStep(ResourceError):
    """A process left the group alone, in the middle of an exchange: the others wait, and the group is to be ended."""


_n_alone = 0
_is_stopped = False


def rank() -> int:
    """This process's number in its group, from 0."""
    return dist.get_rank() if _is_group() else 0


def n_ranks() -> int:
    """Processes in the group."""
    return dist.get_world_size() if _is_group() else 1


def add_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Replace every tensor by its sum over the group, in place; one message for all of one type.

    Args:
        tensors: of the same shapes in the same order in every process.
    """
    if n_ranks() == 1 or not tensors:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process of the group."""
    if n_ranks() == 1:
        return flag
    told = torch.tensor([float(flag)], device=device)
    dist.all_reduce(told)
    return bool(told.item() > 0)


def on_all_ranks_the_same(number: int, device: torch.device) -> bool:
    """Whether all processes of the group have one and the same number."""
    if n_ranks() == 1:
        return True
    told = torch.tensor([float(number), -float(number)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told[0] == -told[1])


def first_says(word: str) -> str:
    """What the first process of the group says, in all of them."""
    words = [word]
    if n_ranks() > 1:
        dist.broadcast_object_list(words, src=0)
    return words[0]


def stop() -> None:
    """Have the training under way end at its next step, in all processes of the group together: `end_if_stopped`."""
    global _is_stopped
    _is_stopped = True


def was_stopped() -> bool:
    """Whether `stop` was called in this process."""
    return _is_stopped


def end_if_stopped(device: torch.device) -> None:
    """To be called at every step by a trainer: a process that left alone would be waited for by the others.

    Raises:
        Stopped: in all processes, if `stop` was called in one.
    """
    if n_ranks() > 1 and on_any_rank(_is_stopped, device):
        raise Stopped


@contextmanager
def alone() -> Iterator[None]:
    """This process works by itself: nothing in the block is shared with the group."""
    global _n_alone
    _n_alone += 1
    try:
        yield
    finally:
        _n_alone -= 1


def _is_group() -> bool:
    return _n_alone == 0 and dist.is_available() and dist.is_initialized()
