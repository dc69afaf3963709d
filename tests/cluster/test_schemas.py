"""Every file of `cluster/` against the published schema of its kind, or a parser where there is no schema."""

import copy
import json
import subprocess
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.cluster.manifests import CLUSTER, OBJECTS, TEMPLATES, read_yaml

KUBERAY = json.loads((Path(__file__).parent / "kuberay_v1.json").read_text(encoding="utf-8"))
CORE = {name: document for name, document in OBJECTS.items() if document["apiVersion"] != "ray.io/v1"}
KUBERAYS = {name: document for name, document in OBJECTS.items() if name not in CORE}
KUBERNETES = ("1.29", "1.37")
"""The oldest version that matters, and the newest one whose schemas the validator brings."""
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", CORE)
def test_the_objects_are_kubernetes_own(name: str, version: str) -> None:
    kubernetes_validate.validate(CORE[name], version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("where", TEMPLATES)
def test_the_pod_templates_are_kubernetes_own(where: str, version: str) -> None:
    template = {key: value for key, value in TEMPLATES[where].items() if key in ("metadata", "spec")}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template},
        version,
        strict=True,
    )


@pytest.mark.parametrize("name", KUBERAYS)
def test_the_objects_are_kuberays(name: str) -> None:
    jsonschema.Draft202012Validator(KUBERAY).validate(KUBERAYS[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimits"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "submissionMode"), "HttpMode"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "Token"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupname"), "gpu"),
        (("spec", "rayClusterSpec", "tlsOptions"), {}),
    ],
)
def test_the_schema_of_kuberay_refuses(path: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(next(d for d in KUBERAYS.values() if d["kind"] == "RayJob"))
    here = changed
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(KUBERAY).validate(changed)


def test_the_launchers_file_is_rays() -> None:
    schema = json.loads(files("ray").joinpath("autoscaler/ray-schema.json").read_text(encoding="utf-8"))
    (document,) = read_yaml((CLUSTER / "ray-up/aws.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(document)


def test_the_dockerfile_parses() -> None:
    # Packages of the base image's distribution and pip's arguments are pinned by the tag and by constraints.txt.
    run = [str(SCRIPTS / "hadolint"), "--ignore=DL3008", "--ignore=DL3013", str(CLUSTER / "Dockerfile")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_slurm_script_parses() -> None:
    for run in (["bash", "-n"], [str(SCRIPTS / "shellcheck"), "--severity=style"]):
        done = subprocess.run([*run, str(CLUSTER / "slurm/duet.sbatch")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
