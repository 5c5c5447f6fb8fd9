"""The fear: a manifest that reads well, and that Kubernetes refuses or reads another way."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from shardwise.launch.cluster_files import ClusterRun, ManifestKind, manifest

# What the published schemas say of the fields that stand in our manifests: kubeflow.org/v1 (training operator 1.9),
# jobset.x-k8s.io/v1alpha2 (as Kubeflow's trainer 2.3 has it), and Kubernetes 1.35 below them. A field with ! is
# required; [] is a list, {} a map from text. A field that stands in no line is unknown.
PUBLISHED = """
PyTorchJob           apiVersion:text kind:text metadata:ObjectMeta spec:PyTorchJobSpec
PyTorchJobSpec       runPolicy:RunPolicy! pytorchReplicaSpecs:{}ReplicaSpec!
RunPolicy            backoffLimit:number cleanPodPolicy:text
ReplicaSpec          replicas:number restartPolicy:text template:PodTemplateSpec
JobSet               apiVersion:text kind:text metadata:ObjectMeta spec:JobSetSpec
JobSetSpec           failurePolicy:FailurePolicy replicatedJobs:[]ReplicatedJob
FailurePolicy        maxRestarts:number
ReplicatedJob        name:text! replicas:number template:JobTemplateSpec!
JobTemplateSpec      spec:JobSpec
JobSpec              parallelism:number completions:number completionMode:text backoffLimit:number \
template:PodTemplateSpec!
ObjectMeta           name:text
PodTemplateSpec      spec:PodSpec
PodSpec              containers:[]Container! volumes:[]Volume restartPolicy:text
Container            name:text! image:text workingDir:text command:[]text env:[]EnvVar volumeMounts:[]VolumeMount \
resources:ResourceRequirements
EnvVar               name:text! value:text valueFrom:EnvVarSource
EnvVarSource         fieldRef:ObjectFieldSelector
ObjectFieldSelector  fieldPath:text!
VolumeMount          name:text! mountPath:text!
Volume               name:text! emptyDir:EmptyDirVolumeSource
EmptyDirVolumeSource medium:text
ResourceRequirements limits:{}text
"""
TYPES = {
    name: dict(field.split(":") for field in fields) for name, *fields in map(str.split, PUBLISHED.split("\n")[1:-1])
}
PLAIN = {"text": str, "number": int}


def faults(kind: str, data: Any, place: str) -> Iterator[str]:
    """What the published schema has against `data`."""
    if kind in PLAIN:
        if type(data) is not PLAIN[kind]:
            yield f"{place}: {data!r} is no {kind}"
        return
    if kind[:2] in ("[]", "{}"):
        container = list if kind[0] == "[" else dict
        if not isinstance(data, container):
            yield f"{place}: {data!r} is no {container.__name__}"
            return
        for i, item in data.items() if isinstance(data, dict) else enumerate(data):
            yield from faults(kind[2:], item, f"{place}[{i}]")
        return
    known = TYPES[kind]
    for name, of_field in known.items():
        if of_field.endswith("!") and name not in data:
            yield f"{place}: {name} is missing"
    for name, value in data.items():
        if name not in known:
            yield f"{place}: {name} is unknown"
        else:
            yield from faults(known[name].rstrip("!"), value, f"{place}.{name}")


@pytest.mark.parametrize("kind", ManifestKind)
@pytest.mark.parametrize("num_machines", [1, 3])
@pytest.mark.parametrize("on_gpus", [True, False])
def test_a_manifest_has_the_required_fields_and_no_unknown_ones(
    kind: ManifestKind, num_machines: int, on_gpus: bool
) -> None:
    run = ClusterRun("train", num_machines, 4, on_gpus, "/work", {"A": "1"})
    data = yaml.safe_load(manifest(kind, run, "image:1", ["shardwise", "launch"], ["train.py", "--epochs", "3"]))
    assert list(faults(kind, data, kind)) == []


def test_the_check_finds_what_is_wrong() -> None:
    run = ClusterRun("train", 3, 4, True, "/work", {})
    data = yaml.safe_load(manifest(ManifestKind.PYTORCH_JOB, run, "image:1", ["shardwise"], ["train.py"]))
    container = data["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container["commands"] = container.pop("command")
    del container["name"]
    container["image"] = 1
    place = "PyTorchJob.spec.pytorchReplicaSpecs[Worker].template.spec.containers[0]"
    assert sorted(faults("PyTorchJob", data, "PyTorchJob")) == [
        f"{place}.image: 1 is no text",
        f"{place}: commands is unknown",
        f"{place}: name is missing",
    ]
