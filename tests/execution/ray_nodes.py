"""Ray nodes on loopback, each a `ray start` of its own with a token: added, and killed like a machine without power."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType

import psutil


class Nodes:
    """A cluster whose head trains nothing; a context manager that ends all it started, by their ids."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary = Path(mkdtemp(prefix="duet-"))  # Ray's sockets allow no long path
        self._port = free_port()
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Nodes":
        head = ["--head", "--port", str(self._port), "--include-dashboard", "false", "--num-cpus", "0"]
        self._start([*head, "--ray-client-server-port", str(free_port())])
        self._until_there(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self._started):
            self.kill(node)

    def add(self, n_cpus: int = 1) -> subprocess.Popen[bytes]:
        """Another node, once the cluster knows it."""
        node = self._start(["--address", f"127.0.0.1:{self._port}", "--num-cpus", str(n_cpus)])
        self._until_there(len([one for one in self._started if one.poll() is None]))
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """End a node and all that runs on it with SIGKILL: no goodbye."""
        if node.poll() is not None:
            return []
        own = psutil.Process(node.pid)
        doomed = [own, *own.children(recursive=True)]
        for process in doomed:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait()
        psutil.wait_procs(doomed, timeout=20)
        return doomed

    def runs_on(self, node: subprocess.Popen[bytes], pid: int) -> bool:
        """Whether a process is one of a node's."""
        return any(child.pid == pid for child in psutil.Process(node.pid).children(recursive=True))

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        number = len(self._started)
        log = (self._folder / f"node-{number}.log").open("wb")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        node = subprocess.Popen(
            [*command, "--temp-dir", str(self._temporary / str(number)), "--disable-usage-stats", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        self._started.append(node)
        return node

    def _until_there(self, n_nodes: int) -> None:
        """Wait until so many nodes are alive, as another process sees it."""
        code = f"import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()) >= {n_nodes})"
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=self.environment, check=False
            )
            if asked.stdout.strip().endswith("True"):
                return
            assert all(node.poll() is None for node in self._started[-1:]), "the node did not start"
            time.sleep(0.5)
        raise TimeoutError(f"there are no {n_nodes} nodes:\n{asked.stderr}")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
