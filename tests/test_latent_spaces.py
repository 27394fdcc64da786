"""Latent spaces with one mean and std per channel, and the VAEs by name: diffusers' classes with random weights."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import generate
import train
from models.vae import VAES, LatentSpace, ldm_name, load_codec, read_space
from preprocessing import dataset_tools
from runtime.messages import UserError
from tests.test_files_of_others import FIRED, as_npz, as_pickle, as_zip

ROOT = Path(__file__).parents[1]
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.25, 0.75]
SIZES = dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
             up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4)
ATTENDING = dict(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                 up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"))


def images_of(count=2, side=32):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(kind, folder, **settings):
    import diffusers

    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**settings).eval()
    if kind == "AutoencoderKLFlux2":
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
        vae.bn.running_var.copy_(torch.linspace(0.25, 4, 16))
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One VAE of each kind, by its kind."""
    place = tmp_path_factory.mktemp("vaes")
    saved("AutoencoderKL", place / "scalar", **SIZES, scaling_factor=0.5, shift_factor=0.1)
    saved("AutoencoderKL", place / "channels", **SIZES, scaling_factor=0.5, shift_factor=0.1, latents_mean=MEAN,
          latents_std=STD)
    saved("AutoencoderKLFlux2", place / "flux2", **SIZES, sample_size=32)
    saved("AutoencoderRAE", place / "rae", encoder_hidden_size=64, encoder_patch_size=4, encoder_num_hidden_layers=1,
          encoder_input_size=16, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
          decoder_num_attention_heads=2, decoder_intermediate_size=64, latents_mean=None)
    vae = saved("AutoencoderKL", place / "plain", **SIZES | ATTENDING)
    (place / "ldm").mkdir()
    weights = {ldm_name(name, 2): one for name, one in vae.state_dict().items()}
    convolved = {name: one[..., None, None] if ".attn" in name and one.ndim == 2 else one
                 for name, one in weights.items()}
    torch.save({"state_dict": {**convolved, "loss.logvar": torch.zeros(())}}, place / "ldm" / "vavae.pt")
    statistics = {"mean": torch.tensor(MEAN).view(1, 4, 1, 1), "std": torch.tensor(STD).view(1, 4, 1, 1)}
    torch.save(statistics, place / "ldm" / "latents_stats.pt")
    return place


def raw_of(codec, images):
    """Raw latents without noise, the pixels that the network makes of them, and the latents that a pipeline has."""
    vae, x = codec.vae, images / 127.5 - 1
    if type(vae).__name__ == "AutoencoderRAE":
        latents = vae.encode(images / 255).latent
        return 255 * vae.decode(latents).sample, latents
    raw = vae.encode(x).latent_dist.mean
    pixels = 127.5 * vae.decode(raw).sample + 127.5
    if type(vae).__name__ == "AutoencoderKLFlux2":                # as its pipeline has it
        count, channels, height, width = raw.shape
        raw = raw.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        raw = raw.reshape(count, channels * 4, height // 2, width // 2)
        mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return pixels, (raw - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    if codec.space.vae.endswith("scalar"):
        return pixels, (raw - 0.1) * 0.5
    return pixels, (raw - torch.tensor(MEAN).view(1, -1, 1, 1)) / torch.tensor(STD).view(1, -1, 1, 1)


# --------------------------------------------------------------------------------------------------------- the numbers

@pytest.mark.parametrize("kind, channels, factor", [("scalar", 4, 2), ("channels", 4, 2), ("flux2", 16, 4),
                                                    ("ldm", 4, 2), ("rae", 64, 8)])
def test_every_kind_normalises_as_published_and_decodes_the_raw_latents(folders, kind, channels, factor):
    codec, images = load_codec(str(folders / kind)), images_of()
    assert (codec.space.channels, codec.space.downsampling) == (channels, factor)
    moments = codec.encode(images)
    assert moments.shape == (2, 2 * channels, 32 // factor, 32 // factor) and moments.dtype == torch.float32
    latents = codec.space.latents(moments, torch.zeros_like(moments[:, :channels]))
    pixels, expected = raw_of(codec, images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    decoded, wanted = codec.decode(latents).float(), pixels.clamp(0, 255).floor()
    assert decoded.shape == (2, 3, 32, 32) and wanted.std() > 1
    assert (decoded - wanted).abs().max() <= 1 and (decoded != wanted).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["channels", "flux2"])
def test_noise_is_scaled_by_its_channel(folders, kind):
    """Moments are mean, then std, of the folded channels: noise 1 moves the latents by posterior std / std."""
    codec = load_codec(str(folders / kind))
    moments = codec.encode(images_of())
    mean, std = moments.chunk(2, dim=1)
    moved = codec.space.latents(moments, torch.ones_like(mean)) - codec.space.latents(moments, torch.zeros_like(mean))
    torch.testing.assert_close(moved, std * torch.tensor(codec.space.scale).view(1, -1, 1, 1), rtol=1e-3, atol=1e-5)


def test_flux2_folds_rows_before_columns(folders):
    """Folded channel = 4c + 2 row + column: element by element."""
    codec, images = load_codec(str(folders / "flux2")), images_of(1)
    mean = codec.encode(images)[0, :16]                           # (16, 8, 8)
    plain = codec.vae.encode(images / 127.5 - 1).latent_dist.mean[0]              # (4, 16, 16)
    for c, row, column, i, j in ((0, 0, 0, 0, 0), (1, 0, 1, 3, 5), (2, 1, 0, 7, 2), (3, 1, 1, 4, 6)):
        assert mean[4 * c + 2 * row + column, i, j] == plain[c, 2 * i + row, 2 * j + column]


def test_one_number_computes_todays_bits():
    """Also where it is given per channel."""
    draw = torch.Generator().manual_seed(0)
    moments, noise = torch.rand(3, 8, 5, 5, generator=draw), torch.randn(3, 4, 5, 5, generator=draw)
    mean, std = moments.chunk(2, dim=1)
    expected = (mean + std * noise - 0.0609) * 0.18215
    assert torch.equal(LatentSpace(scale=0.18215, shift=0.0609).latents(moments, noise), expected)
    each = LatentSpace(scale=(0.18215,) * 4, shift=(0.0609,) * 4)
    assert torch.equal(each.latents(moments, noise), expected)


def test_statistics_of_the_config_replace_its_scalars(folders):
    space = load_codec(str(folders / "channels")).space
    assert space.scale == tuple(1 / std for std in STD) and space.shift == tuple(MEAN)


# -------------------------------------------------------------------------------------------------------------- records

def test_a_scalar_space_is_recorded_as_before_and_channels_survive_json(folders):
    for kind in ("scalar", "channels", "flux2"):
        space = load_codec(str(folders / kind)).space
        record = json.loads(json.dumps(space.to_record()))
        assert list(record) == ["vae", "scale", "shift", "channels", "downsampling"]
        assert isinstance(record["scale"], float if kind == "scalar" else list)
        assert LatentSpace.from_record(record) == space
    alike = {"vae": "a", "scale": [0.5] * 4, "shift": (0.25,) * 4, "channels": 4, "downsampling": 8, "stats": "ab"}
    assert LatentSpace.from_record(alike).to_record() == {**alike, "scale": 0.5, "shift": 0.25}


@pytest.mark.parametrize("field, value", [
    ("scale", [1.0] * 3), ("scale", [1.0, 1.0, 1.0, 0.0]), ("scale", [1.0, 1.0, 1.0, float("nan")]), ("scale", []),
    ("scale", [1.0, 1.0, 1.0, "1"]), ("scale", [[1.0] * 4]), ("shift", [0.0] * 5), ("shift", [True] * 4),
    ("shift", {"0": 1.0}), ("shift", [float("inf")] * 4), ("stats", ["x"]), ("stats", None)])
def test_impossible_records_are_refused(field, value):
    with pytest.raises(UserError, match=f"DATA.*{field}") as refused:
        read_space({**LatentSpace().to_record(), field: value}, (8, 32, 32), 256, "DATA")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("a, b, word", [
    ((0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.5, 4.0), r"scale 2.0 in channel 2 .*has 2.5"),
    ((0.5, 1.0, 2.0, 4.0), 0.5, r"scale 1.0 in channel 1 .*has 0.5"), (0.5, 0.25, r"latent scale 0.5 \(")])
def test_other_statistics_are_refused_with_both_numbers(a, b, word):
    one, other = LatentSpace(scale=a), LatentSpace(scale=b)
    one.require_same(LatentSpace(scale=a), "the data set", "the checkpoint")
    with pytest.raises(UserError, match=word):
        one.require_same(other, "the data set", "the checkpoint")


def test_the_decoder_takes_a_files_numbers_or_those_recorded_before(folders, capsys):
    """But no other numbers: those of the config are compared."""
    codec, before = load_codec(str(folders / "channels")), load_codec(str(folders / "scalar")).space
    with pytest.raises(UserError, match="latent scale"):
        codec.use_space(LatentSpace("x", 0.25, 0.1, 4, 2), "the data set")
    codec.use_space(replace(before, vae=codec.space.vae), "the data set")
    assert (codec.space.scale, codec.space.shift) == (0.5, 0.1) and "statistics" in capsys.readouterr().err
    codec = load_codec(str(folders / "scalar"))
    codec.use_space(LatentSpace("x", (1.0, 2.0, 3.0, 4.0), 0.0, 4, 2, stats="ab"), "the data set")
    assert codec.space.scale == (1.0, 2.0, 3.0, 4.0) and "same VAE" in capsys.readouterr().err
    codec.space = replace(codec.space, vae=VAES["e2e-sd"].id)     # as loaded from the hub: it cannot have moved
    with pytest.raises(UserError, match="not by REPA-E"):
        codec.use_space(LatentSpace("x", 1.0, 0.0, 4, 2, stats="ab"), "the data set")
    codec.use_space(LatentSpace(VAES["e2e-sd"].id, 1.0, 0.0, 4, 2, stats="ab"), "the data set")
    with pytest.raises(UserError, match="channels"):
        codec.use_space(LatentSpace(VAES["e2e-sd"].id, 1.0, 0.0, 16, 2, stats="ab"), "the data set")


# -------------------------------------------------------------------------------------------------------------- loading

@pytest.mark.parametrize("change, word", [
    ({"latents_mean": MEAN[:3]}, r"mean.*\(3,\).*4"), ({"latents_std": STD + [1.0]}, r"std.*\(5,\).*4"),
    ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "std.*0.0"), ({"latents_std": [1.0, 1.0, -1.0, 1.0]}, "std.*-1.0"),
    ({"latents_mean": [0.0, 0.0, float("nan"), 0.0]}, "mean.*nan"), ({"latents_mean": None}, "mean.*None"),
    ({"latents_std": None}, "std.*None"), ({"latents_mean": "abcd"}, "mean"), ({"latents_std": [1e-9] * 4}, "scale"),
    ({"latents_std": ["1"] * 4}, "std"), ({"latents_std": [[1.0] * 2] * 2}, r"std.*\(2, 2\)"),
    ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny.*AutoencoderKLFlux2"), ({"_class_name": [1]}, "RAE"),
])
def test_a_config_with_impossible_statistics_is_refused(folders, tmp_path, change, word):
    folder = shutil.copytree(folders / "channels", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=word) as refused:
        load_codec(str(folder))
    assert "\n" not in str(refused.value)


def test_a_class_that_diffusers_lacks_is_named(folders, monkeypatch):
    import diffusers

    monkeypatch.delitem(diffusers._class_to_module, "AutoencoderKLFlux2")
    monkeypatch.delitem(vars(diffusers), "AutoencoderKLFlux2", raising=False)
    with pytest.raises(UserError, match="no AutoencoderKLFlux2; install"):
        load_codec(str(folders / "flux2"))


def test_an_unknown_name_is_answered_with_the_table():
    with pytest.raises(UserError) as refused:
        load_codec("e2e-unknown")
    assert all(f"{name} (" in str(refused.value) for name in VAES)


@pytest.mark.parametrize("name, kind, subfolder", [("flux2", "flux2", "vae"), ("va-vae", "ldm", ""),
                                                   ("e2e-invae", "channels", ""), ("rae-dinov2", "rae", "")])
def test_names_are_repositories_of_the_hub(folders, name, kind, subfolder):
    """From the hub's cache, by name and by the id that is recorded."""
    repository = Path(constants.HF_HUB_CACHE, f"models--{VAES[name].id.replace('/', '--')}")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders / kind, repository / "snapshots" / ("0" * 40) / subfolder)
    try:
        codec, again = load_codec(name), load_codec(VAES[name].id)
        assert codec.space == again.space == LatentSpace(**vars(load_codec(str(folders / kind)).space)
                                                         | {"vae": VAES[name].id})
        if name == "e2e-invae":                                   # without its statistics it would be scaled by 0.18215
            config = repository / "snapshots" / ("0" * 40) / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "latents_mean": None, "latents_std": None}))
            with pytest.raises(UserError, match="lacks latents_mean"):
                load_codec(name)
    finally:
        shutil.rmtree(repository)


def test_the_docs_list_every_vae():
    text = (ROOT / "docs" / "data.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| `")}
    for name, vae in VAES.items():
        row = rows[f"`{name}`"]
        assert all(one in row for one in (vae.id, f"{vae.downsampling}, {vae.channels}", vae.licence)), name


# ------------------------------------------------------------------------------------------------------------------ LDM

def test_ldm_names_are_those_that_diffusers_converts(tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = saved("AutoencoderKL", tmp_path, **SIZES)
    state = vae.state_dict()
    named = {ldm_name(name, 2): one[..., None, None] if ".attentions" in name and one.ndim == 2 else one
             for name, one in state.items()}
    back = convert_ldm_vae_checkpoint(named, dict(vae.config))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert ldm_name("decoder.up_blocks.0.attentions.2.to_out.0.weight", 5) == "decoder.up.4.attn.2.proj_out.weight"
    assert ldm_name("encoder.down_blocks.4.attentions.1.group_norm.bias", 5) == "encoder.down.4.attn.1.norm.bias"


def test_an_ldm_file_gives_the_same_network(folders):
    ours, state = load_codec(str(folders / "ldm")).vae, load_file(folders / "plain/diffusion_pytorch_model.safetensors")
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(one, state[name]) for name, one in ours.state_dict().items())


def change_ldm(folder, edit):
    weights = torch.load(folder / "vavae.pt", weights_only=True)
    edit(weights["state_dict"])
    torch.save(weights, folder / "vavae.pt")


@pytest.mark.parametrize("change, word", [
    (lambda folder: (folder / "latents_stats.pt").write_bytes(b""), "latents_stats"),
    (lambda folder: shutil.copy(folder / "vavae.pt", folder / "more.pt"), "one other"),
    (lambda folder: change_ldm(folder, lambda state: state.pop("decoder.conv_out.bias")), "conv_out"),
    (lambda folder: change_ldm(folder, lambda state: state.clear()), "post_quant_conv"),
    (lambda folder: torch.save({"mean": torch.zeros(4)}, folder / "latents_stats.pt"), "mean and std"),
    (lambda folder: torch.save({"mean": torch.zeros(1).expand(10**12), "std": torch.ones(4)},
                               folder / "latents_stats.pt"), "mean"),
    (lambda folder: torch.save({"mean": torch.zeros(4), "std": torch.ones(4).to_sparse()}, folder / "latents_stats.pt"),
     "no readable"),
])
def test_a_damaged_ldm_folder_is_refused(folders, tmp_path, change, word):
    folder = shutil.copytree(folders / "ldm", tmp_path / "ldm")
    change(folder)
    with pytest.raises(UserError, match=word):
        load_codec(str(folder))


# ----------------------------------------------------------------------------------------------------------- statistics

def moments_in(folder, count=150, channels=3, side=4):
    """More files than a worker reads at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    mean = rng.normal([[[5.0]], [[-1.0]], [[0.0]]], [[[0.1]], [[2.0]], [[1.0]]], (count, channels, side, side))
    std = rng.uniform(0.1, 3, (count, channels, side, side))
    moments = np.concatenate([mean, std], axis=1).astype(np.float32)
    for i, one in enumerate(moments):
        np.save(folder / f"img-mean-std-{i:08d}.npy", one)
    return moments.astype(np.float64)


@pytest.mark.parametrize("workers", [0, 1])
def test_measured_statistics_are_those_of_draws_from_the_posteriors(tmp_path, workers):
    mean, std = np.split(moments_in(tmp_path / "vae-sd"), 2, axis=1)
    dataset_tools.main(["stats-latents", f"--source={tmp_path / 'vae-sd'}", f"--output={tmp_path / 'x.npz'}",
                        f"--workers={workers}"])
    found = np.load(tmp_path / "x.npz")
    np.testing.assert_allclose(found["mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["std"]**2, mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3)), rtol=1e-10)
    drawn = mean + std * np.random.default_rng(1).standard_normal(mean.shape)
    np.testing.assert_allclose(found["std"], drawn.std((0, 2, 3)), rtol=0.05)


@pytest.mark.parametrize("change, output, word", [
    (lambda folder: np.save(folder / "b.npy", np.zeros((4, 4, 4), np.float32)), "x.npz", "b.npy.*shape"),
    (lambda folder: np.save(folder / "b.npy", np.full((6, 4, 4), np.nan, np.float32)), "x.npz", "not finite"),
    (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "x.npz", "no moments"),
    (lambda folder: None, "x.pt", "npz"), (lambda folder: None, "none/x.npz", "folder")])
def test_moments_that_cannot_be_measured_are_refused(tmp_path, capsys, change, output, word):
    moments_in(tmp_path / "vae-sd", count=2)
    change(tmp_path / "vae-sd")
    with pytest.raises(SystemExit):
        dataset_tools.main(["stats-latents", f"--source={tmp_path / 'vae-sd'}", f"--output={tmp_path / output}",
                            "--workers=0"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in line for part in word.split(".*")) and not (tmp_path / output).exists()


@pytest.mark.parametrize("arrays, word", [
    ({"mean": np.zeros(4)}, "mean and std"), ({"mean": np.zeros(3), "std": np.ones(3)}, "(3,)"),
    ({"mean": np.zeros(4), "std": np.zeros(4)}, "std"), ({"mean": np.zeros(4), "std": np.full(4, np.inf)}, "inf"),
    ({"mean": np.zeros(4), "std": np.array(["a"] * 4)}, "std")])
def test_impossible_statistics_files_are_refused(folders, data_dir, tmp_path, capsys, arrays, word):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SystemExit):
        dataset_tools.main(["encode", f"--source={data_dir / 'images'}", f"--dest={tmp_path / 'vae-sd'}",
                            f"--vae={folders / 'scalar'}", f"--latent-stats={tmp_path / 'x.npz'}", "--workers=0"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "x.npz" in line and word in line and not (tmp_path / "vae-sd").exists()


@pytest.mark.parametrize("arm, name", [(as_npz, "x.npz"), (as_pickle, "x.pt"), (as_zip, "x.pt"), (None, "x.npz"),
                                       (None, "x.pt")])
def test_statistics_files_run_no_code(folders, data_dir, tmp_path, capsys, arm, name):
    """Nor need they exist."""
    FIRED.clear()
    if arm:
        arm(tmp_path / name)
    with pytest.raises(SystemExit):
        dataset_tools.main(["encode", f"--source={data_dir / 'images'}", f"--dest={tmp_path / 'vae-sd'}",
                            f"--vae={folders / 'scalar'}", f"--latent-stats={tmp_path / name}"])
    assert not FIRED and name in capsys.readouterr().err.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- end to end

def prepare(data_dir, folder, vae, *flags):
    folder.mkdir(exist_ok=True)
    if not (folder / "images").exists():
        os.symlink(data_dir / "images", folder / "images")
    dataset_tools.main(["encode", f"--source={folder / 'images'}", f"--dest={folder / 'vae-sd'}", f"--vae={vae}",
                        "--workers=0", *map(str, flags)])
    return json.loads((folder / "vae-sd/dataset.json").read_text())["vae"]


def train_on(folder, flags, *more):
    train.main([*flags, "--data-dir", str(folder), "--max-train-steps", "2", *map(str, more)])


def test_a_space_per_channel_from_encoding_to_pictures(folders, data_dir, train_flags, tmp_path, capsys):
    """With the config's statistics; then with measured ones, which are another latent space."""
    vae = folders / "channels"
    flags = [*train_flags, "--vae", vae, "--sampling-steps", "2"]
    record = prepare(data_dir, tmp_path / "data", vae)
    assert record == load_codec(str(vae)).space.to_record()
    train_on(tmp_path / "data", map(str, flags))
    state = torch.load(next((tmp_path / "run/checkpoints").glob("*.pt")), weights_only=False)
    assert state["latent_space"] == record and list((tmp_path / "run/grids").iterdir())
    generate.main(["--ckpt", str(tmp_path / "run"), "--num-fid-samples", "2", "--num-steps", "2", "--mode", "ode",
                   "--sample-dir", str(tmp_path / "samples"), "--cfg-scale", "1"])
    assert len(list((tmp_path / "samples").rglob("images/*.png"))) == 2

    dataset_tools.main(["stats-latents", f"--source={tmp_path / 'data/vae-sd'}", f"--output={tmp_path / 'x.npz'}"])
    measured = prepare(data_dir, tmp_path / "measured", vae, "--latent-stats", tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    assert measured["shift"] == found["mean"].tolist() and len(measured["stats"]) == 64
    entries = np.stack([np.load(path) for path in (tmp_path / "measured/vae-sd").rglob("*.npy")])
    latents = LatentSpace.from_record(measured).sample(torch.from_numpy(entries))
    assert (latents.mean((0, 2, 3)).abs() < 0.1).all() and ((latents.std((0, 2, 3)) - 1).abs() < 0.1).all()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_on(tmp_path / "measured", map(str, flags))
    assert "latent scale" in (line := capsys.readouterr().err) and "in channel 0" in line
    train_on(tmp_path / "measured", map(str, flags), "--exp-name", "other")
    assert list((tmp_path / "other/grids").iterdir())
    dataset_tools.main(["check", f"--source={tmp_path / 'measured'}", f"--output={tmp_path / 'check.png'}",
                        "--workers=0"])
    for folder, flags in (("data", ["--latent-stats", tmp_path / "x.npz"]), ("measured", [])):
        with pytest.raises(SystemExit):                           # the same destination with other statistics
            prepare(data_dir, tmp_path / folder, vae, *flags)


def test_an_rae_encodes_images_of_its_side_only(folders, data_dir, tmp_path, capsys):
    record = prepare(data_dir, tmp_path / "data", folders / "rae")
    assert (record["channels"], record["scale"]) == (64, 1.0)
    shutil.rmtree(tmp_path / "data/vae-sd")
    dataset_tools.main(["convert", f"--source={data_dir / 'images'}", f"--dest={tmp_path / 'small'}",
                        "--resolution=16x16", "--workers=0"])
    with pytest.raises(SystemExit):
        dataset_tools.main(["encode", f"--source={tmp_path / 'small'}", f"--dest={tmp_path / 'x'}",
                            f"--vae={folders / 'rae'}", "--workers=0"])
    assert "expected 32 px" in capsys.readouterr().err
