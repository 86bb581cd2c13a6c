"""What sampling and measuring cost beyond the networks themselves, and the Fréchet distance against scipy's sqrtm.

    python benchmarks/evaluate.py [--samples 96] [--rounds 5] [--dimensions 2048] [--json FILE]

In one run, the contenders taking turns:
  pipeline   draws, decodes, rounds, checks and writes images, extracts and writes their features, and fits them
  bare       the same calls of the network, of the autoencoder's decoder and of the extractor, on tensors in memory
What every set costs once, such as loading networks, is left out: the time of a set of one batch is subtracted on both
sides. The network is the demo's, small and with few blocks an image of 64 pixels, so that what an image costs
apart from blocks weighs more than on any published network. Of each contender's rounds the fastest counts, and on the
CPU time is this process's CPU time: the rest is the machine's other load.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import scipy.linalg
import torch

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import load_recipe
from common.recipe import Recipe, denoiser_config, diffusion, latent_shape
from fpdm import build_denoiser, rng
from fpdm.samplers import build_sampler
from pipeline.evaluation.metrics import frechet_distance, statistics
from pipeline.evaluation.statistics import summarise
from pipeline.features.extractors import find_extractor_weights, load_extractor, wanted_layers
from pipeline.sampling.generate import generate
from pipeline.sampling.sample_set import Sampling
from pipeline.training.checkpoint import export_weights
from preprocess.encoding.encoder import Encoder

ROOT = Path(__file__).parents[1]
BATCH = 16


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against one contender."""

    measurement: str
    contender: str
    ours_s: float
    theirs_s: float
    ratio: float
    aim: str

    def __str__(self) -> str:
        amounts = f"{self.ours_s:10.4g} s {self.theirs_s:10.4g} s"
        return f"{self.measurement:44} {self.contender:12} {amounts} {self.ratio:7.3f}  {self.aim}"


def timed(call: Callable[[], object]) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def prepare(runs: str, count: int) -> Recipe:
    """The demo's recipe in a folder of its own, with the weights of an untrained network that draws noise."""
    recipe = load_recipe(ROOT / "recipes/demo.yaml", ["name=benchmark", f"vae.path={ROOT / 'assets/vae-demo'}"])
    recipe = replace(
        recipe,
        runs=runs,
        sample=replace(recipe.sample, num_samples=count, chunk_samples=count, batch_size=BATCH, eta=0.0),
        evaluate=replace(recipe.evaluate, untrained_baseline=False),
    )
    parameters = build_denoiser(denoiser_config(recipe)).named_parameters()
    state = {
        name: values + 0.02 * rng.normal(0, name, torch.arange(1), tuple(values.shape))[0]
        for name, values in parameters
    }
    export_weights(recipe, state, 0)
    return recipe


def pipeline(recipe: Recipe, count: int) -> None:
    """Everything that a set of samples costs, from its weights to the statistics of its features."""
    recipe = replace(recipe, sample=replace(recipe.sample, num_samples=count))
    sampling = Sampling.of(recipe)
    (samples,) = sampling.sets
    shutil.rmtree(samples.folder, ignore_errors=True)
    generate(sampling, samples)
    features = sampling.features(samples)
    features.extract(sampling.spans)
    summarise([features.read((0, count))], count)


class Bare:
    """The networks' calls alone."""

    def __init__(self, recipe: Recipe) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.recipe, self.device = recipe, device
        self.model = build_denoiser(denoiser_config(recipe), device=device).eval()
        self.vae = Encoder(recipe.vae, device).network
        self.extractor = load_extractor(find_extractor_weights(recipe.evaluate), wanted_layers(recipe.evaluate)).network
        self.timesteps = build_sampler(diffusion(recipe), "ddim", recipe.sample.num_steps).timesteps

    @torch.inference_mode()
    def __call__(self, count: int) -> None:
        settings = self.recipe.sample
        for start in range(0, count, settings.batch_size):
            size = min(settings.batch_size, count - start)
            x = torch.randn(size, *latent_shape(self.recipe), device=self.device)
            labels = torch.zeros(len(x), dtype=torch.long, device=self.device)
            solution = None
            for t in self.timesteps:
                times = torch.full((len(x),), t, device=self.device)
                denoised = self.model(x, times, labels, iterations=settings.iterations, start=solution)
                solution = denoised.solution
            self.vae.decode(x.contiguous(memory_format=torch.channels_last))
        side = self.recipe.data.resolution
        for start in range(0, count, self.recipe.evaluate.batch_size):
            pixels = torch.zeros(min(self.recipe.evaluate.batch_size, count - start), 3, side, side, dtype=torch.uint8)
            self.extractor(pixels.to(self.device))


def measure_overhead(count: int, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as runs:
        recipe = prepare(runs, count)
        bare = Bare(recipe)
        calls = {"pipeline": partial(pipeline, recipe), "bare": bare}
        sizes = (BATCH, count)
        fastest = {(name, size): float("inf") for name in calls for size in sizes}
        for number, name, size in product(range(rounds + 1), calls, sizes):
            seconds = timed(partial(calls[name], size))
            if number:
                fastest[name, size] = min(fastest[name, size], seconds)
    ours, theirs = ((fastest[name, count] - fastest[name, BATCH]) / (count - BATCH) for name in calls)
    return Row("an image, drawn and measured", "bare calls", ours, theirs, ours / theirs, "at most 1.05")


def measure_distance(dimensions: int, rounds: int) -> tuple[Row, float]:
    """Of two fitted Gaussians with three images a dimension; also the relative difference of the two results."""
    generator = np.random.default_rng(0)
    fitted = []
    for _ in range(2):
        mixing = generator.normal(size=(dimensions, dimensions)) * np.geomspace(1, 1e-3, dimensions) / dimensions**0.5
        values = 0.4 + generator.normal(size=(3 * dimensions, dimensions)) @ mixing
        fitted.append(statistics(np.array_split(values, 8)))
    results: dict[str, float] = {}

    def textbook() -> None:
        first, second = fitted
        root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
        difference = first.mean - second.mean
        traces = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root).real
        results["textbook"] = float(difference @ difference + traces)

    def ours() -> None:
        results["ours"] = frechet_distance(*fitted)

    seconds = [(timed(ours), timed(textbook)) for _ in range(rounds)]
    own, theirs = (min(times) for times in zip(*seconds, strict=True))
    row = Row(f"Fréchet distance of {dimensions} dimensions", "scipy sqrtm", own, theirs, own / theirs, "at most 0.2")
    return row, abs(results["ours"] - results["textbook"]) / abs(results["textbook"])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--samples", type=count_argument, default=96, help=f"of the larger set (96); the smaller has {BATCH}"
    )
    parser.add_argument("--rounds", type=count_argument, default=5, help="rounds that count, after one to warm up (5)")
    parser.add_argument("--dimensions", type=count_argument, default=2048, help="of the Fréchet distance (2048)")
    parser.add_argument("--threads", type=count_argument, default=1, help="of the CPU (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    if arguments.samples <= BATCH:
        parser.error(f"--samples: {arguments.samples}; the larger set needs more than the smaller one's {BATCH}")
    torch.set_num_threads(arguments.threads)
    machine = show_machine()
    print(f"{'':44} {'against':12} {'ours':>12} {'theirs':>12} {'ratio':>7}  aim", flush=True)
    distance, difference = measure_distance(arguments.dimensions, max(1, arguments.rounds // 2))
    print(distance, flush=True)
    print(f"{'':44} relative difference of the two results {difference:.1e}; at most 1e-8", flush=True)
    overhead = measure_overhead(arguments.samples, arguments.rounds)
    print(overhead, flush=True)
    if arguments.json:
        rows = [asdict(distance) | {"relative_difference": difference}, asdict(overhead)]
        arguments.json.write_text(json.dumps({**machine, "threads": arguments.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
