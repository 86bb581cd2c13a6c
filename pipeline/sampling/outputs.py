"""The forms that samples are written in, one class each: chunks of images or of features, and what is made of them."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_folder, atomic_write
from common.run_folder import SampleFolder
from pipeline.sampling.chunks import Chunk, Span, chunk_path, iterate, write_chunk
from pipeline.sampling.sample_set import SampleSet, Sampling


class Chunks:
    """`chunks`: arrays of images and labels. Other forms override what they do otherwise."""

    suffix = "npz"

    def __init__(self, sampling: Sampling, samples: SampleSet) -> None:
        self.folder, self.count = samples.folder, sampling.recipe.sample.num_samples

    def paths(self, span: Span) -> list[Path]:
        """The files that samples first to end - 1 lie in."""
        return [chunk_path(self.folder, span, self.suffix)]

    def write(self, span: Span, rows: Chunk) -> None:
        """Writes images and labels to their `paths`."""
        for path in self.paths(span):
            write_chunk(path, rows)

    @property
    def path(self) -> Path | None:
        """The file or folder of all samples; None if the chunks are all there is to write."""
        return None

    @property
    def is_complete(self) -> bool:
        return self.path is None or self.path.exists()

    def complete(self) -> None:
        """Writes `path`, once all chunks exist; any number of times, by one process at a time."""
        if self.path is not None and not self.path.exists():
            self.collect(self.path)

    def collect(self, path: Path) -> None:
        """Writes the samples of all chunks to `path`."""


class WebDataset(Chunks):
    """`webdataset`: tars of PNGs."""

    suffix = "tar"


class Features(Chunks):
    """`features`: of all samples, and the images of the first alone, for the report."""

    def __init__(self, sampling: Sampling, samples: SampleSet) -> None:
        super().__init__(sampling, samples)
        self.features, self.shown = sampling.features(samples), sampling.recipe.sample.save_images

    def paths(self, span: Span) -> list[Path]:
        return [*self._images(span), chunk_path(self.features.folder, span)]

    def write(self, span: Span, rows: Chunk) -> None:
        for path in self._images(span):
            write_chunk(path, rows)
        self.features.write(span, rows["images"])

    def _images(self, span: Span) -> list[Path]:
        return super().paths(span) if span[0] < self.shown else []


class AdmFile(Chunks):
    """`npz`: chunks, then one file for ADM's evaluator."""

    @property
    def path(self) -> Path:
        return SampleFolder(self.folder).adm_file(self.count)

    def collect(self, path: Path) -> None:
        """With a chunk in memory at a time: 50,000 images of 256 pixels are 10 GB."""
        span = (0, self.count)
        shape = next(iter(iterate(self.folder, span)))["images"].shape[1:]
        with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for name, source, dtype, row in (("arr_0", "images", "|u1", shape), ("arr_1", "labels", "<i8", ())):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": dtype, "fortran_order": False, "shape": (self.count, *row)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for rows in iterate(self.folder, span):
                        member.write(np.ascontiguousarray(rows[source]).tobytes())


class Pngs(Chunks):
    """`folder`: chunks, then a folder of PNGs."""

    @property
    def path(self) -> Path:
        return SampleFolder(self.folder).pngs(self.count)

    def collect(self, path: Path) -> None:
        with atomic_folder(path) as temporary:
            images = (image for rows in iterate(self.folder, (0, self.count)) for image in rows["images"])
            for index, image in enumerate(images):
                Image.fromarray(image).save(temporary / f"{index:08d}.png")


FORMATS = {"chunks": Chunks, "webdataset": WebDataset, "features": Features, "npz": AdmFile, "folder": Pngs}


def output(sampling: Sampling, samples: SampleSet) -> Chunks:
    """The one that `sample.output` names."""
    return FORMATS[sampling.recipe.sample.output](sampling, samples)
