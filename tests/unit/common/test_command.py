"""Every command resolves, checks, prints and only then works; its help is instant; a user's mistake is status 2."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.command import argument_parser, exit_status_of
from tests.forks import run_python

ROOT = Path(__file__).parents[3]
SCRIPTS = [path for room in ("preprocess", "pipeline") for path in sorted((ROOT / room).glob("*.py"))]
PROGRAMS = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]
# These take folders, no recipe.
WITHOUT_RECIPE = ("verify_shards", "compare", "convert", "draw", "init", "judge", "play", "reproduce")
COMMANDS = [path for path in PROGRAMS if path.stem not in WITHOUT_RECIPE]

# These two look at what is there, and build no network.
NETWORK = [path for path in COMMANDS if path.stem not in ("show_latents", "reconstruct_ema")]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def test_the_commands_of_the_readme_are_here() -> None:
    names = {path.name for path in COMMANDS}
    assert {"encode_latents.py", "train.py", "sample.py", "eval_fid.py", "run.py"} <= names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_help_imports_nothing_heavy(path: Path) -> None:
    started = time.monotonic()
    done = run("-X", "importtime", path, "--help")
    assert done.returncode == 0
    if path in COMMANDS:
        assert "--config" in done.stdout
        assert "docs/recipe.md" in done.stdout
    heavy = {"torch", "deepspeed", "diffusers", "timm", "torch_fidelity", "matplotlib"}
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not heavy & imported, f"--help took {time.monotonic() - started:.1f} s"


def test_a_path_on_the_command_line_is_expanded_as_in_a_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    parser = argument_parser("")
    read = [parser.parse_args([f"--config={text}"]).config for text in ("~/a.yaml", "$DISK/a.yaml", "a$$b.yaml")]
    assert read == [Path("/home/me/a.yaml"), Path("/disk/a.yaml"), Path("a$b.yaml")]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--config=$NOT_SET/a.yaml"])
    assert "error: --config: $NOT_SET/a.yaml names a variable that is not set, NOT_SET" in capsys.readouterr().err


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "slurm/status.py"], ids=lambda path: path.name)
def test_every_argument_that_is_a_path_is_expanded(path: Path) -> None:
    assert "type=Path" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_an_unknown_key_ends_every_command_with_one_line_and_status_2(path: Path) -> None:
    done = run(path, "--config", "recipes/demo.yaml", "train.batch_szie=4")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: recipes/demo.yaml: train.batch_szie: unknown key; did you mean train.batch_size?"
    ]


@pytest.mark.parametrize("path", NETWORK, ids=lambda path: path.name)
def test_a_dry_run_counts_parameters_exactly_and_touches_nothing(path: Path, tmp_path: Path) -> None:
    places = [f"{field}={tmp_path / field}" for field in ("runs", "data.images", "data.held_out", "data.shards")]
    places.append("launch.gpu=h100")  # nothing is measured
    done = run_python(str(path), "--config", "recipes/demo.yaml", "--dry-run", *places)
    assert "plan: network: fpdm on latents (4, 16, 16), 1,006,984 parameters" in done.stdout
    missing = done.stderr.splitlines()  # what the command needs of the ones before it, if anything
    assert (done.returncode, len(missing)) in ((0, 0), (2, 1)), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pipeline/train.py recipes/demo.yaml", "--config: missing; --help shows how the command is written"),
        (
            "pipeline/train.py --config recipes/demo.yaml --dryrun",
            "--dryrun: no such argument; did you mean --dry-run?",
        ),
        (
            "pipeline/train.py --config recipes/demo.yaml --batch-size 3",
            "--batch-size: no such argument; --help lists all; fields of a recipe are written section.field=value",
        ),
        ("pipeline/init.py", "IMAGES: missing; --help shows how the command is written"),
        ("pipeline/init.py pics --time 0s", "--time: '0s' is no time; write 90s, 30m, 2h or 1d"),
        ("pipeline/init.py pics data.images=x", "data.images=x: the images are pics; name them once, as IMAGES"),
        ("pipeline/compare.py a b --count 0", "--count: 0; a whole number, at least 1"),
        ("pipeline/compare.py a b --out docs", "--out: docs is a folder; name a file"),
        (
            "pipeline/compare.py a b --out /dev/null/a.html",
            "--out: /dev/null/a.html: /dev/null is a file; name another",
        ),
        ("pipeline/compare.py a b", "a: no run's folder, such as runs/demo: it holds no recipe.yaml"),
        (
            "pipeline/reproduce.py --scale small --only T1 --dry-run name=x",
            "name=x: each run is named by its recipe and seed; leave it out",
        ),
        (
            "preprocess/verify_shards.py s3://a/b",
            "s3://a/b: only a local folder is verified; training verifies what it fetches",
        ),
        (
            "preprocess/verify_shards.py data --deep /nope",
            "/nope: No such file or directory; recipes/ holds the ones that come with the project",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments: str, words: str) -> None:
    done = run(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {words}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])  # in the buffer until the end, and beyond it
def test_a_command_whose_reader_has_left_ends_without_a_word(lines: int, unbuffered: str) -> None:
    """`| head`."""
    work = f"lambda: print('a\\n' * {lines})"
    program = f"import sys; from common.command import exit_status_of; sys.exit(exit_status_of({work}))"
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 128 + signal.SIGPIPE


def test_a_folder_that_this_user_may_not_enter_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise PermissionError(13, "Permission denied", "/runs/theirs/weights")

    assert exit_status_of(work) == 2
    words = "this user may not read it; ask its owner for access, or name another"
    assert capsys.readouterr().err == f"error: /runs/theirs/weights: {words}\n"


def test_another_broken_connection_is_no_reader_that_has_left() -> None:
    def work() -> None:
        raise BrokenPipeError(32, "a rank's connection")

    with pytest.raises(BrokenPipeError, match="a rank's connection"):
        exit_status_of(work)


@pytest.mark.parametrize(
    ("variable", "value", "spins"),
    [("TERM", "dumb", "10000"), ("GOMP_SPINCOUNT", "7", "7"), ("OMP_WAIT_POLICY", "PASSIVE", "0")],
)
def test_threads_that_wait_leave_their_core_to_other_programs(variable: str, value: str, spins: str) -> None:
    program = (
        "import os, sys; from common.command import exit_status_of\n"
        "exit_status_of(lambda: print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT')) or __import__('torch'))"
    )
    environment = {name: os.environ[name] for name in os.environ if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", variable: value}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    told = environment.get("GOMP_SPINCOUNT", None if variable == "OMP_WAIT_POLICY" else spins)
    assert done.stdout.strip() == f"False {told}"  # in time for torch
    said = {line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    assert said <= {f"GOMP_SPINCOUNT = '{spins}'"}  # by GNU's OpenMP, where torch has that one


def test_recipes_are_utf8_and_lines_are_printed_whatever_the_locale(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: test  # für später\ndata: {images: Bücher}\n", encoding="utf-8")
    program = (
        "import sys; from common.command import exit_status_of; from common.loading import load_recipe\n"
        "sys.exit(exit_status_of(lambda: print(load_recipe(sys.argv[1]).data.images)))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe)], capture_output=True, env=os.environ | ascii_only, cwd=ROOT
    )
    assert (done.stdout.strip(), done.returncode) == (rb"B\xfccher", 0), done.stderr
