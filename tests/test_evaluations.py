"""Scoring: the Frechet distance in closed form, Inception and its resize against independent constructions, the readers."""

import io
import json
import types
import urllib.error
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file

from evaluations import features as features_module
from evaluations.evaluator import evaluate, extract, main, open_images
from evaluations.features import Extractor, full_precision, load_extractor
from evaluations.inception import Inception, resize_tf1
from evaluations.metrics import frechet_distance, gaussian_statistics
from models.errors import UserError


def random_images(count, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def random_covariance(size, rank=None, seed=0):
    factor = np.random.default_rng(seed).normal(size=(size, rank or size))
    return factor @ factor.T


# --- metrics ---------------------------------------------------------------------------------------------------------------------


def test_gaussian_statistics_are_numpys_in_float64_over_several_chunks(monkeypatch):
    monkeypatch.setattr("evaluations.metrics.CHUNK", 7)
    rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) + 1000
    mu, sigma = gaussian_statistics(rows)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, rows.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)   # ddof 1


def test_frechet_distance_of_diagonal_gaussians():
    mu1, mu2 = np.array([1.0, 2.0, 3.0]), np.array([0.0, 4.0, 3.0])
    s1, s2 = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])                # standard deviations
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_equals_the_eigenvalues_of_the_product(rank):
    a, b = random_covariance(30, rank, seed=1), random_covariance(30, rank, seed=2)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    expected = 30 * 4.0 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(np.zeros(30), a, np.full(30, 2.0), b) == pytest.approx(expected, rel=1e-9 if rank is None else 1e-6)
    assert frechet_distance(np.full(30, 2.0), b, np.zeros(30), a) == pytest.approx(expected, rel=1e-9 if rank is None else 1e-6)


@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_to_itself_is_zero(rank):
    sigma, mu = random_covariance(40, rank), np.arange(40.0)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < (1e-10 if rank is None else 1e-5) * np.trace(sigma)


# --- resize and network ----------------------------------------------------------------------------------------------------------


def resize_literally(image, side=299):
    """The rule word by word for one (H, W, 3) image, in float32."""
    height, width, _ = image.shape
    down, across = np.float32(height) / np.float32(side), np.float32(width) / np.float32(side)
    result = np.empty((side, side, 3), np.float32)
    for i in range(side):
        y = np.float32(i) * down
        y0 = int(np.floor(y))
        y1, wy = min(y0 + 1, height - 1), y - np.float32(y0)
        for j in range(side):
            x = np.float32(j) * across
            x0 = int(np.floor(x))
            x1, wx = min(x0 + 1, width - 1), x - np.float32(x0)
            tl, tr, bl, br = (image[p, q].astype(np.float32) for p, q in ((y0, x0), (y0, x1), (y1, x0), (y1, x1)))
            top, bottom = tl + (tr - tl) * wx, bl + (br - bl) * wx
            result[i, j] = top + (bottom - top) * wy
    return result


@pytest.mark.parametrize("height, width", [(64, 64), (256, 256), (320, 200), (512, 512)])
def test_resize_is_tensorflow_1s(height, width):
    image = random_images(1, height, width)[0]
    ours = resize_tf1(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, resize_literally(image), rtol=0, atol=1e-4)


def test_resize_of_299_is_the_identity():
    images = torch.from_numpy(random_images(1, 299, 299)).permute(0, 3, 1, 2)
    assert torch.equal(resize_tf1(images), images.float())


def published_keys():
    """The 566 names of the published file, by its rule: 94 units of 6 entries, and fc."""
    pool = ["branch1x1", "branch_pool"]
    family = {
        "5": [*pool, "branch5x5_1", "branch5x5_2", *(f"branch3x3dbl_{i}" for i in (1, 2, 3))],
        "6": [*pool, *(f"branch7x7_{i}" for i in (1, 2, 3)), *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))],
        "7": [*pool, "branch3x3_1", "branch3x3_2a", "branch3x3_2b", *(f"branch3x3dbl_{i}" for i in ("1", "2", "3a", "3b"))],
    }
    units = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    units += [f"Mixed_{block}.{unit}" for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c") for unit in family[block[0]]]
    units += ["Mixed_6a.branch3x3", *(f"Mixed_6a.branch3x3dbl_{i}" for i in (1, 2, 3))]
    units += ["Mixed_7a.branch3x3_1", "Mixed_7a.branch3x3_2", *(f"Mixed_7a.branch7x7x3_{i}" for i in (1, 2, 3, 4))]
    assert len(units) == 94
    leaves = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    return {f"{unit}.{leaf}" for unit in units for leaf in leaves} | {"fc.weight", "fc.bias"}


@pytest.fixture(scope="module")
def random_state():
    """Random weights whose signal survives 94 units."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in Inception().state_dict().items():
        noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        if key.endswith("conv.weight"):
            noise *= (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            noise = 1 + 0.2 * noise.clamp(-3, 3)
        elif value.is_floating_point():
            noise *= 0.2
        state[key] = noise
    return state


@pytest.fixture(scope="module")
def weights_file(random_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_state, path)
    return path


@pytest.fixture(scope="module")
def inception(weights_file):
    with pytest.warns(UserWarning, match="not the published Inception"):
        return load_extractor("inception", "cpu", weights_file)


def test_network_has_the_published_keys():
    assert set(Inception().state_dict()) == published_keys() and len(published_keys()) == 566


def test_network_is_torchvisions_with_the_three_documented_differences(inception, random_state, monkeypatch):
    calls = []

    def average(x, **kwargs):                       # nine in all, in the order of the blocks; the last is Mixed_7c's
        calls.append(kwargs)
        assert kwargs == {"kernel_size": 3, "stride": 1, "padding": 1}
        return F.avg_pool2d(x, **kwargs, count_include_pad=False) if len(calls) < 9 else F.max_pool2d(x, **kwargs)

    monkeypatch.setattr(torchvision.models.inception, "F", types.SimpleNamespace(
        avg_pool2d=average, max_pool2d=F.max_pool2d, relu=F.relu))
    oracle = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False).eval()
    oracle.load_state_dict(random_state)
    oracle.fc = torch.nn.Identity()

    images = random_images(2, 40, 56)
    resized = torch.from_numpy(np.stack([resize_literally(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = oracle((resized - 128) / 128)
    assert len(calls) == 9
    ours = inception(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32
    assert expected.std() > 1e-3 and (expected[0] - expected[1]).norm() > 1e-3 * expected.norm()   # the weights do carry a signal
    assert (ours - expected).norm() / expected.norm() < 1e-5


# --- weights ---------------------------------------------------------------------------------------------------------------------


def test_unknown_weights_are_used_when_given_and_recorded(inception, weights_file):
    assert inception.weights_verified is False
    assert inception.weights_sha256 == features_module.sha256(weights_file)


def test_the_published_hash_is_verified(random_state, tmp_path, monkeypatch, recwarn):
    """Also: a converter's file without the batch counters (472 entries) is accepted, from the torch hub cache."""
    state = {key: value for key, value in random_state.items() if not key.endswith("num_batches_tracked")}
    assert len(state) == 472
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / features_module.INCEPTION_FILE
    path.parent.mkdir()
    torch.save(state, path)
    with pytest.raises(UserError, match="damaged"):
        load_extractor("inception")
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", features_module.sha256(path))
    extractor = load_extractor("inception")
    assert extractor.weights_verified is True and not [w for w in recwarn if "Inception" in str(w.message)]
    assert torch.equal(extractor.network.Mixed_7c.branch1x1.conv.weight, state["Mixed_7c.branch1x1.conv.weight"])


def test_weights_out_of_reach_are_said_in_one_line(tmp_path, monkeypatch):
    def unreachable(url, path, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as error:
        load_extractor("inception")
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in (features_module.INCEPTION_FILE, features_module.INCEPTION_SHA256, features_module.INCEPTION_URL, str(tmp_path)):
        assert part in sentence


@pytest.mark.filterwarnings("ignore:.*not the published Inception")
def test_weights_of_another_network_are_refused(random_state, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({**random_state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(UserError, match=r"1 entries differ, for example fc.weight is \(1000, 2048\), expected \(1008, 2048\)"):
        load_extractor("inception", weights=path)
    torch.save(torch.nn.Linear(2, 2), path)                                       # a pickled module is not unpickled
    with pytest.raises(UserError, match="weights_only"):
        load_extractor("inception", weights=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="weights_only"):
        load_extractor("inception", weights=path)
    with pytest.raises(UserError, match="not found"):
        load_extractor("inception", weights=tmp_path / "none.pth")
    with pytest.raises(UserError, match="expected 'inception' or"):
        load_extractor("dino")


def test_precision_is_full_inside_and_restored_after():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        seen = []

        class Probe(torch.nn.Module):
            def forward(self, x):
                seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                             (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
                return x.flatten(1)

        extractor = Extractor(Probe(), torch.device("cpu"), "probe", "fd_probe", "Frechet distance (probe)", "", None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            extractor(torch.zeros(2, 3, 1, 1, dtype=torch.uint8))
            assert torch.is_autocast_enabled("cpu")
        assert seen == [("highest", False, torch.float32)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            _ = 1 / 0
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- features of a timm folder ---------------------------------------------------------------------------------------------------


def write_timm_folder(folder, num_classes, seed=0):
    """A tiny ViT in timm's own form: 16 pixels, width 24."""
    torch.manual_seed(seed)
    architecture = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=num_classes)
    model = timm.create_model("vit_tiny_patch16_224", **architecture).eval()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": num_classes, "model_args": architecture,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "num_classes": num_classes,
                           "classifier": "head", "first_conv": "patch_embed.proj"}}))
    return model


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_features_are_those_before_the_classifier(tmp_path, num_classes):
    model = write_timm_folder(tmp_path / "tiny", num_classes)
    extractor = load_extractor(f"local-dir:{tmp_path / 'tiny'}")
    assert (extractor.name, extractor.key, extractor.weights_verified) == ("tiny", "fd_tiny", None)
    assert extractor.weights_sha256 == features_module.sha256(tmp_path / "tiny" / "model.safetensors")
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for side in (16, 24):
        images = torch.from_numpy(random_images(3, side, side)).permute(0, 3, 1, 2)
        x = images / 255 if side == 16 else F.interpolate(images / 255, 16, mode="bilinear", align_corners=False, antialias=False)
        with torch.inference_mode():
            expected = model.forward_features((x - mean) / std)[:, 0]             # the ViT's class token
        ours = extractor(images)
        assert ours.shape == (3, 24) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_that_is_no_timm_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json and model.safetensors"):
        load_extractor(f"local-dir:{tmp_path}")
    write_timm_folder(tmp_path / "tiny", 5)
    with pytest.raises(UserError, match="give one of the two"):
        load_extractor(f"local-dir:{tmp_path / 'tiny'}", weights="file.pth")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="timm cannot build"):
        load_extractor(f"local-dir:{tmp_path / 'tiny'}")


# --- reading and evaluating ------------------------------------------------------------------------------------------------------


class MeanColours(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def colours():
    """Three features per image, so that few images suffice and the answer is plain numpy."""
    return Extractor(MeanColours(), torch.device("cpu"), "colours", "fd_colours", "Frechet distance (colours)", "0", None)


def colour_statistics(images):
    rows = images.astype(np.float64).mean(axis=(1, 2))
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_npz_is_read_in_order_with_an_odd_last_batch_and_unknown_keys(tmp_path, colours, save, batch_size):
    images = random_images(11, 12, 20)
    save(tmp_path / "a.npz", images, labels=np.arange(11), mu_s=np.zeros(2))
    rows, size = extract(open_images(tmp_path / "a.npz", "samples"), colours, batch_size)
    np.testing.assert_allclose(rows, images.mean(axis=(1, 2)), rtol=1e-5)
    assert size == (12, 20)


def test_npz_is_streamed(tmp_path, monkeypatch):
    """No read is longer than one image."""
    images = random_images(50)
    np.savez(tmp_path / "a.npz", images)
    lengths, read = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: lengths.append(n) or read(self, n))
    assert np.array_equal(np.stack(list(open_images(tmp_path / "a.npz", "samples").images())), images)
    assert len(lengths) >= 50 and min(lengths) > 0 and max(lengths) <= images[0].size


def test_evaluate_equals_the_closed_form_from_npz_folder_and_memory(tmp_path, colours):
    a, b = random_images(9, seed=1), random_images(12, 8, 8, seed=2)
    np.savez(tmp_path / "a.npz", a)
    for i, image in enumerate(a):                                                 # two levels, sorted by path
        folder = tmp_path / "a" / f"{i // 4:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"img{i:08d}.png")
    expected = frechet_distance(*colour_statistics(a), *colour_statistics(b))
    assert expected > 1
    for sample in (tmp_path / "a.npz", str(tmp_path / "a"), a, iter(a), (batch for batch in (a[:4], a[4:]))):
        result = evaluate([b], sample, colours, batch_size=5)
        assert result["fd_colours"] == pytest.approx(expected, rel=1e-5)
        assert (result["num_samples"], result["num_reference"]) == (9, 12)
        assert (result["image_size"], result["reference_image_size"]) == ([16, 16], [8, 8])
    folder, npz = (extract(open_images(tmp_path / name, "samples"), colours, 5)[0] for name in ("a", "a.npz"))
    assert np.array_equal(folder, npz)
    assert np.array_equal(npz, extract(open_images(iter(a), "samples"), colours, 5)[0])


def test_too_few_images_for_a_full_covariance_warn_once(colours, recwarn):
    evaluate(random_images(4), random_images(4), colours)
    assert not recwarn
    evaluate(random_images(3), random_images(2), colours)
    assert len(recwarn) == 1 and "2 samples and 3 reference images are fewer" in str(recwarn[0].message)


def bad_npz(tmp_path):
    """(file, part of the sentence)"""
    good = random_images(4)
    cases = {
        "no arr_0": (dict(images=good), "has no arr_0 but images"),
        "float": (dict(arr_0=good.astype(np.float32)), "float32"),
        "NCHW": (dict(arr_0=good.transpose(0, 3, 1, 2).copy()), r"\(4, 3, 16, 16\)"),
        "transposed": (dict(arr_0=np.asfortranarray(good)), "Fortran"),
        "one": (dict(arr_0=good[:1]), "at least 2"),
        "mu alone": (dict(arr_0=good, mu=np.zeros(2048)), "mu but no sigma"),
        "small mu": (dict(arr_0=good, mu=np.zeros(3), sigma=np.eye(3)), r"\(2048,\)"),
        "objects": (dict(arr_0=np.array([None, 1])), "object"),
    }
    for name, (arrays, sentence) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        yield tmp_path / f"{name}.npz", sentence
    (tmp_path / "text.npz").write_text("text")
    yield tmp_path / "text.npz", "not a readable npz"
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no header")
    yield tmp_path / "header.npz", "not a readable npz"
    yield tmp_path / "none.npz", "not found"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "0 images"


def test_what_is_no_set_of_images_is_refused_in_one_line(tmp_path, colours):
    for path, sentence in bad_npz(tmp_path):
        with pytest.raises(UserError, match=sentence) as error:
            evaluate(random_images(4), path, colours)
        assert "\n" not in str(error.value) and (path.name in str(error.value))


def test_a_cut_npz_is_refused(tmp_path, colours):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, random_images(6))
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    with pytest.raises(UserError, match="ends within image 5 of 6"):
        evaluate(random_images(4), tmp_path / "cut.npz", colours)


def test_images_that_do_not_fit_are_refused(tmp_path, colours):
    with pytest.raises(UserError, match="expected one size"):
        evaluate(random_images(4), [random_images(4), random_images(4, 8, 8)], colours)
    with pytest.raises(UserError, match="expected uint8"):
        evaluate(random_images(4), [random_images(4) / 255], colours)
    with pytest.raises(UserError, match=r"\(16, 16, 4\)"):
        evaluate(random_images(4), [np.zeros((16, 16, 4), np.uint8)], colours)
    with pytest.raises(UserError, match="the reference batch holds 1 images"):
        evaluate(random_images(1), random_images(4), colours)
    for i, mode in enumerate(["RGB", "L", "RGBA"]):
        Image.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="2.png has mode RGBA"):
        evaluate(random_images(4), tmp_path, colours)
    Image.new("RGB", (8, 9)).save(tmp_path / "2.png")
    with pytest.raises(UserError, match="2.png is 8 x 9 pixels"):
        evaluate(random_images(4), tmp_path, colours)
    Image.fromarray(random_images(1)[0]).save(tmp_path / "2.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:400])
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="2.png is not a readable image"):
        evaluate(random_images(4), tmp_path, colours)


def diagonal_statistics(mean, deviation):
    """As if Inception had 8 features: the algebra of 2048 takes most of a minute on a busy machine and shows nothing more."""
    return dict(mu=np.full(8, mean, np.float32), sigma=deviation**2 * np.eye(8))


def test_statistics_in_the_file_are_used_not_recomputed(tmp_path, colours, monkeypatch):
    def never(images):
        raise AssertionError("the network was called")

    monkeypatch.setattr(Inception, "features", 8)
    still = Extractor(never, torch.device("cpu"), "inception", "fid", "FID", "", False)
    held = random_images(5)
    np.savez(tmp_path / "ref.npz", held, **diagonal_statistics(0, 1), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    np.savez(tmp_path / "sample.npz", **diagonal_statistics(2, 3))
    result = evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz", still)
    assert result["fid"] == pytest.approx(8 * (2**2 + (3 - 1) ** 2), rel=1e-9)
    assert (result["num_samples"], result["num_reference"], result["image_size"]) == (None, 5, None)
    assert result["sample_statistics_from_file"] and result["reference_statistics_from_file"]
    # They are Inception's: other features come from the images, and a file without images is of no use to them.
    images = random_images(4, seed=1)
    result = evaluate(tmp_path / "ref.npz", images, colours)
    assert result["fd_colours"] == pytest.approx(frechet_distance(*colour_statistics(images), *colour_statistics(held)), rel=1e-5)
    assert not result["reference_statistics_from_file"]
    with pytest.raises(UserError, match="needs images"):
        evaluate(tmp_path / "sample.npz", images, colours)


# --- the program -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path):
    np.savez(tmp_path / "ref.npz", random_images(30, seed=1))
    (tmp_path / "made").mkdir()
    np.savez(tmp_path / "made" / "sample.npz", random_images(28, seed=2))
    return tmp_path / "ref.npz", tmp_path / "made" / "sample.npz"


def test_program_with_other_features_never_says_fid(two_sets, tmp_path, capsys):
    ref, sample = two_sets
    write_timm_folder(tmp_path / "inception", 5)                                  # the name alone makes it no Inception
    settings = {"cfg_scale": 2.3, "checkpoint_sha256": "abc"}
    (sample.parent / "settings.json").write_text(json.dumps(settings))
    output = tmp_path / "deep" / "metrics.json"
    main(["--ref-batch", str(ref), "--sample-batch", str(sample), "--features", f"local-dir:{tmp_path / 'inception'}",
          "--device", "cpu", "--output", str(output)])
    printed, result = capsys.readouterr(), json.loads(output.read_text())
    assert printed.out == f"Frechet distance (inception): {result['fd_inception']}\n"
    assert "fid" not in printed.out.lower() and not [key for key in result if "fid" in key.lower()]
    assert result["fd_inception"] > 0 and result["settings"] == settings
    assert (result["num_samples"], result["num_reference"], result["image_size"]) == (28, 30, [16, 16])
    assert (result["features"], result["weights_verified"], result["device"]) == ("inception", None, "cpu")
    assert len(result["weights_sha256"]) == 64 and result["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]   # no temporary file is left


def test_program_with_inception_takes_regs_spellings(tmp_path, weights_file, capsys, monkeypatch):
    np.savez(tmp_path / "ref.npz", **diagonal_statistics(0, 1))
    np.savez(tmp_path / "sample.npz", **diagonal_statistics(1, 1))
    with pytest.warns(UserWarning, match="not the published Inception"), monkeypatch.context() as patch:
        patch.setattr(Inception, "features", 8)
        main(["--ref_batch", str(tmp_path / "ref.npz"), "--sample_batch", str(tmp_path / "sample.npz"), "--device", "cpu",
              "--inception-weights", str(weights_file), "--save_path", str(tmp_path)])
    result = json.loads((tmp_path / "metrics.json").read_text())                  # an existing folder gets metrics.json
    assert capsys.readouterr().out == f"FID: {result['fid']}\n"
    assert result["fid"] == pytest.approx(8) and result["weights_verified"] is False and "settings" not in result


def test_images_are_scored_with_inceptions_features(inception, monkeypatch):
    rows, taken = [], []
    hook = inception.network.register_forward_hook(lambda network, images, output: rows.append(output.double().numpy()))
    monkeypatch.setattr("evaluations.evaluator.frechet_distance", lambda *statistics: taken.extend(statistics) or 1.0)
    with pytest.warns(UserWarning, match="3 samples and 2 reference images are fewer than inception's 2048"):
        result = evaluate(random_images(2, 32, 32, seed=1), random_images(3, 32, 32, seed=2), inception, batch_size=2)
    hook.remove()
    assert result["fid"] == 1.0 and result["features"] == "inception" and result["weights_verified"] is False
    assert [len(batch) for batch in rows] == [2, 1, 2]
    for mean, covariance, expected in ((*taken[:2], np.concatenate(rows[:2])), (*taken[2:], rows[2])):
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change, sentence", [
    (("--sample-batch", "none.npz"), "none.npz not found"),
    (("--ref-batch", "none.npz"), "none.npz not found"),
    (("--device", "gpu"), "expected cpu, cuda or cuda:N"),
    (("--batch-size", "0"), "expected at least 1"),
    (("--features", "dino"), "expected 'inception' or"),
    (("--output", "{ref}/below/metrics.json"), "cannot be written"),
])
def test_program_ends_with_one_sentence_and_status_2(two_sets, tmp_path, capsys, change, sentence):
    ref, sample = two_sets
    write_timm_folder(tmp_path / "tiny", 0)
    arguments = {"--ref-batch": ref, "--sample-batch": sample, "--features": f"local-dir:{tmp_path / 'tiny'}", "--device": "cpu"}
    arguments[change[0]] = change[1].format(ref=ref)
    with pytest.raises(SystemExit) as end:
        main([str(part) for pair in arguments.items() for part in pair])
    error = capsys.readouterr().err
    assert end.value.code == 2 and sentence in error and error.startswith("error: ") and error.count("\n") == 1


def test_settings_that_are_no_json_are_said_before_scoring(two_sets, capsys):
    ref, sample = two_sets
    (sample.parent / "settings.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["--ref-batch", str(ref), "--sample-batch", str(sample), "--device", "cpu"])
    assert "settings.json is not JSON" in capsys.readouterr().err
