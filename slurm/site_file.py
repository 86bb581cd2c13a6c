"""The site file: this cluster's options for every job (partition, account, set-up lines), separate from recipes."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from slurm.gpus import GENERIC, GPUS
from slurm.paths import expanded
from slurm.plain_yaml import SWITCHES, read_yaml, settle

DEFAULT = Path(__file__).parent / "site.yaml"
VARIABLE = "FPDM_SITE"
SCRATCH_VARIABLE = "FPDM_SCRATCH"  # how `scratch` reaches a job
ONE_LINE = r"^[^\n]*$"
VARIABLES = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")

Word = Annotated[str, Field(pattern=r"^[^\s]+$")]
Line = Annotated[str, Field(pattern=ONE_LINE)]
Folder = Annotated[str, Field(pattern=r"^/[^\n$]*$")]

# Options that the recipe's `launch` section or this project sets, and options that keep sbatch from submitting.
OURS = ("array", "chdir", "cpus-per-task", "dependency", "error", "help", "job-name", "kill-on-invalid-dep",
        "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "quiet", "requeue",
        "signal", "test-only", "time", "usage", "version", "wait", "wrap")  # fmt: skip
SRUN_OURS = ("error", "kill-on-bad-exit", "nodes", "ntasks", "ntasks-per-node", "output", "unbuffered")
# Options that `false` leaves out, of those that this project or submitit writes. "wckey" is submitit's.
REMOVABLE = ("cpus-per-task", "requeue", "wckey")
FIELDS = ("account", "constraint", "exclusive", "mem", "partition", "qos")  # of Site, by sbatch's names


def _in_full(option: str) -> str:
    """Refuses abbreviations, which sbatch would accept: a duplicate of another option would go unnoticed."""
    if option in OURS and option not in REMOVABLE:
        raise ValueError(f"{option} is set by the recipe's launch section or by this project; remove it")
    known = (*OURS, *GENERIC, *GPUS, *FIELDS)
    whole = next((name for name in known if name.startswith(option)), None)
    if whole is not None and option not in known:
        raise ValueError(f"{option} abbreviates {whole}; write options of sbatch in full")
    return option


def _only_left_out(options: dict[str, Any]) -> dict[str, Any]:
    for option in REMOVABLE:
        if option in OURS and options.get(option, False) is not False:
            raise ValueError(
                f"{option} is set by the recipe's launch section or by this project; remove it (false leaves it out)"
            )
    return options


def _srun_in_full(option: str) -> str:
    if option in SRUN_OURS:
        raise ValueError(f"{option} is set by this project; remove it")
    return option


def _no_option(line: str) -> str:
    if line.lstrip().startswith("#SBATCH"):
        raise ValueError("a line that sbatch would read as options; write them under sbatch")
    return line


def _no_switch(value: str) -> str:
    if value.lower() in SWITCHES:
        raise ValueError("true gives the option alone, and false leaves it out; write one of them")
    return value


def _home(path: str) -> str:
    """The job's own home folder, for `_with_variables`."""
    head, slash, rest = path.partition("/")
    if head.startswith("~") and head != "~":
        raise ValueError(f"{head} is not expanded in a job; write the folder in full")
    return f"$HOME{slash}{rest}" if head == "~" else path


Option = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z-]*$"), AfterValidator(_in_full)]
SrunOption = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z-]*$"), AfterValidator(_srun_in_full)]
SetupLine = Annotated[Line, AfterValidator(_no_option)]
Value = Annotated[Line, AfterValidator(_no_switch)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Elsewhere:
    """Where `pipeline/run.py --render` runs: engines that start containers."""

    image: Word  # with Python and the requirements
    volume: Word  # a volume of SkyPilot's or a PersistentVolumeClaim, which all nodes write to at the same time
    mount: Folder  # where containers have the volume
    clone: Folder  # the clone, on the volume: paths of recipes begin there
    queue: Word | None = None  # Kueue's LocalQueue


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Site:
    """All fields are optional; SLURM's defaults apply. `site.example.yaml` is an example."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    # Per node; jobs with fewer processes request their share.
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    exclusive: StrictBool = False
    setup: tuple[SetupLine, ...] = ()  # shell lines before a job's command: modules, variables
    python: Line | None = None  # shell words that start Python, such as a container's; this one's otherwise
    # A folder on each node's own disk, with a job's `~` and $VARIABLES; TMPDIR of every job.
    scratch: Annotated[Line, AfterValidator(_home)] | None = None
    # How a job asks for the GPUs that the recipe says, and their type: `--gres=gpu:a100:2`, `--gpus-per-node=2`.
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: Word | None = None
    # Any other option of sbatch; `false` leaves one out. One that requests GPUs, such as gpus-per-task, takes the place
    # of the recipe's number of GPUs in every job that may use them.
    sbatch: Annotated[dict[Option, Value | StrictBool | int], AfterValidator(_only_left_out)] = Field(
        default_factory=dict
    )
    # Options of srun, which starts a job's processes: those of a container (pyxis).
    srun: dict[SrunOption, Value | StrictBool | int] = Field(default_factory=dict)
    elsewhere: Elsewhere | None = None


def load_site(path: str | Path | None = None) -> Site:
    """Reads `path`, else the file in FPDM_SITE, else slurm/site.yaml; defaults if that does not exist.

    Raises ValueError naming the file and the field.
    """
    named = path or os.environ.get(VARIABLE)
    try:
        file = Path(expanded(str(named))) if named else DEFAULT
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    if not file.exists():
        if named:
            raise ValueError(f"{file}: no such file; {VARIABLE} names it (slurm/site.example.yaml is one)")
        return Site()
    try:
        settings = settle(Site, read_yaml(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; {VARIABLE} names it") from None
    except ValueError as error:
        raise ValueError(f"{file}: not readable as YAML: {error}") from None
    try:
        return TypeAdapter(Site).validate_python(settings or {})
    except ValidationError as error:
        raise ValueError(f"{file}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    name = ".".join(map(str, fault["loc"][:1])) or "site"
    if fault["type"] == "unexpected_keyword_argument":
        return f"{name}: unknown key; allowed: {', '.join(one.name for one in fields(Site))}"
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}; found {short(fault['input'])}"


def submission_parameters(site: Site) -> dict[str, Any]:
    """The site's arguments of `submitit.AutoExecutor.update_parameters`, without memory and `sbatch_options`."""
    lines = [f"export {SCRATCH_VARIABLE}={_with_variables(site.scratch)}"] if site.scratch else []
    wanted = {
        "slurm_partition": site.partition,
        "slurm_account": site.account,
        "slurm_qos": site.qos,
        "slurm_constraint": site.constraint,
        "slurm_exclusive": site.exclusive or None,
        "slurm_setup": [*site.setup, *lines] or None,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def sbatch_options(site: Site, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` by submitit's names, so that they replace submitit's. Jobs are requeued when a node dies, whatever the
    cluster's default, unless the site leaves that out.
    """
    requeue = {} if "requeue" in left_out(site) else {"requeue": True}
    return requeue | {name.replace("-", "_"): value for name, value in options.items()}


def left_out(site: Site) -> list[str]:
    """Options that this project or submitit would write and the site does not want, by submitit's names."""
    return [name.replace("-", "_") for name in REMOVABLE if site.sbatch.get(name) is False]


def srun_options(site: Site, cpus_per_process: int) -> list[str]:
    """Of the step that runs a job's processes. Since SLURM 22.05, srun does not inherit the job's --cpus-per-task."""
    own = {} if site.sbatch.get("cpus-per-task") is False else {"cpus-per-task": cpus_per_process}
    wanted = {name: value for name, value in (own | site.srun).items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items()]


def _with_variables(text: str) -> str:
    """`text` quoted for the shell, except `$NAME` and `${NAME}`, which are expanded when the job runs.

    An unset variable ends the job with a message that names it.
    """
    parts = VARIABLES.split(text)  # literal, name, literal, ...
    return "".join(f'"${{{part}:?}}"' if number % 2 else shlex.quote(part) for number, part in enumerate(parts))
