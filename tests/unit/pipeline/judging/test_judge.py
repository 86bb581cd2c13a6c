"""The judge names each planted difference first, measures what torch-fidelity measures, and refuses what is no set."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_json
from common.recipe import Recipe
from common.run_recipe import write_recipe
from fpdm.latents import to_uint8
from pipeline.evaluation import references
from pipeline.evaluation.metrics import density_coverage, frechet_distance, statistics
from pipeline.features.extractors import EFFICIENTNET, Extractor, ExtractorWeights, extract
from pipeline.judging import scan as scanning
from pipeline.judging.changes import jpeg
from pipeline.judging.inputs import open_judged
from pipeline.judging.judge import Question, extractor, judge
from pipeline.judging.numbers import Distance, jackknife
from pipeline.judging.report import lines, read_report, sealed
from pipeline.judging.scan import Measuring
from pipeline.sampling.chunks import chunk_path, write_chunk
from preprocess.images.images import CROPS, from_uint8
from tests.conftest import generated, load_samples
from tests.forks import run_python
from tests.photographs import NAMES, encoded, photograph, write_folder, write_zip

SIDE = 48
TEXTURED = [number for number, name in enumerate(NAMES) if name not in ("rocket.jpg", "retina.jpg")]

Pictures = list[NDArray[np.uint8]]


class Tiny(nn.Module):
    """Seeded features of 2 x 12 dimensions: means and deviations of two layers of convolutions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, stride=2)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.second(self.first(images.float() / 64 - 2).relu()).relu()
        return (torch.cat([maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))], dim=1),)


def tiny(seed: int = 0) -> Measuring:
    network = Tiny(seed)
    extracting = Extractor(network, ("pooled",))  # type: ignore[arg-type]
    weights = ExtractorWeights(EFFICIENTNET, Path("tiny"), 64 * str(seed))
    return Measuring(weights, ("pooled",), lambda images: extract(extracting, images, 32), lambda: network)


def large(count: int, first: int = 0) -> list[Image.Image]:
    """Photographs of twice the side; number n is of class n % 5."""
    return [textured(number, 2 * SIDE, 2 * SIDE) for number in range(first, first + count)]


def textured(number: int, width: int, height: int) -> Image.Image:
    """A photograph of one of five; windows of the sky and of the dark around a retina are hard to tell apart."""
    window, original = divmod(number, len(TEXTURED))
    return photograph(len(NAMES) * window + TEXTURED[original], width, height)


def small(images: list[Image.Image], filter: Image.Resampling = Image.Resampling.LANCZOS) -> Pictures:
    return [np.asarray(image.resize((SIDE, SIDE), filter)) for image in images]


def write(folder: Path, pictures: Pictures, labels: list[int] | None = None) -> Path:
    """In a folder of PNGs, or in folders of classes."""
    names = [f"{number:06d}.png" for number in range(len(pictures))]
    if labels is not None:
        names = [f"{label}/{name}" for label, name in zip(labels, names, strict=True)]
    images = map(Image.fromarray, pictures)
    return write_folder(folder, {name: encoded(image) for name, image in zip(names, images, strict=True)})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("reference") / "images", small(large(70, first=1000)))


def first_cause(samples: Path, other: Path, reference: Path, seed: int = 0) -> dict[str, object]:
    form = judge(Question(samples, reference, other, probe=0), [tiny(seed)])["against"]
    assert form is not None
    assert form["causes"], form
    return form["causes"][0]  # type: ignore[return-value]


def rounded(count: int, rounding: str) -> Pictures:
    twice = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in large(count)])
    pixels = nn.functional.avg_pool2d(from_uint8(twice), 2) * 0.9
    return list(to_uint8(pixels, rounding).permute(0, 2, 3, 1).numpy())  # type: ignore[arg-type]


PLANTED: dict[str, Callable[[], tuple[Pictures, Pictures]]] = {
    "rounding": lambda: (rounded(64, "half_away"), rounded(64, "truncate")),
    "filter": lambda: (small(large(64)), small(large(64), Image.Resampling.NEAREST)),
    "JPEG": lambda: (small(large(64)), [jpeg(image, 83) for image in small(large(64))]),
    "count": lambda: (small(large(128)), small(large(128))[::2]),
    "duplicates": lambda: (small(large(80)), small(large(60)) + small(large(20))),
    "crop": lambda: (small(large(64)), small([inside(image) for image in large(64)])),
    "crop of an unequal one": lambda: (small(large(64)), small([image.crop((0, 14, 96, 82)) for image in large(64)])),
}
BOTH_WAYS = ("rounding", "JPEG", "count")


def inside(image: Image.Image) -> Image.Image:
    return image.crop((6, 6, 90, 90))


@pytest.mark.parametrize("planted", PLANTED)
def test_each_planted_difference_is_named_first(planted: str, tmp_path: Path, reference: Path) -> None:
    mine, theirs = PLANTED[planted]()
    samples, other = write(tmp_path / "mine", mine), write(tmp_path / "theirs", theirs)
    orders = ((samples, other), (other, samples)) if planted in BOTH_WAYS else ((samples, other),)
    for order in orders:
        cause = first_cause(*order, reference)
        assert cause["cause"] == planted.partition(" of ")[0], cause
        assert cause["effect"]


def test_labels_that_are_balanced_otherwise_are_named_first(tmp_path: Path, reference: Path) -> None:
    numbers = range(5 * 30)
    even = [number for number in numbers if number < 5 * 12]
    skewed = [number for number in numbers if number // 5 < (24 if number % 5 < 2 else 4)]
    pictures = small(large(len(numbers)))
    sets = [
        write(tmp_path / name, [pictures[number] for number in chosen], [number % 5 for number in chosen])
        for name, chosen in (("even", even), ("skewed", skewed))
    ]
    cause = first_cause(*sets, reference)
    assert cause["cause"] == "balance"


def test_other_weights_of_the_extractor_are_named_first(tmp_path: Path, reference: Path) -> None:
    samples = write(tmp_path / "samples", small(large(64)))
    write_json(tmp_path / "theirs.json", sealed(judge(Question(samples, reference, probe=0), [tiny(1)])))
    cause = first_cause(samples, tmp_path / "theirs.json", reference)
    assert cause["cause"] == "weights"
    mine, theirs = (judge(Question(samples, reference, probe=0), [tiny(seed)]) for seed in (0, 1))
    assert cause["effect"] == pytest.approx(theirs["numbers"][0]["value"] - mine["numbers"][0]["value"])
    both = judge(Question(samples, reference, probe=4), [tiny(0), tiny(1)])
    moved = next(mover for mover in both["movers"] if mover["change"] == "the extractor's weights 11111111")
    assert moved["effect"] == pytest.approx(cause["effect"])


def test_equal_images_and_other_draws_have_no_cause(tmp_path: Path, reference: Path) -> None:
    pictures = small(large(96))
    samples = write(tmp_path / "samples", pictures[:48])
    packed = write_zip(
        tmp_path / "same.zip", {f"{i}.png": encoded(Image.fromarray(p)) for i, p in enumerate(pictures[:48])}
    )
    same = judge(Question(samples, reference, packed, probe=0), [tiny()])
    assert same["against"] is not None
    assert same["against"]["causes"] == []
    assert same["against"]["sha256"] == same["samples"]["sha256"]
    other = judge(Question(samples, reference, write(tmp_path / "other", pictures[48:]), probe=0), [tiny()])
    assert other["against"] is not None
    assert other["against"]["causes"] == []
    assert "not made from the same images" in other["against"]["relation"]


def test_what_moves_the_number_is_measured_on_these_images(tmp_path: Path, reference: Path) -> None:
    pictures = small(large(35))
    pictures += [pictures[3], np.asarray(Image.open(reference / "000005.png"))]
    samples = write(tmp_path / "samples", pictures, [number % 5 for number in range(37)])
    form = judge(Question(samples, reference), [tiny()])
    effects = [abs(mover["effect"]) for mover in form["movers"] if mover["effect"] is not None]
    assert effects == sorted(effects, reverse=True)
    causes = {"rounding", "filter", "JPEG", "balance", "count", "duplicates", "near-copies", "crop", "weights"}
    assert {mover["cause"] for mover in form["movers"]} == causes
    notes = {mover["cause"]: mover["note"] for mover in form["movers"]}
    assert "1 of 37 repeat an earlier one" in notes["duplicates"]
    assert "1 of 37 are near-copies of one" in notes["near-copies"]

    measuring = tiny()
    reference_images = [np.asarray(Image.open(path)) for path in sorted(reference.iterdir())]
    against = statistics([measuring.rows(reference_images)])
    in_order = [np.asarray(Image.open(path)) for path in sorted(samples.rglob("*.png"), key=lambda path: str(path))]
    before, after = (
        frechet_distance(statistics([measuring.rows(each)]), against)
        for each in (in_order, [jpeg(image, 75) for image in in_order])
    )
    moved = {mover["change"]: mover["effect"] for mover in form["movers"]}
    assert form["numbers"][0]["value"] == pytest.approx(before)
    assert moved["stored as JPEG of quality 75"] == pytest.approx(after - before, rel=1e-5)


def test_originals_of_a_reference_are_cropped_by_each_rule(tmp_path: Path) -> None:
    files = {f"{number}.png": encoded(photograph(number, 96, 72)) for number in range(24)}
    originals = write_folder(tmp_path / "originals", files)
    samples = write(tmp_path / "samples", [np.asarray(CROPS["center"](photograph(n, 96, 72), SIDE)) for n in range(24)])
    form = judge(Question(samples, originals, crop="center"), [tiny()])
    assert form["numbers"][0]["value"] == pytest.approx(0, abs=1e-6)
    moved = {mover["change"]: mover["effect"] for mover in form["movers"] if mover["cause"] == "crop"}
    assert moved["the reference cropped by `resize` instead of `center`"] > 0
    with pytest.raises(UserError, match=r"--reference: .* pixels; generated images are square"):
        judge(Question(samples, originals), [tiny()])
    with pytest.raises(UserError, match="--crop: centre; one of center, short_side, resize"):
        judge(Question(samples, originals, crop="centre"), [tiny()])


def test_numbers_are_torch_fidelitys_to_1e6_and_the_report_is_sealed(tmp_path: Path) -> None:
    samples, reference = (write(tmp_path / name, small(large(12, n))) for name, n in (("samples", 0), ("images", 50)))
    command = ["pipeline/judge.py", str(samples), "--reference", str(reference), "--json", "--probe", "0"]
    done = run_python(*command, "--features", EFFICIENTNET)
    assert done.returncode == 0, done.stderr
    (tmp_path / "judged.json").write_text(done.stdout)
    form = read_report(tmp_path / "judged.json")
    options = {"cuda": False, "verbose": False, "cache": False, "feature_extractor": EFFICIENTNET, "save_cpu_ram": True}
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(reference), fid=True, prc=True, datasets_num_workers=0, **options
    )
    mine = {number["key"]: number["value"] for number in form["numbers"]}
    names = {"frechet": "frechet_inception_distance", "precision": "precision", "recall": "recall"}
    assert {name: mine[name] for name in names} == {
        name: pytest.approx(theirs[names[name]], rel=1e-6) for name in names
    }
    assert not any("FID" in number["name"] for number in form["numbers"])
    (tmp_path / "judged.json").write_text(done.stdout.replace('"count": 12', '"count": 13'))
    with pytest.raises(UserError, match=r"judged.json: changed after it was written"):
        read_report(tmp_path / "judged.json")


def layouts(folder: Path, pictures: Pictures) -> dict[str, Path]:
    """The same images as different projects write them."""
    pngs = [encoded(Image.fromarray(image)) for image in pictures]
    with tarfile.open(folder / "part-000.tar", "w") as tar:
        for number, png in enumerate(pngs):
            for name, content in ((f"{number:05d}.png", png), (f"{number:05d}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    np.savez(folder / "adm.npz", arr_0=np.stack(pictures), arr_1=np.arange(len(pictures)) % 2)
    np.savez(folder / "sit.npz", np.stack(pictures))
    labels = np.arange(len(pictures)) % 2
    for first, end, suffix in ((0, 5, "npz"), (5, len(pictures), "tar")):
        rows = {"images": np.stack(pictures[first:end]), "labels": labels[first:end]}
        write_chunk(chunk_path(folder / "000000000064-0123456789abcdef", (first, end), suffix), rows)
    return {
        "JiT": write_folder(folder / "heun-steps50-cfg2.9", {f"{i:05d}.png": png for i, png in enumerate(pngs)}),
        "SiT and RAE": write_folder(folder / "SiT-XL-2", {f"{i:06d}.png": png for i, png in enumerate(pngs)}),
        "SiT's npz": folder / "sit.npz",
        "ADM": folder / "adm.npz",
        "EDM2": write_folder(
            folder / "out", {f"{500 * i // 1000 * 1000:06d}/{500 * i:06d}.png": png for i, png in enumerate(pngs)}
        ),
        "a zip": write_zip(folder / "samples.zip", {f"{i}.png": png for i, png in enumerate(pngs)}),
        "WebDataset": folder / "part-000.tar",
        "ours": folder / "000000000064-0123456789abcdef",
    }


def test_layouts_of_other_projects_are_the_same_set(tmp_path: Path, reference: Path) -> None:
    found = {}
    for name, path in layouts(tmp_path, small(large(8))).items():
        form = judge(Question(path, reference, probe=0), [tiny()])
        found[name] = form["samples"]["count"], form["samples"]["sha256"]
        has_classes = "2 classes" in form["samples"]["label"]
        assert has_classes == (name == "WebDataset")
    assert len(set(found.values())) == 1, found


def test_a_run_brings_the_labels_of_its_samples(tiny_recipe: Recipe) -> None:
    samples = generated(tiny_recipe)
    write_recipe(tiny_recipe)
    labels = open_judged(tiny_recipe.folder, "SAMPLES", EFFICIENTNET).labels
    assert labels is not None
    assert labels.tolist() == load_samples(samples, 10)[1].tolist()
    assert len(set(labels.tolist())) > 1


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "set.npz", allow_pickle=True, **arrays)  # type: ignore[arg-type]
    return folder / "set.npz"


def with_image(folder: Path, name: str, data: bytes) -> Path:
    return write_folder(write(folder, small(large(3))), {name: data})


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "none", r"SAMPLES: .*none is not there; name a folder of images, a zip"),
    "an empty folder": (lambda folder: folder, r"SAMPLES: .* is empty: there are no images; name a folder of images"),
    "mixed sizes": (
        lambda folder: with_image(folder, "z.png", encoded(photograph(0, 40, 40))),
        r"SAMPLES: .*: z.png has 40 x 40 pixels, the first image has 48 x 48; a set is of one size",
    ),
    "grey": (
        lambda folder: with_image(folder, "z.png", encoded(photograph(0, 48, 48).convert("L"))),
        r"SAMPLES: .*: z.png is of mode L, not RGB: .*convert it",
    ),
    "transparency": (
        lambda folder: with_image(folder, "z.png", encoded(photograph(0, 48, 48).convert("RGBA"))),
        r"z.png is of mode RGBA",
    ),
    "an unreadable file": (
        lambda folder: with_image(folder, "z.png", encoded(photograph(0, 48, 48))[:200]),
        r"SAMPLES: .*: z.png: not readable as an image.*; remove it or write it again",
    ),
    "an npz of something else": (lambda folder: npz(folder, x=np.zeros(3)), r"SAMPLES: .*set.npz holds x; .*\(arr_0\)"),
    "a pickled npz": (
        lambda folder: npz(folder, arr_0=np.array([{}] * 3)),
        r"SAMPLES: .*arr_0 is object \(3,\); images",
    ),
    "a recipe": (lambda folder: folder / "a.yaml", r"SAMPLES: .*a.yaml is a recipe, which stands for its training"),
    "one image": (lambda folder: write(folder, small(large(1))), r"SAMPLES: .* has 1 images; a distance needs two"),
    "another resolution": (
        lambda folder: write(folder, [np.zeros((32, 32, 3), np.uint8)] * 3),
        r"--reference: .* has images of 48 pixels, SAMPLES have 32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_set_of_images_is_refused_in_one_line(name: str, tmp_path: Path, reference: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        judge(Question(make(tmp_path), reference, probe=0), [tiny()])


def test_a_statistics_file_will_do_as_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(references.WIDTHS, (EFFICIENTNET, "pooled"), 24)
    samples = write(tmp_path / "samples", small(large(12)))
    draw = np.random.default_rng(0).normal(size=(100, 24))
    np.savez(tmp_path / "fid_stats.npz", mu=draw.mean(axis=0), sigma=np.cov(draw, rowvar=False))
    form = judge(Question(samples, tmp_path / "fid_stats.npz", probe=2), [tiny()])
    assert [number["key"] for number in form["numbers"]] == ["frechet"]
    unmeasured = {mover["cause"]: mover["note"] for mover in form["movers"] if mover["effect"] is None}
    assert set(unmeasured) == {"balance", "near-copies", "crop"}
    assert any("statistics" in line for line in lines(form))
    form["reference"]["label"] = "\x1b[2J another person's words"
    assert all(line.isprintable() for line in lines(form))


@pytest.mark.parametrize(
    ("named", "message"), [("vgg", "--features: vgg; one of"), ("efficientnet-lite0=none", "no file none")]
)
def test_extractors_that_are_not_there_are_refused(named: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        extractor(named)


def test_density_and_coverage_are_their_definitions() -> None:
    draw = np.random.default_rng(0)
    samples, real = draw.normal(size=(30, 3)) + 0.5, draw.normal(size=(40, 3))
    between = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(between, axis=1)[:, 5]
    inside = np.linalg.norm(real[:, None] - samples[None], axis=-1) < radii[:, None]  # (40, 30)
    assert density_coverage(samples, real) == (pytest.approx(inside.sum() / (5 * 30)), inside.any(axis=1).mean())


@pytest.mark.parametrize("count", [20, 200])
def test_distances_taken_again_are_the_printed_one(count: int) -> None:
    draw = np.random.default_rng(1)
    rows, other = draw.normal(size=(count, 32)).astype(np.float32), statistics([draw.normal(size=(300, 32)) * 2])
    assert Distance(other)(rows) == pytest.approx(frechet_distance(statistics([rows]), other), rel=1e-9)


def test_the_interval_of_a_mean_is_its_standard_error() -> None:
    rows = np.random.default_rng(2).normal(size=(4000, 1)).astype(np.float32)
    errors = [jackknife(lambda kept: (float(kept.mean()),), part)[0] for part in np.split(rows, 20)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(1 / np.sqrt(200), rel=0.15)


def test_a_copy_is_found_once_after_jpeg_and_mirroring() -> None:
    pictures = small(large(20))
    pictures += [jpeg(pictures[2], 80), pictures[7][:, ::-1], pictures[9]]
    measuring = tiny()
    rows = measuring.rows(pictures)
    thumbnails = np.stack([scanning.thumbnail(image) for image in pictures])
    digests = [image.tobytes() for image in pictures]
    found = scanning.Scan(None, SIDE, {"pooled": rows}, thumbnails, digests)  # type: ignore[arg-type]
    assert np.flatnonzero(scanning.copies(found)).tolist() == [20, 21, 22]
