"""The site file: every fault is one line that names file and field; nothing of it is needed."""

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from common.jobs import Job
from common.recipe import Recipe
from slurm.cluster import Resources, executor, submission_script
from slurm.gpus import gpu_options
from slurm.site_file import Site, load_site, sbatch_options, submission_parameters

ROOT = Path(__file__).parents[3]


def test_the_example_is_a_site_file() -> None:
    site = load_site(ROOT / "slurm/site.example.yaml")
    assert site.partition == "gpu"
    assert submission_parameters(site)["slurm_setup"][:-1] == [
        "module load cuda/12.4",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
    ]


def test_without_a_site_file_slurms_own_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FPDM_SITE", raising=False)
    monkeypatch.setattr("slurm.site_file.DEFAULT", tmp_path / "site.yaml")
    assert load_site() == Site()
    assert submission_parameters(Site()) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partitoin: gpu", "partitoin: unknown key; allowed: partition, account"),
        ("memory_gb: -4", "memory_gb: Input should be greater than 0; found -4"),
        ("partition: 'two words'", "partition: String should match pattern"),
        ("setup: module load cuda", "setup: Input should be a valid tuple"),
        ('setup: ["one\\ntwo"]', "setup: String should match pattern"),
        (
            "sbatch: {output: x}",
            "sbatch: output is set by the recipe's launch section",
        ),
        ("sbatch: {wrap: 'true'}", "sbatch: wrap is set by the recipe's launch section"),
        ("sbatch: {parsable: true}", "sbatch: parsable is set by the recipe's launch section"),
        ("sbatch: {cpus-per-task: 4}", "sbatch: cpus-per-task is set by the recipe's launch section"),
        (
            "sbatch: {requeue: true}",
            "sbatch: requeue is set by the recipe's launch section or by this project; remove it (",
        ),
        ("srun: {output: x}", "srun: output is set by this project; remove it"),
        ("gpu_option: gpus", "gpu_option: Input should be 'gpus-per-node' or 'gres'"),
        ("sbatch: {outp: x}", "sbatch: outp abbreviates output; write options of sbatch in full"),
        ("sbatch: {o: x}", "sbatch: o abbreviates open-mode"),
        ("sbatch: {ntasks-per: 2}", "sbatch: ntasks-per abbreviates ntasks-per-node"),
        ("sbatch: {gre: 'gpu:8'}", "sbatch: gre abbreviates gres"),
        ("sbatch: {gpus-per-n: 8}", "sbatch: gpus-per-n abbreviates gpus-per-node"),
        ("sbatch: {part: gpu}", "sbatch: part abbreviates partition"),
        ("setup: ['#SBATCH --gres=gpu:8']", "setup: a line that sbatch would read as options"),
        ("sbatch: {'a b': x}", "sbatch: String should match pattern"),
        ("- gpu", "site: Input should be a dictionary or an instance of Site"),
        ("a: [", "not readable as YAML"),
        ("setup: " + "[" * 5000, "not readable as YAML: nested too deeply"),
        ("sbatch: {nice: " + "9" * 5000 + "}", "not readable as YAML: 999"),
        ("memory_gb: .inf", "memory_gb: Input should be a finite number"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_field(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is looked at below)
        load_site(path)
    assert str(raised.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


def test_a_folder_instead_of_a_site_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: Is a directory"):
        load_site(tmp_path)


def test_the_sites_options_take_the_place_of_ours() -> None:
    site = Site(sbatch={"gpus-per-node": "a100:8", "contiguous": False, "nice": 5})
    options = sbatch_options(site, gpu_options(site, Resources()))
    assert options == {"requeue": True, "gpus_per_node": "a100:8", "nice": 5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "--gpus-per-node=2"),
        ({"gres": "gpu:a100:8"}, "--gres=gpu:a100:8"),
        ({"gres": "lscratch:100,gpu:2"}, "--gres=lscratch:100,gpu:2"),
        ({"gres": "mps:50"}, "--gres=mps:50"),
        ({"gpus-per-node": "a100:8"}, "--gpus-per-node=a100:8"),
        ({"gpus-per-task": 1}, "--gpus-per-task=1"),
        ({"gpus-per-socket": "2"}, "--gpus-per-socket=2"),
        ({"gpus": 4}, "--gpus=4"),
        ({"tres-per-task": "gres/gpu:h100:1"}, "--tres-per-task=gres/gpu:h100:1"),
        ({"gres": "lscratch:100", "gpu-bind": "closest"}, "--gpus-per-node=2"),
        ({"gres": False}, "--gpus-per-node=2"),
    ],
)
def test_a_job_asks_for_gpus_in_one_way_and_the_sites_comes_first(
    options: dict[str, object], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"sbatch": options}))
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "site.yaml"))
    resources = Resources(processes=2, gpus_per_process=1)
    script = submission_script(executor("slurm", tmp_path, "name", resources, submits=False))
    asked = [
        line.removeprefix("#SBATCH ") for line in script.splitlines() if re.search("(gpus|gres|tres-)[^ ]*=", line)
    ]
    assert [line for line in asked if not re.match("--gres=lscratch:100$", line)] == [expected]


def script(site: str, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a job's submission script."""
    (tmp_path / "site.yaml").write_text(site)
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "site.yaml"))
    return submission_script(executor("slurm", tmp_path, "name", resources, submits=False)).splitlines()


@pytest.mark.parametrize(
    ("site", "kind", "expected"),
    [
        ("gpu_type: a100", None, ["--gpus-per-node=a100:2"]),
        ("gpu_type: a100", "h100", ["--gpus-per-node=h100:2"]),
        ("gpu_option: gres", None, ["--gres=gpu:2"]),
        ("gpu_option: gres\ngpu_type: a100", None, ["--gres=gpu:a100:2"]),
        ("gpu_option: gres\nsbatch: {gres: 'lscratch:100'}", "h100", ["--gres=lscratch:100,gpu:h100:2"]),
        ("sbatch: {gpus-per-node: false}", None, []),
        ("gpu_option: gres\nsbatch: {gres: false}", None, []),
    ],
)
def test_typed_and_untyped_gpus_are_asked_for_by_either_option(
    site: str, kind: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = script(site, Resources(processes=2, gpus_per_process=1, gpu_type=kind), tmp_path, monkeypatch)
    assert [line.removeprefix("#SBATCH ") for line in lines if re.search("--(gpus|gres)", line)] == expected


def test_a_job_without_gpus_leaves_out_those_that_the_site_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "sbatch: {gres: 'lscratch:100,gpu:2', gpus-per-task: 1}"
    lines = script(site, Resources(without_gpus=True), tmp_path, monkeypatch)
    assert [line for line in lines if re.search("--(gpu|gres)", line)] == ["#SBATCH --gres=lscratch:100"]


def test_a_type_beside_the_sites_own_request_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="gpu_type h100, and the site file's sbatch options request GPUs themselves"):
        script("sbatch: {gres: 'gpu:8'}", Resources(gpus_per_process=1, gpu_type="h100"), tmp_path, monkeypatch)


def test_false_leaves_an_option_out_that_would_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("wckey", "requeue", "cpus-per-task")
    assert all(f"--{option}" in "".join(script("{}", Resources(), tmp_path, monkeypatch)) for option in options)
    site = f"sbatch: {{{', '.join(f'{option}: false' for option in options)}}}"
    assert not [
        line for line in script(site, Resources(), tmp_path, monkeypatch) if any(map(line.__contains__, options))
    ]


def test_a_containers_options_reach_srun_which_starts_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "python: python\nsrun: {container-image: '/shared/a b.sqsh', container-writable: true}"
    (line,) = (line for line in script(site, Resources(), tmp_path, monkeypatch) if line.startswith("srun"))
    assert " '--container-image=/shared/a b.sqsh' --container-writable python -u -m submitit" in line


def test_a_missing_site_file_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"none\.yaml: no such file; FPDM_SITE names it"):
        load_site()


def test_a_scratch_folder_takes_the_jobs_variables_and_nothing_else_of_the_shells(tmp_path: Path) -> None:
    site = Site(scratch="/local/$USER/${SLURM_JOB_ID}/it's $(touch pwned) `touch pwned`")
    (line,) = submission_parameters(site)["slurm_setup"]
    command = ["bash", "-c", f'{line}; printf %s "$FPDM_SCRATCH"']
    asked = partial(subprocess.run, command, capture_output=True, text=True, cwd=tmp_path)
    told = asked(env={"USER": "a b; $(touch pwned)", "SLURM_JOB_ID": "12"})
    assert told.stdout == "/local/a b; $(touch pwned)/12/it's $(touch pwned) `touch pwned`"
    assert not list(tmp_path.iterdir())
    assert "USER: parameter null or not set" in asked(env={}).stderr


def test_a_scratch_folder_takes_the_jobs_home_and_no_other_users(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("scratch: ~/tmp")
    (line,) = submission_parameters(load_site(path))["slurm_setup"]
    command = ["bash", "-c", f'{line}; printf %s "$FPDM_SCRATCH"']
    assert subprocess.run(command, capture_output=True, text=True, env={"HOME": "/home/me"}).stdout == "/home/me/tmp"
    path.write_text("scratch: ~you/tmp")
    with pytest.raises(
        ValueError, match=r"site\.yaml: scratch: ~you is not expanded in a job; write the folder in full"
    ):
        load_site(path)


def test_the_name_of_the_site_file_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("account: mine")
    monkeypatch.setenv("DISK", str(tmp_path))
    monkeypatch.setenv("FPDM_SITE", "$DISK/site.yaml")
    assert load_site().account == "mine"
    monkeypatch.setenv("FPDM_SITE", "$NOT_SET/site.yaml")
    with pytest.raises(ValueError, match=r"FPDM_SITE: \$NOT_SET/site\.yaml names a variable that is not set, NOT_SET"):
        load_site()


def test_a_scratch_folder_that_cannot_be_created_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDM_SCRATCH", "/proc/none/here")
    assert Job.of("os.path", "exists", Recipe(name="a"))()["error"].startswith("scratch: no folder /proc/none/here on ")
