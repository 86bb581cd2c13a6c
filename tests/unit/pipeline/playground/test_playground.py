"""The playground draws the pipeline's images without noise, step by step, and serves this machine alone."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.recipe import Recipe
from pipeline.exporting.export import export
from pipeline.playground.page import Stopped
from pipeline.playground.player import Player, Progress
from tests.conftest import copied

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def exported(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = copied(tiny_run, tmp_path_factory.mktemp("played"))
    recipe = replace(recipe, sample=replace(recipe.sample, sampler="ddim", eta=0.5))
    export(recipe)
    return recipe.folder / "pipeline"


def test_the_last_step_shows_the_image_that_the_pipeline_draws_without_noise(exported: Path) -> None:
    player, seen = Player(exported), list[Progress]()
    player.draw(1, 7, {"num_inference_steps": 4, "iterations": 3}, seen.append)
    (images,) = player.pipeline(1, seed=7, num_inference_steps=4, iterations=3, eta=0.0, return_dict=False)
    assert (seen[-1].image == np.asarray(images[0])).all()
    assert [(one.step, len(one.residuals)) for one in seen] == [(step, 3) for step in (1, 2, 3, 4)]
    assert seen[-1].blocks == 4 * (2 + 3)
    assert player.class_names == {0: "class 0", 1: "class 1", 2: "class 2"}


def test_guided_blocks_are_counted_twice_and_a_drawing_can_be_stopped(exported: Path) -> None:
    player, seen = Player(exported), list[Progress]()

    def stop(progress: Progress) -> None:
        seen.append(progress)
        raise Stopped

    with pytest.raises(Stopped):
        player.draw(0, 0, {"iterations": 3, "guidance_scale": 2.0}, stop)
    assert [(one.step, one.blocks) for one in seen] == [(1, 2 * (2 + 3))]


def test_a_folder_that_is_no_export_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not as pipeline/export"):
        Player(tmp_path)
    command = [sys.executable, "pipeline/play.py", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "has no model_index.json; name a folder that python pipeline/export.py wrote" in done.stderr


def test_in_a_browser_the_image_is_drawn_and_no_other_machine_reaches_it(exported: Path, chromium: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "pipeline/play.py", str(exported), "--no-browser", "--port", str(port)]
    user = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # nicegui looks for it
    playing = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=user)
    try:
        assert playing.stdout is not None
        assert f"http://127.0.0.1:{port}" in playing.stdout.readline()
        listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
        assert {line.split()[1] for line in listening if line.split()[1].endswith(f":{port:04X}")} == {
            f"0100007F:{port:04X}"
        }
        # The browser's time is not the server's, and can be over before the image is drawn: then it gets more.
        for milliseconds in (60_000, 300_000, 1_500_000, 7_500_000):
            browser = [*chromium, f"--virtual-time-budget={milliseconds}", "--dump-dom", f"http://127.0.0.1:{port}/"]
            page = subprocess.run(browser, capture_output=True, text=True, timeout=200).stdout
            if "step 3 of 3" in page:
                break
    finally:
        playing.terminate()
        playing.wait(60)
    assert "step 3 of 3" in page
    assert "data:image/png;base64," in page
