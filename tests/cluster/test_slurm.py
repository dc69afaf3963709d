"""The Slurm script run for real, with stand-ins for Slurm's commands, for Ray and for the study's driver."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.manifests import CLUSTER

SCRIPT = CLUSTER / "slurm/duet.sbatch"
JOB = 4711
STAND_INS = {
    # As the real one, it hands a SIGTERM on to what it runs.
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#*=}; shift; done
        trap 'stop=1; [[ -z $child ]] || kill -TERM $child' TERM
        "$@" & child=$!
        [[ -z $stop ]] || kill -TERM $child
        wait $child; wait $child""",
    "scontrol": """
        case "$1 $2" in
            "show hostnames") printf 'first\\nsecond\\n' ;;
            "show job") echo "   JobState=$STATE Reason=None" ;;
            requeue*) cat $LOG/ended $LOG/requeued 2>/dev/null > $LOG/at-requeue; echo $2 > $LOG/requeued ;;
        esac""",
    "mktemp": """
        folder=$(PATH=${PATH#*:} mktemp "$@"); echo $folder | tee -a $LOG/folders""",
    "ray": """
        case $1 in
            start) [[ $RAY == broken ]] && exit 1
                   trap 'echo $NODE >> $LOG/ended; exit 0' TERM
                   stat --format=%a $RAY_AUTH_TOKEN_PATH > $LOG/mode; cat $RAY_AUTH_TOKEN_PATH > $LOG/token
                   [[ $* =~ --temp-dir\\ ([^ ]+) ]] && touch ${BASH_REMATCH[1]}/session
                   echo "$NODE $RAY_AUTH_MODE $*" >> $LOG/started
                   while true; do sleep 0.02; done ;;
            status) [[ $RAY == works ]] || exit 1
                    until [[ -s $LOG/started ]]; do sleep 0.02; done ;;
        esac""",
    "python": """
        [[ $1 == -c ]] && exec $PYTHON "$@"
        [[ $DRIVER == starts ]] || trap 'sleep 0.2; exit 130' TERM
        echo "$RAY_ADDRESS $*" > $LOG/driver
        case $DRIVER in
            ends) exit 0 ;;
            fails) exit 1 ;;
            *) while true; do sleep 0.02; done ;;
        esac""",
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A job of two nodes, both of them this machine."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def start(self, *arguments: str, driver: str = "lasts", job: int = JOB, **environment: str) -> subprocess.Popen:
        self.log.mkdir()
        commands = self.folder / "commands"
        commands.mkdir()
        for name, body in STAND_INS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
            (commands / name).chmod(0o755)
        settings = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "PYTHON": sys.executable,
            "DRIVER": driver,
            "RAY": "works",
            "STATE": "RUNNING",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "first,second",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4",
            "DUET_SHARED": str(self.shared),
            "DUET_HEAD_IP": "192.0.2.7",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={k: v for k, v in {**settings, **environment}.items() if v},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, name: str) -> str:
        """The text of a file that a stand-in writes."""
        deadline = time.monotonic() + 30
        while not (self.log / name).exists() or not (text := (self.log / name).read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, f"{name} was not written"
            time.sleep(0.02)
        return text

    def lines(self, name: str) -> list[str]:
        file = self.log / name
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def assert_nothing_is_left(self, job: int = JOB) -> None:
        assert {line.split()[0] for line in self.lines("started")} <= set(self.lines("ended"))
        assert not [
            p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in " ".join(p.info["cmdline"] or [])
        ]
        assert not (self.shared / f"ray-{job}").exists()
        assert not [folder for folder in self.lines("folders") if Path(folder).exists()]
        used = [line.split("--temp-dir ")[1].split()[0] for line in self.lines("started")]
        assert len(set(used)) == len(used), "two nodes on one machine would delete each other's files"
        assert set(used) <= set(self.lines("folders"))


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(folder=tmp_path)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_a_study_that_ends(allocation: Allocation) -> None:
    code, output = ended(allocation.start("study.yaml", "--set", "fleet.groups=8", driver="ends"))
    assert code == 0, output
    assert allocation.lines("driver") == [
        f"192.0.2.7:{20000 + JOB % 3000 * 4} jobs/run_study.py --config study.yaml "
        f"--set storage={allocation.shared}/studies --set fleet.groups=8"
    ]
    assert allocation.lines("requeued") == []
    allocation.assert_nothing_is_left()


def test_every_node_gets_a_ray_with_the_token_of_the_job(allocation: Allocation) -> None:
    process = allocation.start("study.yaml")
    allocation.wait_for("driver")
    while len(allocation.lines("started")) < 2:
        time.sleep(0.02)
    head, worker = sorted(allocation.lines("started"))
    assert head.startswith("first token start --block ")
    assert " --head " in head
    assert " --dashboard-host=127.0.0.1 " in head
    assert worker.startswith("second token start --block ")
    assert f" --address=192.0.2.7:{20000 + JOB % 3000 * 4} " in worker
    for node in (head, worker):
        assert " --num-cpus=8 --num-gpus=4 " in node
    assert allocation.lines("mode") == ["600"]
    assert re.fullmatch(r"[0-9a-f]{64}", allocation.lines("token")[0])
    assert (allocation.shared / f"ray-{JOB}").stat().st_mode & 0o777 == 0o700
    process.send_signal(signal.SIGUSR1)
    ended(process)


def test_a_study_that_fails_is_not_queued_again(allocation: Allocation) -> None:
    code, _ = ended(allocation.start("study.yaml", driver="fails"))
    assert code == 1
    assert allocation.lines("requeued") == []
    allocation.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("sent", "state", "is_queued_again"),
    [
        (signal.SIGTERM, "RUNNING", True),  # the time is nearly up, or somebody else needs the nodes
        (signal.SIGTERM, "CANCELLED", False),  # scancel
        (signal.SIGUSR1, "RUNNING", False),  # asked to pause
    ],
)
def test_a_signal_pauses_the_study(
    allocation: Allocation, sent: signal.Signals, state: str, is_queued_again: bool
) -> None:
    process = allocation.start("study.yaml", STATE=state)
    allocation.wait_for("driver")
    process.send_signal(sent)
    code, output = ended(process)
    assert code == 130, output
    assert allocation.lines("requeued") == [str(JOB)] * is_queued_again
    if is_queued_again:
        assert set(allocation.lines("at-requeue")) >= {"first"}, "queued again before its Ray was gone"
    allocation.assert_nothing_is_left()


def test_a_signal_before_the_driver_can_pause(allocation: Allocation) -> None:
    process = allocation.start("study.yaml", driver="starts")
    allocation.wait_for("driver")
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 143, output
    assert allocation.lines("requeued") == [str(JOB)]
    allocation.assert_nothing_is_left()


def test_a_signal_before_ray_is_there(allocation: Allocation) -> None:
    process = allocation.start("study.yaml", RAY="slow")
    allocation.wait_for("started")
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 130, output
    assert allocation.lines("driver") == []
    assert allocation.lines("requeued") == [str(JOB)]
    allocation.assert_nothing_is_left()


def test_a_second_signal_changes_nothing(allocation: Allocation) -> None:
    process = allocation.start("study.yaml")
    allocation.wait_for("driver")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 130, output
    assert allocation.lines("requeued") == [str(JOB)]
    allocation.assert_nothing_is_left()


def test_a_head_that_does_not_start_is_said(allocation: Allocation) -> None:
    code, output = ended(allocation.start("study.yaml", RAY="broken"))
    assert code == 1
    assert "the head node of Ray did not start" in output
    assert allocation.lines("driver") == []
    allocation.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("arguments", "shared", "said"), [([], "/shared", "give a study file"), (["study.yaml"], "", "DUET_SHARED")]
)
def test_what_is_missing_is_said(allocation: Allocation, arguments: list[str], shared: str, said: str) -> None:
    code, output = ended(allocation.start(*arguments, DUET_SHARED=shared))
    assert code != 0
    assert said in output
    assert allocation.lines("started") == []


def test_two_jobs_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    ports: list[set[int]] = []
    for job in (JOB, JOB + 1):
        folder = tmp_path / str(job)
        folder.mkdir()
        allocation = Allocation(folder=folder)
        ended(allocation.start("study.yaml", driver="ends", job=job))
        head = next(line for line in allocation.lines("started") if line.startswith("first"))
        ports.append({int(port) for port in re.findall(r"port=(\d+)", head)})
        allocation.assert_nothing_is_left(job)
    assert [len(some) for some in ports] == [4, 4]
    assert ports[0].isdisjoint(ports[1])
    assert all(20000 <= port < 32768 for some in ports for port in some), "others are Ray's workers' or the system's"
