"""The chain of `slurm_chain` as YAML for engines other than SLURM: the same steps, which ask for the same resources.

SkyPilot: a managed job, a document for each step, one after another (https://docs.skypilot.co, `sky jobs launch`).
Kueue: a JobSet (jobset.x-k8s.io/v1alpha2), whose jobs each wait for the one before (`dependsOn`).

Nothing of the user's reaches a shell unquoted: SkyPilot's scripts quote every word, and Kubernetes starts a program
without a shell.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from common.errors import INTERRUPTED, UserError
from common.recipe import Recipe
from common.recipe.launch import own_launch
from common.stage import Stage
from common.stage_jobs import Step, plain_steps
from slurm.site_file import Elsewhere, Site

TORCHRUN = ("-m", "torch.distributed.run")
PORT = 29500  # where the ranks of a step meet: on these engines a node's ports are its own
RESTARTS = 10  # of a step that failed for another reason than a user's mistake
LONGEST_NAME = 32  # of a JobSet: with step, job and pod it names a pod, in at most 63 characters


@dataclass(frozen=True)
class Chain:
    """What is rendered: `words` are those of the command that runs a step, without its name."""

    recipe: Recipe
    steps: Sequence[Step]
    words: tuple[str, ...]  # after `python`
    site: Site
    place: Elsewhere

    @property
    def name(self) -> str:
        """The recipe's, as a host's may be."""
        words = re.sub("[^a-z0-9]+", "-", self.recipe.name.lower()).strip("-")
        return words if words[:1].isalpha() else f"run-{words}".strip("-")


def render(engine: str, recipe: Recipe, stages: Sequence[Stage], words: Sequence[str], site: Site) -> str:
    """YAML of the steps of `stages`, finished or not: a step that is finished ends at once.

    Args:
        words: of the command line: `--config` and the overrides.

    Raises UserError for an engine that is not known, and for what it lacks in the recipe or the site file.
    """
    if engine not in ENGINES:
        raise UserError(f"--render: found {engine!r}; allowed: {', '.join(ENGINES)}")
    if site.elsewhere is None:
        raise UserError("site file: no section elsewhere, which --render needs; see slurm/site.example.yaml")
    for stage in stages:
        stage.check(recipe, "slurm")
    planned = [step for stage in stages for step in plain_steps(recipe, stage)]
    chain = Chain(recipe, planned, ("pipeline/run.py", *words, "--step"), site, site.elsewhere)
    return _head(engine, chain, stages) + yaml.dump_all(ENGINES[engine](chain), None, _Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _head(engine: str, chain: Chain, stages: Sequence[Stage]) -> str:
    """Comments: how it is submitted, and what of the recipe has no counterpart there."""
    command = {"skypilot": "sky jobs launch FILE", "kueue": "kubectl create -f FILE"}[engine]
    names = ("merge", *(stage.name for stage in stages))
    partitions = [
        f"launch.stages.{name}.partition" for name in names if own_launch(chain.recipe.launch, name).partition
    ]
    left_out = ", ".join(["launch.timeout_minutes", "launch.elastic", *partitions])
    return f"# {command}\n# Left out, since only SLURM has it: {left_out}.\n"


def _kind(chain: Chain, step: Step) -> str | None:
    return step.resources.gpu_type or chain.site.gpu_type


def _gpus(step: Step) -> int:
    return step.resources.gpus_per_process * step.resources.processes


def _memory_gb(chain: Chain, step: Step) -> float | None:
    """Of a node; None if neither recipe nor site file says it."""
    asked = step.resources
    if asked.memory_gb is not None or chain.site.memory_gb is None:
        return asked.memory_gb
    return chain.site.memory_gb * asked.share_of_node


def _skypilot(chain: Chain) -> list[dict[str, Any]]:
    return [{"name": chain.name, "execution": "serial"}, *(_task(chain, step) for step in chain.steps)]


def _task(chain: Chain, step: Step) -> dict[str, Any]:
    asked = step.resources
    resources: dict[str, Any] = {
        "cpus": f"{asked.processes * asked.cpus_per_process}+",
        "image_id": f"docker:{chain.place.image}",
        "job_recovery": {"max_restarts_on_errors": RESTARTS, "recover_on_exit_codes": [INTERRUPTED]},
    }
    memory = _memory_gb(chain, step)
    if memory is not None:
        resources["memory"] = f"{memory:g}+"
    if _gpus(step):
        if _kind(chain, step) is None:
            raise UserError(
                f"launch.stages.{step.name}.gpu_type: null, and SkyPilot asks for GPUs by their type, such as H100; "
                "set it, or gpu_type in the site file"
            )
        resources["accelerators"] = {_kind(chain, step): _gpus(step)}
    return {
        "name": step.name,
        "num_nodes": step.at_once if len(step.jobs) > 1 else asked.nodes,
        "resources": resources,
        "volumes": {chain.place.mount: chain.place.volume},
        "run": _script(chain, step),
    }


def _script(chain: Chain, step: Step) -> str:
    """Of bash, on each of the task's nodes. With parts, node n does the parts n, n + nodes, n + 2 nodes, ..."""
    parts, step_words = len(step.jobs), shlex.join((*chain.words, step.name))
    lines = ["set -euo pipefail", f"cd {shlex.quote(chain.place.clone)}"]
    if parts > 1:
        lines += [
            f"for ((part = SKYPILOT_NODE_RANK; part < {parts}; part += SKYPILOT_NUM_NODES)); do",
            f"  python {step_words}:$part",
            "done",
        ]
    elif _ranks(step) > 1:
        address = '"$(head --lines=1 <<< "$SKYPILOT_NODE_IPS")"'
        lines += [
            f"exec python {' '.join(TORCHRUN)} --nnodes={step.resources.nodes} --node-rank=$SKYPILOT_NODE_RANK \\",
            f"  --nproc-per-node={step.resources.processes} --master-addr={address} --master-port={PORT} \\",
            f"  {step_words}",
        ]
    else:
        lines.append(f"exec python {step_words}")
    return "\n".join(lines) + "\n"


def _ranks(step: Step) -> int:
    return step.resources.nodes * step.resources.processes


def _kueue(chain: Chain) -> list[dict[str, Any]]:
    if chain.place.queue is None:
        raise UserError("site file: elsewhere.queue: null; set it to a LocalQueue (kubectl get localqueues)")
    if len(chain.name) > LONGEST_NAME:
        raise UserError(f"name: {chain.recipe.name}; for Kubernetes at most {LONGEST_NAME} characters: shorten it")
    jobs = []
    for before, step in zip((None, *chain.steps), chain.steps, strict=False):
        wait = {"dependsOn": [{"name": before.name, "status": "Complete"}]} if before else {}
        jobs.append({"name": step.name, **wait, "template": {"spec": _job(chain, step)}})
    labels = {"kueue.x-k8s.io/queue-name": chain.place.queue}
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": chain.name, "labels": labels},
            "spec": {"replicatedJobs": jobs},
        }
    ]


def _job(chain: Chain, step: Step) -> dict[str, Any]:
    """An indexed job: a pod for each part, or for each node of the only one."""
    parts = len(step.jobs)
    rules: list[dict[str, Any]] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [INTERRUPTED]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},  # a user's mistake
    ]
    return {
        "completionMode": "Indexed",
        "completions": parts if parts > 1 else step.resources.nodes,
        "parallelism": step.at_once if parts > 1 else step.resources.nodes,
        "backoffLimit": RESTARTS,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": _pod(chain, step)},
    }


def _pod(chain: Chain, step: Step) -> dict[str, Any]:
    asked = step.resources
    needed = {"cpu": str(asked.processes * asked.cpus_per_process)}
    memory = _memory_gb(chain, step)
    if memory is not None:
        needed["memory"] = f"{round(1024 * memory)}Mi"
    if _gpus(step):
        needed["nvidia.com/gpu"] = str(_gpus(step))
    kind = (
        {"nodeSelector": {"nvidia.com/gpu.product": _kind(chain, step)}} if _gpus(step) and _kind(chain, step) else {}
    )
    container = {
        "name": "fpdm",
        "image": chain.place.image,
        "command": ["python", *_pod_words(chain, step)],
        "workingDir": chain.place.clone,
        "resources": {"requests": needed, "limits": dict(needed)},
        "volumeMounts": [
            {"name": "shared", "mountPath": chain.place.mount},
            {"name": "shm", "mountPath": "/dev/shm"},  # a container has 64 MB there, too few for NCCL
        ],
    }
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": chain.place.volume}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": asked.signal_seconds,
        **kind,
        "containers": [container],
        "volumes": volumes,
    }


def _pod_words(chain: Chain, step: Step) -> list[str]:
    """Kubernetes replaces `$(NAME)` in them; `$$` stands for the user's `$`."""
    words = [word.replace("$", "$$") for word in chain.words]
    index = "$(JOB_COMPLETION_INDEX)"
    if len(step.jobs) > 1:
        return [*words, f"{step.name}:{index}"]
    if _ranks(step) == 1:
        return [*words, step.name]
    where = (f"--master-addr={chain.name}-{step.name}-0-0.{chain.name}", f"--master-port={PORT}")
    nodes = (f"--nnodes={step.resources.nodes}", f"--node-rank={index}", f"--nproc-per-node={step.resources.processes}")
    return [*TORCHRUN, *nodes, *where, *words, step.name]


ENGINES: dict[str, Callable[[Chain], list[dict[str, Any]]]] = {"skypilot": _skypilot, "kueue": _kueue}
