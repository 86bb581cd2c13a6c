"""The fields that rendered chains use, with the types and limits that their engines ask for; any other is refused.

SkyPilot: `get_task_schema` and `get_resources_schema` of sky/utils/schemas.py, and the pipeline's header in
sky/utils/dag_utils.py (0.14.1). Kubernetes: V1JobSpec and V1PodSpec of its API, batch/v1. JobSet: v1alpha2,
api/jobset/v1alpha2/jobset_types.go and jobset_webhook.go of kubernetes-sigs/jobset.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)
Label = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]  # DNS-1035
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(Mi)?$")]
ExitCode = Annotated[int, Field(ge=1, le=255)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


@dataclass(config=STRICT)
class SkyHeader:
    name: str
    execution: Literal["serial"]


@dataclass(config=STRICT)
class SkyRecovery:
    max_restarts_on_errors: CountOrZero
    recover_on_exit_codes: list[ExitCode]


@dataclass(config=STRICT)
class SkyResources:
    cpus: Annotated[str, Field(pattern=r"^[0-9]+\+?$")]
    image_id: Annotated[str, Field(pattern="^docker:.")]
    job_recovery: SkyRecovery
    memory: Annotated[str, Field(pattern=r"^[0-9.]+\+?$")] | None = None
    accelerators: Annotated[dict[str, Count], Field(min_length=1, max_length=1)] | None = None


@dataclass(config=STRICT)
class SkyTask:
    name: str
    num_nodes: Count
    resources: SkyResources
    volumes: dict[Annotated[str, Field(pattern="^/")], str]
    run: str


@dataclass(config=STRICT)
class Resources:
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


@dataclass(config=STRICT)
class VolumeMount:
    name: Label
    mountPath: str


@dataclass(config=STRICT)
class Container:
    name: Label
    image: str
    command: list[str]
    workingDir: str
    resources: Resources
    volumeMounts: list[VolumeMount]


@dataclass(config=STRICT)
class Claim:
    claimName: str


@dataclass(config=STRICT)
class EmptyDir:
    medium: Literal["Memory"]


@dataclass(config=STRICT)
class Volume:
    name: Label
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


@dataclass(config=STRICT)
class Pod:
    restartPolicy: Literal["Never"]  # which a podFailurePolicy asks for
    terminationGracePeriodSeconds: Count
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    nodeSelector: dict[str, str] | None = None


@dataclass(config=STRICT)
class PodTemplate:
    spec: Pod


@dataclass(config=STRICT)
class ExitCodes:
    operator: Literal["In", "NotIn"]
    values: list[ExitCode]


@dataclass(config=STRICT)
class PodCondition:
    type: Literal["DisruptionTarget"]


@dataclass(config=STRICT)
class Rule:
    action: Literal["Ignore", "FailJob", "FailIndex", "Count"]
    onExitCodes: ExitCodes | None = None
    onPodConditions: list[PodCondition] | None = None


@dataclass(config=STRICT)
class FailurePolicy:
    rules: Annotated[list[Rule], Field(max_length=20)]


@dataclass(config=STRICT)
class Job:
    completionMode: Literal["Indexed"]
    completions: Count
    parallelism: Count
    backoffLimit: CountOrZero
    podFailurePolicy: FailurePolicy
    template: PodTemplate


@dataclass(config=STRICT)
class JobTemplate:
    spec: Job


@dataclass(config=STRICT)
class Dependency:
    name: Label
    status: Literal["Ready", "Complete"]


@dataclass(config=STRICT)
class ReplicatedJob:
    name: Label
    template: JobTemplate
    dependsOn: Annotated[list[Dependency], Field(max_length=1)] | None = None


@dataclass(config=STRICT)
class JobSetSpec:
    replicatedJobs: list[ReplicatedJob]


@dataclass(config=STRICT)
class Metadata:
    name: Label
    labels: dict[Literal["kueue.x-k8s.io/queue-name"], str]


@dataclass(config=STRICT)
class JobSet:
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec
