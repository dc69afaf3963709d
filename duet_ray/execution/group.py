"""A group of the fleet: a Ray Train run that lives as long as the study and pulls tasks from the broker.

Starting a worker group takes longer than training a small sample (process, imports, process group, base model), so a
group is started once and keeps the base model in memory. Of several processes the first leases, measures and writes;
the others train along with it. What they do is said in `serving`; here is what Ray has to do with it.
"""

import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from duet_ray.errors import ResourceError
from duet_ray.execution.broker import Place, ask_actor
from duet_ray.execution.serving import BrokerGone, Seat, pace, see_study, serve
from duet_ray.execution.worker import Assignment
from duet_ray.processes import ProcessIdentity
from duet_ray.secret_text import RedactingFormatter


def group_loop(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a group.

    Args:
        settings: `group` (number), `n_groups`, `broker` and `namespace` (the name of its actor), `assignment`,
            `n_threads`, `uses_gpu`, `log_file`.
    """
    import ray
    import torch

    from duet_ray.training import ranks

    torch.set_num_threads(settings["n_threads"])
    _take_device(settings["uses_gpu"])
    broker = ray.get_actor(settings["broker"], namespace=settings["namespace"])

    def ask(method: str, *arguments: Any) -> Any:
        try:
            return ask_actor(broker, method, *arguments)
        except ray.exceptions.RayError as error:
            raise BrokerGone(str(error)) from error

    seat = Seat(
        ask=ask,
        tell=lambda method, *arguments: getattr(broker, method).remote(*arguments),
        group=settings["group"],
        incarnation=ranks.first_says(uuid.uuid4().hex),
        rank=ranks.rank(),
        n_ranks=ranks.n_ranks(),
        pace=pace(settings["n_groups"]),
    )
    assignment = Assignment(**settings["assignment"])
    with suppress(ResourceError):  # `serve` says so, to the broker
        see_study(assignment.study_config().study_folder)
    _log_to(Path(settings["log_file"]), seat)
    own = ProcessIdentity.own()
    place = Place(node=ray.get_runtime_context().get_node_id(), pid=own.pid, started=own.started)
    serve(seat, assignment, place)


def _take_device(uses_gpu: bool) -> None:
    """Make `cuda` mean this worker's own GPU: it sees those of all workers of its group on its node. Or none at all."""
    if not uses_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in time: nothing has asked for a device yet
        return
    import torch
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


def _log_to(file: Path, seat: Seat) -> None:
    """All processes of a group write to one file, each line says whose it is; to Ray's, if its folder is not there."""
    handler: logging.Handler = logging.StreamHandler()
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        handler = logging.FileHandler(file)
    who = f" [{seat.rank}]" if seat.n_ranks > 1 else ""
    handler.setFormatter(RedactingFormatter(f"%(asctime)s{who} %(levelname)s %(message)s"))
    root = logging.getLogger("duet_ray")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
