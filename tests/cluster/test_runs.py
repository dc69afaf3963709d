"""That a study fits the cluster it is started on, and can pause when that is stopped."""

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from duet_ray.config import StudyConfig, load_config
from tests.cluster.commands import blocks
from tests.cluster.manifests import CLUSTER, RAY_PODS, of_kind, read_yaml
from tests.toy_study import toy_data

(JOB,) = of_kind("RayJob")
ENVIRONMENT = of_kind("ConfigMap")[0]["data"]
LAUNCHER: dict[str, Any] = read_yaml((CLUSTER / "ray-up/aws.yaml").read_text(encoding="utf-8"))[0]
SLURM = (CLUSTER / "slurm/duet.sbatch").read_text(encoding="utf-8")
PAUSE_SECONDS = 60
"""A pause takes about ten seconds on a busy machine; groups in foreign code are waited for half a minute."""


def config_of(command: str, tmp_path: Path) -> StudyConfig:
    """A toy study under what a command sets by `--set`."""
    words = shlex.split(command.replace("\\\n", " "))
    sets = [after for word, after in pairwise(words) if word == "--set"]
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(toy_data()), encoding="utf-8")
    return load_config(file, sets)


def commands(section: str) -> list[str]:
    texts = [block.text for block in blocks(section)]
    return [command for text in texts for command in re.split(r"(?<!\\)\n", text) if "--set" in command]


def fits(config: StudyConfig, nodes: Sequence[dict[str, float]]) -> bool:
    """Whether the groups' workers find room, as many on a node as go on it."""
    fleet = config.fleet
    room = sum(min(node["GPU"] // fleet.gpus_per_worker, node["CPU"] // fleet.cpus_per_worker) for node in nodes)
    return fleet.groups * fleet.workers_per_group <= room


def test_the_fleet_of_the_rayjob_fits_its_workers(tmp_path: Path) -> None:
    config = config_of(JOB["spec"]["entrypoint"], tmp_path)
    nodes = []
    for group in JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"], "a pod that gets less than it says trains more slowly"
        node = {"GPU": int(limits["nvidia.com/gpu"]), "CPU": float(limits["cpu"])}
        nodes += [node] * group["replicas"]
    assert fits(config, nodes)
    assert not fits(config, nodes[1:]), "a node would stand idle"
    assert config.fleet.gpus_per_worker == 1
    assert fits(
        config.model_copy(update={"fleet": config.fleet.model_copy(update={"groups": config.fleet.min_groups})}),
        nodes[1:],
    )
    assert config.storage == "/shared/studies"
    assert (config.store or "").startswith("postgresql+psycopg://duet@duet-postgres/")


def test_the_fleet_of_the_launcher_fits_its_nodes(tmp_path: Path) -> None:
    (command,) = commands("`ray up`")
    kind = LAUNCHER["available_node_types"]["gpu"]
    nodes = [kind["resources"]] * kind["min_workers"]
    assert fits(config_of(command, tmp_path), nodes)
    assert not fits(config_of(command, tmp_path), nodes[1:])
    assert LAUNCHER["max_workers"] == kind["max_workers"] == kind["min_workers"]


def test_the_fleet_of_the_slurm_job_fits_its_nodes(tmp_path: Path) -> None:
    (command,) = commands("Slurm")
    lines = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM, re.MULTILINE))
    node = {"GPU": float(lines["gpus-per-node"]), "CPU": float(lines["cpus-per-task"])}
    nodes = [node] * int(lines["nodes"])
    assert fits(config_of(command, tmp_path), nodes)
    assert not fits(config_of(command, tmp_path), nodes[1:])


@pytest.mark.parametrize("command", [c for b in {block.section for block in blocks()} for c in commands(b)])
def test_every_setting_of_a_command_is_one_of_the_study_file(command: str, tmp_path: Path) -> None:
    config_of(command, tmp_path)  # an unknown key or a wrong value raises


def test_the_head_trains_nothing() -> None:
    for spec in (JOB["spec"]["rayClusterSpec"], of_kind("RayCluster")[0]["spec"]):
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    head = LAUNCHER["available_node_types"][LAUNCHER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}


def test_the_job_is_tried_again_and_leaves_nothing_running() -> None:
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 1
    assert spec["submitterConfig"]["backoffLimit"] >= 1


def test_a_stop_leaves_time_to_pause() -> None:
    wait = int(ENVIRONMENT["RAY_JOB_STOP_WAIT_TIME_S"])
    assert wait >= PAUSE_SECONDS
    for pod in RAY_PODS:
        assert {"configMapRef": {"name": "duet-environment"}} in pod.spec["containers"][0]["envFrom"]
        if pod.labels["part"] == "head":
            hook = pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
            waits = int(re.search(r"seq (\d+)", hook)[1])  # type: ignore[index]
            assert PAUSE_SECONDS <= waits <= wait < pod.spec["terminationGracePeriodSeconds"]
    assert f"--env=RAY_JOB_STOP_WAIT_TIME_S={wait}" in LAUNCHER["docker"]["run_options"]
    assert f"RAY_JOB_STOP_WAIT_TIME_S={wait} " in blocks("Several nodes on one machine")[0].text
    seconds = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", SLURM, re.MULTILINE)
    assert seconds is not None
    assert int(seconds[1]) >= PAUSE_SECONDS


def test_what_all_nodes_share_is_mounted_on_all_of_them() -> None:
    for pod in RAY_PODS:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"] == {"claimName": "duet-shared"}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "ReadWriteMany" in of_kind("PersistentVolumeClaim")[0]["spec"]["accessModes"]
    assert ENVIRONMENT["HF_HOME"].startswith("/shared/")
    assert "--volume=/mnt/shared:/shared" in LAUNCHER["docker"]["run_options"]
    assert any(
        "mount -t nfs4" in command and " /mnt/shared" in command for command in LAUNCHER["initialization_commands"]
    )
