"""benchmarks/sampling.py and image_difference.py run at tiny sizes and count what they say; no time is asserted."""

import json
import sys
from copy import deepcopy

import pytest
import torch

from benchmarks import image_difference, sampling
from evaluations.sample_folder import SampleFolder, prepare
from models.vae import load_codec
from samplers import euler_maruyama_sampler
from tests.test_generate import experiment  # noqa: F401  (a fixture)

TINY = ["--device", "cpu", "--warmup", "0", "--repeats", "1", "--model", "SiT-T/8", "--resolution", "64", "--batch-size", "2",
        "--num-steps", "2"]
TIMED = ["network, conditional", "steps, conditional", "network, guided", "steps, guided", "PNG files"]
CODEC = ["decoding", "whole path, 2 steps"]
ALL_OF_IT = "50000 images, 250 steps, from the above"


def rows_of(capsys) -> dict[str, dict]:
    """The rows of the line of JSON, by name."""
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    return {row["name"]: row for row in json.loads(line)["rows"]}


def test_the_benchmark_beside_the_plain_way(capsys):
    sampling.main([*TINY, "--baseline"])
    rows = rows_of(capsys)
    assert list(rows) == [*TIMED, *CODEC, ALL_OF_IT]
    for row in rows.values():
        assert row["measured"] > 0 and row["baseline"] > 0 and row["ratio"] > 0
    flops = sampling.network_flops("SiT-T/8", 8, 4)
    assert rows["steps, guided"]["ideal"] == rows["network, conditional"]["ideal"]
    peak = rows["network, guided"]["ideal"] * flops               # FLOP/s
    decoder = peak / rows["decoding"]["ideal"]
    assert rows["whole path, 2 steps"]["ideal"] == pytest.approx(peak / (3 * flops + decoder))                 # t = 1 and 0.04
    assert rows[ALL_OF_IT]["ideal"] == pytest.approx(50_000 * (461 * flops + decoder) / peak / 3600)
    assert rows[ALL_OF_IT]["share"] == pytest.approx(rows[ALL_OF_IT]["ideal"] / rows[ALL_OF_IT]["measured"])


def test_without_diffusers_the_rest_is_measured(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sampling.main(TINY)
    said = capsys.readouterr()
    without, = (line for line in said.err.splitlines() if line.startswith("without"))
    assert "diffusers is not there" in without
    line, = (line for line in said.out.splitlines() if line.startswith("{"))
    assert [row["name"] for row in json.loads(line)["rows"]] == [*TIMED, ALL_OF_IT]


@pytest.mark.parametrize(("flags", "sentence"), [
    (("--batch-size", "0"), "--batch-size is 0"), (("--resolution", "100"), "a multiple of 64"),
    (("--precision", "tf32"), "needs a CUDA device"), (("--model-url", "nowhere"), "no VAE at nowhere")])
def test_mistakes(capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        sampling.main([*TINY, *flags])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_the_published_setting_takes_461_evaluations():
    assert 250 + sampling.guided_steps(250) == 461


def test_flops_by_hand():
    """SiT-T/8 on 2 tokens, one of them the class token: 2 FLOP for every weight and token, and attention."""
    width, depth, tokens, patch = 128, 6, 2, 4 * 8 * 8
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2            # products of a block and of its condition
    once = patch * width + 768 * width + (256 + width) * width + 2 * width**2 + width * patch + width * 768
    assert sampling.network_flops("SiT-T/8", 8, 4) == 2 * (depth * block + once)


def test_halves_of_guidance_one_after_the_other_are_the_same_velocity():
    network = sampling.random_network("SiT-T/8", 8, 4, torch.device("cpu"))
    plain = sampling.in_halves(deepcopy(network), 2)
    sizes = []
    plain.blocks[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    generator = torch.Generator().manual_seed(0)
    latents, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 768, generator=generator)
    ours, theirs = (euler_maruyama_sampler(model, latents, torch.tensor([1, 2]), num_steps=2, cfg_scale=2.0, cls_latents=tokens,
                                           noise=torch.zeros_like)[0] for model in (network, plain))
    assert sizes == [2] * 4
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)                        # kernels depend on the batch size
    assert ours.std() > 0


def test_both_ways_write_the_same_images(vae_folder, tmp_path):
    """In one precision the ways differ in nothing but time."""
    codec, files = load_codec(str(vae_folder)), {}
    for beside in (True, False):
        network = sampling.random_network("SiT-T/2", 8, 4, torch.device("cpu"))
        folder = SampleFolder(tmp_path / str(beside), 4, 2, 32, None, True)
        prepare(folder, False, {})
        sampling.whole_path(sampling.Way(network, codec, "fp32", compiled=False, beside=beside), folder, num_steps=2)
        files[beside] = {path.name: path.read_bytes() for path in folder.path.rglob("*.*")}
    assert files[True] == files[False] and len(files[True]) == 4 + 2 + 1


# ---- image_difference

def test_differences_of_a_checkpoint(experiment, encoder_folder, capsys):  # noqa: F811
    image_difference.main(["--ckpt", str(experiment), "--features", f"local-dir:{encoder_folder}", "--count", "5", "--batch-size", "2",
                           "--num-steps", "2", "--device", "cpu", "--no-compile"])
    rows = rows_of(capsys)
    names = {name.partition(":")[0] for name in rows}
    assert names == {"fp32", "bf16 network", "bf16 decoder"}
    yardstick = rows["fp32: Frechet distance (encoder) to fp32, another seed"]["measured"]
    assert yardstick > 0
    for name in names - {"fp32"}:
        assert rows[f"{name}: mean difference"]["measured"] > 0
        assert rows[f"{name}: Frechet distance (encoder) to fp32, same seed"]["measured"] < yardstick
        assert rows[f"{name}: Frechet distance (encoder) to fp32, another seed"]["baseline"] == yardstick


def test_differences_by_hand(colours):
    exact = torch.full((4, 3, 2, 2), 100, dtype=torch.uint8)
    exact[0] = 90                                                 # else nothing varies
    faster = exact.clone()
    faster[:, 0, 0, 0] += 1
    faster[0, 1, 0, :] += 2
    rows = image_difference.compare("x", faster, exact, exact, 0.0, colours)
    found = {row.name: row.measured for row in rows}
    assert found["x: mean difference"] == (4 * 1 + 2 * 2) / 48 and found["x: largest difference"] == 2
    assert found["x: pixel values that differ"] == pytest.approx(100 * 6 / 48)
    assert found["x: pixel values that differ by more than one level"] == pytest.approx(100 * 2 / 48)
    assert found["x: Frechet distance (colours) to fp32, same seed"] > 0
    same = image_difference.compare("x", exact, exact, exact, 0.0, colours)
    assert [row.measured for row in same] == pytest.approx([0] * 6, abs=1e-6)


