"""Drivers that start in milliseconds: a process that has imported everything, and forks one for each study session.

It is forked from with one thread running, so that no child inherits a lock that somebody else holds. Spoken to by
`Zygote`, which is what tests use.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal


def _serve() -> None:
    """The forked-from process: reads a line of JSON for each session, answers with the session's pid."""
    from duet_ray import files, study
    from duet_ray.config import load_config
    from duet_ray.store import Store
    from tests.light.platform import LightPlatform, be_quick
    from tests.light.worker import ToyWorker
    from tests.store.kill import kill_at

    answers = os.fdopen(os.dup(1), "w")  # whatever a library prints goes elsewhere
    os.dup2(2, 1)
    be_quick()
    _warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, file=answers, flush=True)
            continue
        code = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            worker = partial(ToyWorker, log=Path(asked["log"]), seconds=asked["seconds"])
            study.StudyRun = partial(study.StudyRun, make_platform=partial(LightPlatform, make_worker=worker))
            if asked["kill"]:
                target, *where = asked["kill"]
                kill_at({"store": Store, "files": files, "os": os}[target], *where)
            if asked["clock"]:
                _move_the_clock(Store, *asked["clock"])
            study.Study(load_config(asked["study"], asked["overrides"])).run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            Path(f"{asked['output']}.code-{os.getpid()}").write_text(str(code))
            os._exit(code)


def _move_the_clock(store_class: type, seconds: float, nth: int) -> None:
    """From the nth stored sample on, this process reads another time of day."""
    add_sample, real, n_calls = store_class.add_sample, time.time, 0  # type: ignore[attr-defined]

    def moving(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth:
            time.time = lambda: real() + seconds
        return add_sample(self, *arguments)

    store_class.add_sample = moving  # type: ignore[attr-defined]


def _warm_up() -> None:
    """Everything that a session imports late, here before the first fork."""
    import duet_ray.execution.finalists
    import duet_ray.report.from_store
    import duet_ray.search.surrogate  # noqa: F401
    from duet_ray.config import load_config
    from duet_ray.preflight import preflight
    from duet_ray.search import Proposer, Told
    from tests.toy_study import write_toy_study

    with TemporaryDirectory() as folder:
        ready = preflight(load_config(write_toy_study(Path(folder))))
        proposer = Proposer.of(ready.config, ready.space, [len(d.train) for d in ready.domains], base={})
        told: list[Told] = []
        for number in range(4):
            ratio = proposer.propose(number, told, []).ratio
            told.append(Told(ratio=ratio, loss=float(number)))


class Session:
    """One driver of a study."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float = 120) -> int | None:
        """Its exit code; None when it was killed.

        Raises:
            TimeoutError: it runs on.
        """
        deadline = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the session runs on:\n{self.output()}")
            time.sleep(0.002)
        code = Path(f"{self._output}.code-{self.pid}")
        return int(code.read_text()) if code.is_file() else None

    def output(self) -> str:
        return self._output.read_text(encoding="utf-8") if self._output.is_file() else ""


class Zygote:
    """Starts drivers; a context manager. One for a whole test module."""

    def __enter__(self) -> "Zygote":
        code = "from tests.light.zygote import _serve; _serve()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def start(
        self,
        study: Path,
        *overrides: str,
        log: Path | None = None,
        seconds: float = 0.0,
        kill: tuple[Literal["store", "files", "os"], str, str, int] | None = None,
        clock: tuple[float, int] | None = None,
    ) -> Session:
        """Start `duet run` of a study, with toy groups.

        Args:
            log: file of the trainings made; `trained.log` beside the study file by default.
            seconds: that a training takes.
            kill: whose function, and as `tests.store.kill.kill_at` takes it.
            clock: seconds by which the clock jumps, at which stored sample.
        """
        output = study.parent / "output.log"
        asked: dict[str, Any] = {
            "study": str(study),
            "overrides": list(overrides),
            "output": str(output),
            "log": str(log or study.parent / "trained.log"),
            "seconds": seconds,
            "kill": list(kill) if kill else None,
            "clock": list(clock) if clock else None,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Session(int(self._answer()), output)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
