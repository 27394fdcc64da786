"""FDr6: its six networks, their preprocessing and pooling, the mean, and references with statistics of all of them.

The architectures are timm's real ones, cut to one block (the trunk's width, patch, padding and pooling stay).
"""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluations.evaluator import lines, open_networks, write_reference
from evaluations.features import Extractor, FdNetwork, load_extractor
from evaluations.images import open_images
from evaluations.metrics import frechet_distance, gaussian_statistics
from evaluations.networks import FDR6, OTHERS
from evaluations.scoring import evaluate
from runtime.messages import UserError
from tests import scoring_networks
from tests.conftest import random_images
from tests.forks import two_ranks
from tests.scoring_networks import CPU, channels_first

small = scoring_networks.small  # fixture
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Input size, what the trunk sees of it after padding, width, mean and std: facts of the published statistics.
FACTS = {"convnext-224": (224, 224, 1024, *IMAGENET), "dinov2-256": (256, 266, 1024, *IMAGENET),
         "mae-224": (224, 224, 1024, *IMAGENET), "siglip-224": (224, 224, 1152, *HALF),
         "clip-256": (256, 266, 1024, *CLIP)}
CONSTANTS = {"inception": 1.68, "convnext-224": 56.87, "dinov2-256": 14.19, "mae-224": 0.04, "siglip-224": 0.60,
             "clip-256": 5.60}


def shallow(name):
    """timm's model of a row, with random weights and one block (per stage)."""
    row = OTHERS[name]
    depth = {"depth": 1} if row.settings else {"depths": (1, 1, 1, 1)}
    torch.manual_seed(0)
    return timm.create_model(row.timm_name, num_classes=0, **row.settings, **depth).eval()


@pytest.fixture(scope="module", params=OTHERS)
def network(request):
    return request.param, FdNetwork(request.param, shallow(request.param)).requires_grad_(False)


def first_convolution(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))


@pytest.mark.parametrize("height, width", [(256, 256), (300, 200)])
def test_pixels_are_resized_as_pil_does_and_normalised(network, height, width):
    """The oracle resizes each colour as float, since PIL rounds images of bytes twice; padding is below and right."""
    name, network = network
    size, padded, _, mean, std = FACTS[name]
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = np.stack([np.sin(y / 3 + x / 5), np.sin(y / 11) * np.sin(x / 2), np.sin(x * y / 400)], axis=2)
    image, seen = (127.5 + 127 * waves).astype(np.uint8), []                      # (H, W, 3)
    hook = first_convolution(network.model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(channels_first(image[None]))
    hook.remove()
    colours = (Image.fromarray(image[..., i].astype(np.float32)) for i in range(3))
    resized = np.stack([np.array(colour.resize((size, size), Image.Resampling.BICUBIC)) for colour in colours], axis=2)
    expected = (resized - 255 * np.array(mean)) / (255 * np.array(std))
    found = seen[0][0].permute(1, 2, 0).numpy()
    assert found.shape == (padded, padded, 3) and not found[size:].any() and not found[:, size:].any()
    np.testing.assert_allclose(found[:size, :size], expected, rtol=0, atol=2e-4)


def test_pooled_features_are_class_token_attention_pool_or_mean(network):
    name, network = network
    seen = []
    hook = first_convolution(network.model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pooled = network(channels_first(random_images(2, 256, 256)))
    hook.remove()
    size, _, width, *_ = FACTS[name]
    tokens = network.model.forward_features(seen[0][:, :, :size, :size])
    if name == "siglip-224":
        expected = network.model.attn_pool(tokens)
    else:
        expected = tokens.mean(dim=(2, 3)) if name == "convnext-224" else tokens[:, 0]
    assert pooled.shape == (2, width) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_vision_transformers_compute_in_bfloat16_on_a_gpu(network, monkeypatch):
    """On PyTorch's fake tensors, which have a device and a dtype but no numbers."""
    (name, network), seen = network, set()
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: seen.add((output.dtype, output.device.type)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, images = network.to_empty(device="cuda"), torch.zeros(2, 3, 256, 256, dtype=torch.uint8, device="cuda")
        # Without a GPU autocast disables itself; and the mode above would open one if it were made after this.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        network(images)
    assert seen == {(torch.float32 if name == "convnext-224" else torch.bfloat16, "cuda")}


def test_constants_are_the_published_ones():
    assert {name: row.constant for name, row in FDR6.items()} == CONSTANTS


def test_networks_are_loaded_by_name_and_those_that_are_not_here_are_named(monkeypatch, capsys):
    """As timm builds it, or as the hub's client fails without a network."""
    model, asked, here = shallow("mae-224"), {}, {"vit_large_patch16_224.mae"}

    def create(name, pretrained, **settings):
        if name not in here:
            raise OSError("offline")
        asked[name] = (pretrained, settings)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    (extractor,) = open_networks(CPU)
    assert asked == {"vit_large_patch16_224.mae": (True, {"num_classes": 0, "dynamic_img_size": True})}
    assert (extractor.key, extractor.name, len(extractor.weights_sha256)) == ("fd_mae-224", "mae-224", 64)
    assert extractor.widths == (1024, 0) and not extractor.network.training
    printed = capsys.readouterr().err
    for name, row in OTHERS.items():
        assert (f"{name}: weights of {row.timm_name} not in the hub's cache" in printed) == (name != "mae-224")
    with pytest.raises(UserError, match="mae-225.*clip-256"):
        load_extractor("mae-225")


# ---- the mean --------------------------------------------------------------------------------------------------------

class Colours(torch.nn.Module):
    """In a network's place: the mean colours, times a factor; counts its images."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.images = factor, 0

    def forward(self, images):
        self.images += len(images)
        return self.factor * images.float().mean(dim=(2, 3))


@pytest.fixture
def five():
    return [Extractor(Colours(i + 1), CPU, name, str(i), None) for i, name in enumerate(OTHERS)]


def colour_statistics(images, factor):
    return gaussian_statistics(factor * images.astype(np.float64).mean(axis=(1, 2)))


def test_fdr6_is_the_mean_of_six_distances_over_constants(small, five):
    ref, sample = random_images(20), random_images(15, seed=1)
    result = evaluate(ref, sample, small, ["fid", "fdr6"], open_networks=lambda: five)
    distances = {"inception": evaluate(ref, sample, small, ["fid"])["fid"]}
    for i, name in enumerate(OTHERS):
        distances[name] = frechet_distance(*colour_statistics(sample, i + 1), *colour_statistics(ref, i + 1))
        assert result[f"fd_{name}"] == pytest.approx(distances[name], rel=1e-5)
    assert result["fid"] == distances["inception"]
    mean = sum(distances[name] / constant for name, constant in CONSTANTS.items()) / 6
    assert result["fdr6"] == pytest.approx(mean, rel=1e-5)
    assert result["fdr6_weights"] == {name: str(i) for i, name in enumerate(OTHERS)}
    assert f"FDr6: {result['fdr6']}" in lines(result, small)
    assert f"Frechet distance (mae-224): {result['fd_mae-224']}" in lines(result, small)


def test_one_decoding_serves_all_networks(small, five):
    images, read = random_images(15, seed=1), []
    sample = open_images(images)
    object.__setattr__(sample, "blocks", lambda ranges: (read.append(r) or images[r.start:r.stop] for r in ranges))
    before = [one.widths and one.network.images for one in five]
    evaluate(random_images(20), sample, small, ["fdr6", "mind"], batch_size=8, open_networks=lambda: five)
    assert read == [range(8), range(8, 15)]
    assert [one.network.images - count for one, count in zip(five, before, strict=True)] == [35] * 5


def test_without_one_network_it_is_named_and_there_is_no_mean(small, five, capsys):
    result = evaluate(random_images(20), random_images(15, seed=1), small, ["fdr6"], open_networks=lambda: five[1:])
    assert "fdr6" not in result and "fd_convnext-224" not in result and {"fid", "fd_clip-256"} <= result.keys()
    assert "convnext-224" in capsys.readouterr().err and "convnext-224" in result["modes"]["fdr6"]
    assert not [line for line in lines(result, small) if line.startswith("FDr6")]


def evaluate_on_rank(rank, path, networks, inception):
    """Rank 0 lacks the first network's weights; the other has them, and leaves it out too."""
    here = {OTHERS[name].timm_name: shallow(name) for name in ("convnext-224", "mae-224")[1 - rank:]}

    def create(name, **settings):
        if name not in here:
            raise OSError("offline")
        return here[name]

    torch.distributed.init_process_group("gloo")
    timm.create_model = create                                    # of this process, which is forked
    assert [one.name for one in open_networks(CPU)] == ["mae-224"]
    result = evaluate(random_images(13), random_images(11, seed=1), inception, ["fdr6", "precision", "mind"],
                      batch_size=4, open_networks=lambda: networks)
    assert (result is None) == (rank == 1)
    if rank == 0:
        path.write_text(json.dumps(result))


def test_two_processes_give_the_same_six_distances(small, five, tmp_path):
    """Blocks of four, of which the last round has one: rows of all networks are exchanged together."""
    two_ranks(evaluate_on_rank, tmp_path / "two.json", five, small)
    one = evaluate(random_images(13), random_images(11, seed=1), small, ["fdr6", "precision", "mind"], batch_size=4,
                   open_networks=lambda: five)
    assert json.loads((tmp_path / "two.json").read_text()) == one


# ---- references ------------------------------------------------------------------------------------------------------

def test_a_file_of_stats_holds_all_networks(small, five, tmp_path):
    """Without its images it gives FDr6, and in one network's features the distance and MIND."""
    images, sample, path = random_images(20), random_images(15, seed=1), tmp_path / "own.npz"
    write_reference(path, open_images(images), small, 8, 12, 0, {"images": 20}, five, with_images=False)
    with np.load(path) as file:
        assert {"mu_mae-224", "sigma_mae-224", "pooled_mae-224", "pooled"} < set(file.files) and "arr_0" not in file
    own, plain = (evaluate(ref, sample, small, ["fdr6", "fid"], open_networks=lambda: five) for ref in (path, images))
    assert all(own[key] == pytest.approx(plain[key], rel=1e-9) for key in ("fdr6", "fid", "fd_siglip-224"))
    alone = evaluate(path, sample, five[2], ["fd", "mind"])
    assert alone["fd_mae-224"] == own["fd_mae-224"] and alone["mind_mae-224"] > 0
    other = Extractor(Colours(1), CPU, "mae-224", "other", None)
    with pytest.raises(UserError, match="other mae-224 weights"):
        evaluate(path, sample, other, ["fd"])


def published(folder, but=()):
    """The published files by their names, with the colours' statistics of random images."""
    folder.mkdir()
    for i, (name, row) in enumerate(OTHERS.items()):
        if name not in but:
            mu, sigma = colour_statistics(random_images(20), i + 1)
            np.savez(folder / row.file, mu=mu, sigma=sigma)
    if "inception" not in but:
        np.savez(folder / "guided_diffusion_stats.npz", mu=np.zeros(6), sigma=np.eye(6))
    return folder


def test_a_folder_of_the_published_files_is_a_reference(small, five, tmp_path):
    assert {row.file for row in FDR6.values()} == {
        "guided_diffusion_stats.npz", "convnext_in256_t224_stats.npz",
        "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz", "vit_large_patch16_224_mae_in256_t224_stats.npz",
        "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz",
        "vit_large_patch14_clip_224_openai_in256_t256_stats.npz"}
    sample = random_images(15, seed=1)
    np.savez(tmp_path / "adm.npz", random_images(9), mu=np.ones(6), sigma=np.eye(6))
    refs = [tmp_path / "adm.npz", published(tmp_path / "fdr6")]
    result = evaluate(refs, sample, small, ["fid", "fdr6", "precision"], open_networks=lambda: five)
    plain = evaluate(random_images(20), sample, small, ["fdr6"], open_networks=lambda: five)
    first, second = result["references"]
    assert "fdr6" not in first and "fdr6" not in result and "precision" in first and "precision" not in second
    assert all(second[f"fd_{name}"] == pytest.approx(plain[f"fd_{name}"], rel=1e-6) for name in OTHERS)
    assert second["fid"] == pytest.approx(frechet_distance(
        *gaussian_statistics(small(channels_first(sample))[0]), torch.zeros(6), torch.eye(6)), rel=1e-4)


def test_without_one_published_file_it_is_named_and_there_is_no_mean(small, five, tmp_path, capsys):
    """The sample's file may lack another one."""
    whole, ref = published(tmp_path / "whole"), published(tmp_path / "ref", but=["mae-224"])
    sample = published(tmp_path / "sample", but=["clip-256"])
    full = evaluate(whole, random_images(15), small, ["fdr6"], open_networks=lambda: five)
    capsys.readouterr()
    several = evaluate([ref, whole], random_images(15), small, ["fdr6"], open_networks=lambda: five)
    lacking, other = several["references"]
    keys = {"fid", *(f"fd_{name}" for name in OTHERS)}
    assert {key: lacking[key] for key in keys & lacking.keys()} == {key: full[key] for key in keys - {"fd_mae-224"}}
    assert "fdr6" not in lacking and other["fdr6"] == full["fdr6"]
    assert "mae-224 (vit_large_patch16_224_mae_in256_t224_stats.npz)" in capsys.readouterr().err
    both = evaluate(ref, sample, small, ["fdr6"], open_networks=lambda: five)
    assert keys & both.keys() == keys - {"fd_mae-224", "fd_clip-256"}


@pytest.mark.parametrize("make, word", [
    (lambda place: published(place / "fdr6", but=["inception"]), "inception.*guided_diffusion_stats.npz.*out fdr6"),
    (lambda place: published(place / "fdr6", but=OTHERS), "fdr6: holds no statistics of convnext-224, dinov2-256"),
    (lambda place: np.savez(place / "adm.npz", random_images(9), mu=np.zeros(6), sigma=np.eye(6)) or place / "adm.npz",
     "adm.npz: holds no statistics of convnext-224, dinov2-256"),
])
def test_a_reference_without_statistics_of_a_network_is_refused_before_the_networks_are_loaded(
        small, tmp_path, make, word):
    def never():
        raise AssertionError("loaded")

    with pytest.raises(UserError, match=word):
        evaluate(make(tmp_path), random_images(15), small, ["fdr6"], open_networks=never)


@pytest.mark.parametrize("change, word", [
    *(({f"pooled{suffix}": bad}, f"pooled{suffix} is {kind}") for suffix in ("", "_mae-224") for bad, kind in (
        (np.zeros(6, np.float32), "float32"), (np.zeros((9, 5), np.float32), "float32"),
        (np.zeros((9, 6), int), "int64"), (np.full((9, 6), "a"), "<U1"), (np.zeros((1, 6), np.float32), "float32"),
        (np.zeros((0, 6), np.float32), "float32"), (np.full((9, 6), np.nan), "float32"),
        (np.zeros((9, 6, 1), np.float32), "float32"))),
    *(({"about": json.dumps({"more": more})}, "about is not a JSON object of stats") for more in (
        [{"features": "mae-224"}], [{"distance": "fd_mae-224"}], [{"features": "mae-224", "distance": ["fd_mae-224"]}],
        [{"features": ["mae-224"], "distance": "fd_mae-224"}], [{"features": 1, "distance": 2}],
        [{"features": "mae-224", "distance": "fd_mae-224", "images": "9"}], ["mae-224"], 7)),
    *(({"about": json.dumps(about)}, "about is not a JSON object of stats") for about in (
        {"distance": ["fid"]}, {"images": "many"})),
    ({"about": json.dumps({"more": [{"features": "a\nb", "distance": "fd_a"}]})}, r"mu_a\\nb missing"),
])
def test_feature_rows_and_records_of_another_form_are_refused_in_one_line(tmp_path, change, word):
    six = {"mu": np.zeros(6), "sigma": np.eye(6), "pooled": np.zeros((9, 6), np.float32)}
    more = json.dumps({"more": [{"features": "mae-224", "distance": "fd_mae-224"}]})
    arrays = six | {f"{name}_mae-224": array for name, array in six.items()} | {"about": more}
    np.savez(tmp_path / "ref.npz", **arrays)
    assert open_images(tmp_path / "ref.npz").more[0].pooled.shape == (9, 6)
    np.savez(tmp_path / "ref.npz", **arrays | change)
    with pytest.raises(UserError, match=f"ref.npz: {word}") as error:
        open_images(tmp_path / "ref.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4"])
def test_feature_rows_of_any_float_are_read(small, tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float16)
    for name, kind in (("own", np.float32), ("other", dtype)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(6), sigma=np.eye(6), pooled=rows.astype(kind))
    metrics = ["precision", "kid", "mind"]
    own, other = (evaluate(tmp_path / f"{name}.npz", random_images(9), small, metrics) for name in ("own", "other"))
    assert own == other and own["mind"] > 0
    samples = evaluate(random_images(9), tmp_path / "other.npz", small, ["inception_score"])
    assert samples["inception_score"] > 1 and samples["num_samples"] == 9


def test_fdr6_is_a_score_of_inceptions_features(five):
    with pytest.raises(UserError, match="--metrics fdr6: unknown in mae-224 features"):
        evaluate(random_images(9), random_images(9), five[2], ["fdr6"])
