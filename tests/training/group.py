"""Runs a function in several processes that form a gloo group, as Ray Train forms one around the product's workers."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_group(
    function: Callable[..., Any], folder: Path, *arguments: Any, n: int = 2, timeout: float = 120
) -> list[Any]:
    """Call `function(*arguments)` in every process of a new group.

    Args:
        function: at the top of a module; what it returns goes through a file (`torch.save`).
        folder: for this group's files; none of them is there yet.
        timeout: seconds until the processes are killed.

    Returns:
        What each process returned, by rank.

    Raises:
        AssertionError: a process raised (the message has its traceback), or did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    processes = [
        context.Process(target=_member, args=(function, folder, r, n, arguments), daemon=True) for r in range(n)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        # One that failed leaves the others waiting for it.
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"the group did not end within {timeout:.0f} s"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.join(2)
            process.kill()
            process.join()
    errors = [f"rank {r}:\n{f.read_text()}" for r in range(n) if (f := folder / f"error-{r}.txt").is_file()]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"result-{r}.pt", weights_only=False) for r in range(n)]


def _member(function: Callable[..., Any], folder: Path, rank: int, n: int, arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n, timeout=timedelta(seconds=60))
        torch.save(function(*arguments), folder / f"result-{rank}.pt")
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
