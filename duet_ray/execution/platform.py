"""What a session needs of the machines it runs on: a broker that leases its tasks, groups that do them, thin trials.

`StudyRun` speaks to a `Platform` and knows nothing of Ray, so that what it promises of crashes can be tested with real
kills and without a cluster. `RayPlatform` is the one that studies run on.
"""

import shutil
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from duet_ray.config import StudyConfig
from duet_ray.errors import ResourceError
from duet_ray.execution.broker import Place, ask_actor, start_broker
from duet_ray.execution.fleet import Fleet, end_process
from duet_ray.execution.ray_session import ray_session
from duet_ray.execution.trial import TrialPlan, run_in_tune
from duet_ray.execution.worker import Assignment

if TYPE_CHECKING:
    from duet_ray.execution.searcher import StudySearcher

NAMESPACE = "duet_ray"


class PlatformLost(ResourceError):
    """The machines that a session ran on are gone, or do not answer."""


class Platform(Protocol):
    """A context: the groups are started on entry, and have ended on exit."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the `Broker`; from any thread.

        Raises:
            PlatformLost: it cannot be reached.
        """
        ...

    def ended_groups(self) -> dict[int, str]:
        """Group → why it ended, for those that will not come back."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether no group is left."""
        ...

    def end(self, place: Place) -> None:
        """Kill a process of a group that is taken for hung."""
        ...

    def run_trials(self, searcher: "StudySearcher", n_trials: int, plan: TrialPlan) -> None:
        """Run trials that the searcher suggests until it has no more, at most `n_trials`; each waits for its samples.

        Raises whatever stopped it; what the searcher raised stands in `searcher.error`.
        """
        ...


class RayPlatform:
    """Ray: the broker an actor on the driver's node, each group a Ray Train run, the trials those of Ray Tune."""

    def __init__(self, config: StudyConfig, assignment: Assignment, say: Callable[[str], None]) -> None:
        self._config, self._assignment, self._say = config, assignment, say
        self._broker: Any = None
        self._broker_name = f"broker-{uuid.uuid4().hex[:12]}"
        self._scratch = config.study_folder / ".ray" / self._broker_name
        """Ray's own files: never read by a resume, deleted at the end."""
        self._stack = ExitStack()

    def __enter__(self) -> "RayPlatform":
        with ExitStack() as stack:
            stack.enter_context(ray_session(self._config, self._say))
            minutes = self._config.fleet.max_task_minutes
            self._broker = start_broker(
                self._broker_name,
                NAMESPACE,
                self._config.sampling.max_retries,
                minutes * 60 if minutes is not None else None,
                self._config.fleet.groups_at_start,
            )
            self._fleet = stack.enter_context(
                Fleet(self._config, self._assignment, broker_name=self._broker_name, namespace=NAMESPACE)
            )
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ask_actor(self._broker, method, *arguments)
        except ray.exceptions.RayError as error:
            raise PlatformLost(_ray_failed(error)) from error

    def ended_groups(self) -> dict[int, str]:
        return self._fleet.ended()

    @property
    def is_gone(self) -> bool:
        return self._fleet.is_gone

    def end(self, place: Place) -> None:
        end_process(place)

    def run_trials(self, searcher: "StudySearcher", n_trials: int, plan: TrialPlan) -> None:
        import ray
        from ray import tune

        tuner = tune.Tuner(
            # A sliver of the head node: no CPU that a group waits for, and no empty request, which Tune refuses.
            tune.with_resources(
                partial(run_in_tune, broker_name=self._broker_name, namespace=NAMESPACE, plan=plan),
                {"node:__internal_head__": 0.001},
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=n_trials,
                max_concurrent_trials=self._config.search.concurrent_trials,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self._scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=self._config.sampling.max_retries),
            ),
        )
        try:
            tuner.fit()
        except ray.exceptions.RayError as error:
            raise PlatformLost(_ray_failed(error)) from error

    def _close(self) -> None:
        with suppress(PlatformLost):  # Ray is gone already: there is nothing to close.
            self.ask("close")
        shutil.rmtree(self._scratch, ignore_errors=True)


def _ray_failed(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Ray failed: {reason}; what finished is kept, the same command goes on"
