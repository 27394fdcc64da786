"""The toy: its pictures are a function of (seed, index), and its three networks are what the programs take them for."""

import numpy as np
import pytest
import timm
import torch

from evaluations.features import TimmFeatures
from models.vae import load_codec
from toy.agreement import FEATURES, predict
from toy.agreement import main as agreement
from toy.draw import ATTRIBUTES, CLASSES, draw, write_npz
from toy.draw import main as draw_main

NETWORKS = FEATURES.parent
FRESH_SEED = 31                                             # no network was trained on it


@pytest.fixture(scope="module")
def fresh():
    """256 images that no network has seen: uint8 (256, 3, 32, 32), and their labels (256,)."""
    drawings = [draw(FRESH_SEED, index) for index in range(256)]
    images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2)
    return images, torch.tensor([d.label for d in drawings])


@pytest.fixture(scope="module")
def features():
    return TimmFeatures.load(FEATURES).eval()


def test_a_picture_depends_on_seed_and_index_alone():
    first = draw(5, 3)
    draw(5, 4)
    again = draw(5, 3)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.attributes, again.attributes)
    assert not np.array_equal(first.image, draw(5, 3 + len(CLASSES)).image)
    assert not np.array_equal(first.image, draw(6, 3).image)


def test_attributes_say_where_the_shape_is():
    """The centre of the covered pixels is (x, y), for the shapes that are symmetric about their centre."""
    for index in range(len(CLASSES)):
        drawing = draw(0, index, resolution=64)
        if "triangle" in CLASSES[drawing.label]:
            continue
        axis = (np.arange(64) + 0.5) / 64 - 0.5
        centre = [np.average(axis, weights=drawing.coverage.sum(axis=over)) for over in (0, 1)]
        assert len(drawing.attributes) == len(ATTRIBUTES)
        assert np.allclose(centre, drawing.attributes[:2], atol=0.005), CLASSES[drawing.label]


def test_a_folder_is_balanced_and_sorts_into_the_labels(tmp_path):
    draw_main(["--dest", str(tmp_path / "raw"), "--num-images", "32", "--seed", "7"])
    folders = sorted((tmp_path / "raw").iterdir())
    assert [folder.name for folder in folders] == list(CLASSES) and len(CLASSES) == 16
    for label, folder in enumerate(folders):
        assert sorted(file.name for file in folder.iterdir()) == [f"{label:06d}.png", f"{label + 16:06d}.png"]
    assert list(tmp_path.iterdir()) == [tmp_path / "raw"]


def test_an_existing_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw_main(["--dest", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err


def test_the_networks_are_small():
    files = list(NETWORKS.glob("*/*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 4e6


def test_features_know_the_classes(features, fresh):
    images, labels = fresh
    assert (predict(features, images) == labels).double().mean() >= 0.97


def test_the_vae_keeps_the_class_and_has_latents_of_unit_std(features, fresh):
    images, _ = fresh
    codec = load_codec(str(NETWORKS / "vae"))
    assert codec.space.downsampling == 4 and codec.space.channels == 4
    noise = torch.randn(256, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = codec.space.latents(codec.encode(images), noise)                            # (256, 4, 8, 8)
    # 256 images of correlated latents: an effective sample of some thousand values, relative error of a std below 5 %
    assert 0.95 < latents.std() < 1.05
    assert (predict(features, codec.decode(latents)) == predict(features, images)).double().mean() >= 0.95


def test_the_encoder_is_a_timm_model_with_a_class_token_that_tells_classes_apart(fresh):
    images, labels = fresh
    encoder = timm.create_model(f"local-dir:{NETWORKS / 'encoder'}", pretrained=True, num_classes=0).eval()
    assert encoder.has_class_token and encoder.num_prefix_tokens == 1
    assert list(encoder.pretrained_cfg["input_size"]) == [3, 32, 32]
    mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        tokens = encoder.forward_features((images / 255 - mean) / std)                    # (256, 1 + 16, E)
    assert tokens.shape == (256, 17, encoder.embed_dim)
    token = tokens[:, 0]
    centres = torch.stack([token[:128][labels[:128] == label].mean(dim=0) for label in range(16)])
    nearest = torch.cdist(token[128:], centres).argmin(dim=1)                             # a rule without training
    assert (nearest == labels[128:]).double().mean() >= 0.9


def test_all_weights_are_float32_after_loading(features):
    """They are stored as float16; the programs compute in float32 unless told otherwise."""
    encoder = timm.create_model(f"local-dir:{NETWORKS / 'encoder'}", pretrained=True, num_classes=0)
    for network in (features, encoder, load_codec(str(NETWORKS / "vae")).vae):
        assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_agreement_of_drawn_images_is_near_all_and_of_wrong_labels_is_none(tmp_path, capsys):
    drawings = [draw(FRESH_SEED, index) for index in range(128)]
    write_npz(tmp_path / "right.npz", drawings)
    with np.load(tmp_path / "right.npz") as file:
        np.savez(tmp_path / "wrong.npz", arr_0=file["arr_0"], arr_1=(file["arr_1"] + 1) % 16)
    said = []
    for name in ("right.npz", "wrong.npz"):
        agreement([str(tmp_path / name)])
        said.append(capsys.readouterr().out)
        assert "128 images" in said[-1] and "6.25 %" in said[-1]
    right, wrong = (float(line.split()[2]) for line in said)
    assert right >= 97 and wrong <= 3


def test_agreement_refuses_what_is_not_a_batch_of_samples(tmp_path, capsys):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 3)), arr_1=np.zeros(2))
    for name in ("absent.npz", "torn.npz", "other.npz", "float.npz"):
        with pytest.raises(SystemExit):
            agreement([str(tmp_path / name)])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and name in error
