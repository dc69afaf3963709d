"""One version of Ray, and images that hold it: as in constraints.txt everywhere."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.cluster.manifests import CLUSTER, FILES, OBJECTS, PODS, ROOT, of_kind, read_yaml

RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_is_made_from_this_ray_with_python_3_11_and_cuda() -> None:
    assert re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE) == [f"rayproject/ray:{RAY}-py311-gpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CLUSTER)))
def test_every_version_of_ray_that_is_named_is_this_one(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    named = re.findall(r"(?:duet-ray:ray-|rayproject/ray:|rayVersion: \"|\bRay\s)(\d+\.\d+\.\d+)", text)
    assert set(named) <= {RAY}


def test_every_pod_of_ray_has_our_image() -> None:
    images = {c["image"] for pod in PODS if pod.labels["part"] != "postgres" for c in pod.spec["containers"]}
    (launcher,) = read_yaml((CLUSTER / "ray-up/aws.yaml").read_text(encoding="utf-8"))
    assert images == {launcher["docker"]["image"]} == {f"registry.example.com/duet-ray:ray-{RAY}"}


def test_kuberay_is_told_the_version() -> None:
    (cluster,), (job,) = of_kind("RayCluster"), of_kind("RayJob")
    assert cluster["spec"]["rayVersion"] == job["spec"]["rayClusterSpec"]["rayVersion"] == RAY


def test_no_image_is_without_a_tag_or_with_one_that_moves() -> None:
    images = [c["image"] for pod in PODS for c in pod.spec["containers"]]
    assert images
    for image in images:
        assert re.search(r":(?!latest)[\w.-]*\d[\w.-]*$", image), image


def test_the_image_installs_extras_that_exist_with_torch_first() -> None:
    extras = re.search(r'"\.\[([\w,-]+)\]"', DOCKERFILE)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras[1].split(",")) == {"full", "postgres"} <= set(project["optional-dependencies"])
    assert DOCKERFILE.index("^torch==") < extras.start()


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for word in shlex.split(line)[:-1]
        if not word.startswith("--")
    ]
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert copied
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored


def test_the_job_has_the_cluster_of_the_other_file() -> None:
    (cluster,), (job,) = of_kind("RayCluster"), of_kind("RayJob")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_what_pods_refer_to_is_made_by_a_manifest_or_by_the_readme() -> None:
    names = {document["metadata"]["name"] for document in OBJECTS.values()}
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for pod in PODS:
        for volume in pod.spec.get("volumes", []):
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "duet-shared") in names
        for container in pod.spec["containers"]:
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names
            for variable in container.get("env", []):
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert f"create secret generic {secret['name']} " in readme
                    assert f"{secret['key']}=%s" in readme
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = {
                claim["metadata"]["name"] for s in of_kind("StatefulSet") for claim in s["spec"]["volumeClaimTemplates"]
            }
            assert mounts <= {volume["name"] for volume in pod.spec.get("volumes", [])} | claims
