"""The toy data set is a function of (seed, index), and its three networks do what the programs need."""

import numpy as np
import pytest
import timm
import torch

from evaluations.features import TimmFeatures
from models.vae import load_codec
from toy import agreement, draw
from toy.agreement import FEATURES, predict
from toy.draw import ATTRIBUTES, CLASSES

NETWORKS, FRESH_SEED = FEATURES.parent, 31                  # no network was trained on this seed


@pytest.fixture(scope="module")
def fresh():
    """192 fresh images, uint8 (192, 3, 32, 32), and their labels (192,)."""
    drawings = [draw.draw(FRESH_SEED, index) for index in range(192)]
    images = torch.from_numpy(np.stack([drawing.image for drawing in drawings])).permute(0, 3, 1, 2)
    return images, torch.tensor([drawing.label for drawing in drawings])


@pytest.fixture(scope="module")
def features():
    return TimmFeatures.load(FEATURES).eval()


def test_an_image_depends_on_seed_and_index_only():
    first, _, again = draw.draw(5, 3), draw.draw(5, 4), draw.draw(5, 3)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.attributes, again.attributes)
    for other in (draw.draw(5, 3 + len(CLASSES)), draw.draw(6, 3)):
        assert other.label == first.label and not np.array_equal(first.image, other.image)


def test_the_pictures_of_classes_are_those_that_the_networks_were_trained_on():
    for index, x, size, red, total in ((0, -0.042259008, 0.316435397, 0.057974085, 557806),
                                       (39, -0.030420428, 0.329972178, 0.070704989, 511039)):
        drawing = draw.draw(0, index)
        assert np.allclose(drawing.attributes[[0, 2, 4]], (x, size, red), rtol=1e-6)
        assert abs(int(drawing.image.sum()) - total) < 50                # a few pixels may round otherwise elsewhere


def test_attributes_give_the_position_of_the_shape():
    """The centre of the covered pixels is (x, y), for shapes that are symmetric about their centre."""
    axis = (np.arange(64) + 0.5) / 64 - 0.5
    for index in (index for index, name in enumerate(CLASSES) if "triangle" not in name):
        drawing = draw.draw(0, index, resolution=64)
        centre = [np.average(axis, weights=drawing.coverage.sum(axis=over)) for over in (0, 1)]
        assert len(drawing.attributes) == len(ATTRIBUTES)
        assert np.allclose(centre, drawing.attributes[:2], atol=0.005), CLASSES[index]


def test_a_folder_is_balanced_and_sorts_into_the_labels(tmp_path, capsys):
    draw.main(["--dest", str(tmp_path / "raw"), "--num-images", "32", "--seed", "7"])
    files = sorted(path.relative_to(tmp_path / "raw").as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [f"{name}/{label + 16 * turn:06d}.png" for label, name in enumerate(CLASSES) for turn in (0, 1)]
    with pytest.raises(SystemExit):
        draw.main(["--dest", str(tmp_path / "raw")])
    assert "exists" in capsys.readouterr().err


def test_features_know_the_classes_and_the_vae_keeps_them(features, fresh):
    images, labels = fresh
    assert (predict(features, images) == labels).double().mean() >= 0.97
    codec = load_codec(str(NETWORKS / "vae"))
    noise = torch.randn(192, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = codec.space.latents(codec.encode(images), noise)                            # (192, 4, 8, 8)
    assert 0.95 < latents.std() < 1.05
    assert (predict(features, codec.decode(latents)) == predict(features, images)).double().mean() >= 0.95


def test_class_tokens_of_the_encoder_tell_the_classes_apart(fresh):
    images, labels = fresh
    encoder = timm.create_model(f"local-dir:{NETWORKS / 'encoder'}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        tokens = encoder.forward_features((images / 255 - mean) / std)                    # (192, 1 + 16, E)
    assert tokens.shape == (192, 17, encoder.embed_dim) and encoder.num_prefix_tokens == 1
    token = tokens[:, 0]
    centres = torch.stack([token[:128][labels[:128] == label].mean(dim=0) for label in range(16)])
    assert (torch.cdist(token[128:], centres).argmin(dim=1) == labels[128:]).double().mean() >= 0.9


def test_agreement_of_drawn_images_is_high_and_of_wrong_labels_low(tmp_path, capsys):
    draw.main(["--npz", str(tmp_path / "right.npz"), "--num-images", "64", "--seed", str(FRESH_SEED)])
    with np.load(tmp_path / "right.npz") as file:
        np.savez(tmp_path / "wrong.npz", arr_0=file["arr_0"], arr_1=(file["arr_1"] + 1) % 16)
    found = []
    for name in ("right.npz", "wrong.npz"):
        agreement.main([str(tmp_path / name)])
        found.append(float(capsys.readouterr().out.split("class agreement ")[1].split()[0]))
    assert found[0] >= 97 and found[1] <= 3


@pytest.mark.parametrize("arrays", [None, {"mu": np.zeros(3)}, {"arr_0": np.zeros((2, 8, 8, 3)), "arr_1": np.zeros(2)},
                                    {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([0, 16])}])
def test_agreement_refuses_other_files(tmp_path, capsys, arrays):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"PK\x03\x04 torn") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(SystemExit):
        agreement.main([str(path)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
