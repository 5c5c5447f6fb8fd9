"""Files by which a cluster's own scheduler starts a run: a script for sbatch, a manifest for Kubernetes.

Pure functions from a command line to text. A scheduler starts `shardwise launch` itself, so a run that it starts is
like one that a user starts by hand.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

PORT = 29500
_LONGEST_NAME = 40  # a label of DNS has 63 characters, and Kubernetes appends some
_SHARED_MEMORY = "/dev/shm"


class ManifestKind(StrEnum):
    """The resources that a manifest may be of."""

    PYTORCH_JOB = "PyTorchJob"  # of Kubeflow's training operator
    JOB_SET = "JobSet"  # of Kubernetes' own jobset


@dataclass(frozen=True)
class ClusterRun:
    """What a scheduler has to know of a run."""

    name: str  # of the program
    num_machines: int
    processes_per_machine: int
    on_gpus: bool
    directory: str  # to work in
    variables: Mapping[str, str]

    @property
    def label(self) -> str:
        """The name as DNS takes it: lower-case letters, digits and hyphens."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
        return plain if plain[:1].isalpha() else f"run-{plain}".strip("-")


def sbatch_script(run: ClusterRun, command: Sequence[str]) -> str:
    """A script for Slurm's sbatch; `command` is the whole `shardwise launch` with the launcher slurm.

    Options as in slurm.schedmd.com/sbatch.html.
    """
    options = [
        f"--job-name={run.label}",
        f"--nodes={run.num_machines}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={run.processes_per_machine}"] if run.on_gpus else []),
        "--exclusive",
        "--mem=0",
        "--output=%x-%j.out",
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "# The whole of each machine, with all its memory. To share machines, name what the run needs instead:",
        "# --cpus-per-task, --mem. Add what your cluster asks for: --partition, --account, --time.",
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(run.directory)}",
        f"exec {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def manifest(kind: ManifestKind, run: ClusterRun, image: str, command: Sequence[str], tail: Sequence[str]) -> str:
    """A manifest for `kubectl apply`.

    A pod is a machine, and runs `command`, the options of the launcher that say where the machines meet, and `tail`:
    the script and its arguments.
    """
    build = _pytorch_job if kind is ManifestKind.PYTORCH_JOB else _job_set
    return str(yaml.safe_dump(build(run, image, command, tail), sort_keys=False, allow_unicode=True, width=10_000))


def _pytorch_job(run: ClusterRun, image: str, command: Sequence[str], tail: Sequence[str]) -> dict[str, Any]:
    """Of kubeflow.org/v1; the operator sets RANK (of the pod), MASTER_ADDR and MASTER_PORT in each container."""
    meeting = _meeting(run, "$(RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)")
    template = {"spec": _pod(run, image, [*_literal(command), *meeting, *_literal(tail)], {})}

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "Never", "template": template}

    specs = {"Master": replicas(1)}
    if run.num_machines > 1:
        specs["Worker"] = replicas(run.num_machines - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": run.label},
        # What still runs when the job has failed ends with it.
        "spec": {
            "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": _unshared(specs),
        },
    }


def _job_set(run: ClusterRun, image: str, command: Sequence[str], tail: Sequence[str]) -> dict[str, Any]:
    """Of jobset.x-k8s.io/v1alpha2: one indexed Job; its pods find each other by the names that jobset gives them."""
    meeting = _meeting(run, "$(MACHINE_RANK)", f"{run.label}-machines-0-0.{run.label}", str(PORT))
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    pod = _pod(run, image, [*_literal(command), *meeting, *_literal(tail)], {"MACHINE_RANK": index})
    job = {
        "parallelism": run.num_machines,
        "completions": run.num_machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": {"restartPolicy": "Never", **pod}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": run.label},
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "machines", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _meeting(run: ClusterRun, rank: str, address: str, port: str) -> list[str]:
    options = ["--deepspeed_multinode_launcher", "standard", "--num_machines", str(run.num_machines)]
    if run.num_machines == 1:
        return options
    return [*options, "--machine_rank", rank, "--main_process_ip", address, "--main_process_port", port]


def _pod(run: ClusterRun, image: str, command: list[str], own: Mapping[str, Any]) -> dict[str, Any]:
    variables = [{"name": name, "value": "".join(_literal([value]))} for name, value in run.variables.items()]
    container: dict[str, Any] = {
        "name": "pytorch",  # the name that the training operator looks for
        "image": image,
        "workingDir": run.directory,
        "command": command,
        "env": [*({"name": name, "valueFrom": source} for name, source in own.items()), *variables],
        "volumeMounts": [{"name": "shared-memory", "mountPath": _SHARED_MEMORY}],
    }
    if run.on_gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(run.processes_per_machine)}}
    # Ranks of one pod pass data through it, and the default is 64 MiB.
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    return {"containers": [container], "volumes": [memory]}


def _literal(words: Sequence[str]) -> list[str]:
    """Words as Kubernetes hands them on untouched: it expands $(NAME) in a command, and reads $$ as $."""
    return [word.replace("$", "$$") for word in words]


def _unshared(data: Any) -> Any:
    """A copy without an object in two places, which YAML would write as an anchor and a reference."""
    if isinstance(data, dict):
        return {key: _unshared(value) for key, value in data.items()}
    return [_unshared(value) for value in data] if isinstance(data, list) else data
