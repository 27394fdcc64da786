"""The page about a run: what it shows, what it says when a part is missing, and how it behaves in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
from evaluations import evaluator, gallery
from evaluations.report import write_report
from models.cached_features import features_folder
from preprocessing import dataset_tools
from tests.conftest import random_images

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror=\'document.title="owned"\'>\ud800'
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")


class Page(HTMLParser):
    """Elements (name, attributes) of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def images(self) -> list[tuple[dict, Image.Image]]:
        found = [attributes for name, attributes in self.elements if name == "img"]
        decoded = (base64.b64decode(one["src"].removeprefix("data:image/webp;base64,")) for one in found)
        return [(one, Image.open(io.BytesIO(data))) for one, data in zip(found, decoded, strict=True)]

    def shown(self) -> dict[int, tuple]:
        """The grids that are not hidden, by step: their first pixel."""
        return {int(one["data-step"]): image.convert("RGB").getpixel((0, 0)) for one, image in self.images()
                if "data-step" in one and "hidden" not in one}


def page_of(folder: Path) -> Page:
    gallery.main([str(folder)])
    return Page((folder / "gallery.html").read_text(encoding="utf-8"))


def opened(file: Path) -> Page:
    """The page as Chromium holds it after loading. Fails on any message in the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, f"--user-data-dir={file.parent}/browser", f"file://{file}"],
                          capture_output=True, text=True, timeout=120)
    assert "<h1>" in done.stdout, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


@pytest.fixture(scope="module")
def whole(trained, data_dir, encoder_folder, tmp_path_factory):
    """A run with every part: two grids, scored samples with class tokens, and stored features of its data."""
    place = tmp_path_factory.mktemp("gallery")
    folder, data = Path(shutil.copytree(trained, place / "run")), Path(shutil.copytree(data_dir, place / "data"))
    name = f"local-dir:{encoder_folder}"
    dataset_tools.main(["encode", "--source", f"{data}/images", "--dest", str(data / features_folder(name)),
                        "--enc-type", name])
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(settings | {"data_dir": str(data)}))
    (folder / "grids").mkdir()
    for step, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / "grids" / f"{step:07d}.png")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    generate.main(["--ckpt", str(folder), "--num-fid-samples", "12", "--num-steps", "2", "--labels", "balanced",
                   "--save-cls-tokens", "--no-png"])
    samples, = (folder / "samples").iterdir()
    np.savez(place / "ref.npz", arr_0=random_images(12, 32, 32))
    evaluator.main(["--ref-batch", str(place / "ref.npz"), "--sample-batch", str(samples / "samples.npz"), "--features",
                    name, "--output", str(samples / "metrics.json")])
    write_report([samples])
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("gallery.html")))


@pytest.fixture
def captioned(run):
    """The same with captions instead of labels: the first one hostile."""
    samples, = run.glob("samples/*/samples.npz")
    np.savez(samples, arr_0=np.load(samples)["arr_0"])
    lines = [json.dumps({"index": i, "caption": HOSTILE if i == 0 else f"a red disc {i // 2}"}) for i in range(12)]
    samples.with_name("captions.jsonl").write_text("\n".join(lines))
    return run


# ------------------------------------------------------------------------------------------------------ what it shows

def test_a_whole_run_has_every_part_and_loads_nothing(whole):
    page, text = page_of(whole), (whole / "gallery.html").read_text()
    assert not [attributes for _, attributes in page.elements if attributes.get("class") == "missing"]
    assert [attributes["id"] for name, attributes in page.elements if name == "section"] == [
        "grids", "curves", "samples", "neighbours", "sweep"]
    assert page.shown().keys() == {1, 2}                          # all of them without JavaScript
    for word in ("run", "SiT-T/2", "step 2", "fd encoder", "class 0", "class 2", "enc_type: local-dir:"):
        assert word in page.text, word
    assert not re.search(r"https?:|url\(|@import|src=(?!\"data:)|<link", text)


def test_curves_are_drawn_to_scale(run):
    lines = [{"step": 2, "fid_10k": 7.0}, {"step": 4, "fid_10k": 3.0}, {"step": 1, "loss": 5.0},
             {"step": 2, "loss": None}, {"step": 3, "loss": 4.0}, {"step": 4, "loss": 1.0, "later": 1}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = page_of(run)
    lines = [attributes["points"].split() for name, attributes in page.elements if name == "polyline"]
    assert lines[0] == 2 * ["100.0,0.0"] + ["200.0,60.0"]         # scores come first
    assert lines[1] == 2 * ["50.0,0.0"] + ["150.0,15.0", "200.0,60.0"]
    assert lines[2] == 2 * ["200.0,60.0"] and "1 to 5" in page.text and "No scores" not in page.text


def test_samples_by_class(whole):
    """Four of each class, in order, and the pixels of that sample."""
    file, = whole.glob("samples/*/samples.npz")
    stored, groups = np.load(file), gallery.pick_samples(file, 6, 2)
    assert list(groups) == ["class 0", "class 1", "class 2"] and all(len(one) == 2 for one in groups.values())
    for what, one in groups.items():
        for index, image in one.items():
            assert what == f"class {stored['arr_1'][index]}" and (np.asarray(image) == stored["arr_0"][index]).all()
    assert list(gallery.pick_samples(file, 2, 1)) == ["class 0", "class 2"]
    assert sum(map(len, gallery.pick_samples(file, 144, 6).values())) == 12


def test_samples_by_caption(captioned):
    groups = gallery.pick_samples(next(captioned.glob("samples/*/samples.npz")), 144, 6)
    assert list(groups)[1:3] == ["a red disc 0", "a red disc 1"] and list(groups["a red disc 1"]) == [2, 3]


def test_the_best_setting_is_shown(run):
    """The lowest distance of the largest number of samples; without scores the newest samples."""
    first, = (run / "samples").glob("*/")
    result = json.loads((first / "metrics.json").read_text())
    for name, better in (("better", {"fd_encoder": 0.5}), ("fewer", {"fd_encoder": 0.1, "num_samples": 2})):
        shutil.copytree(first, run / "samples" / name)
        (run / "samples" / name / "metrics.json").write_text(json.dumps(result | better))
    assert re.search("fd encoder 0.5 .*better", page_of(run).text)
    for file in run.glob("samples/*/metrics.json"):
        file.unlink()
    (run / "samples" / "fewer" / "samples.npz").touch()
    assert re.search("Not scored.*fewer", page_of(run).text)


def test_nearest_training_images_of_a_class_token(run):
    """A generated token that is a training image's own, times 3, has cosine 1 with it and shows its pixels."""
    data = Path(json.loads((run / "args.json").read_text())["data_dir"])
    file, = run.glob("samples/*/class_tokens.npz")
    tokens, labels = (np.load(file)[name] for name in ("class_tokens", "labels"))
    stored, = data.glob("features-*")
    tokens[0] = 3 * np.load(stored / "00000" / "img00000007.npy")["class_token"]
    np.savez(file, class_tokens=tokens, labels=labels)
    page = page_of(run)
    row = page.text[page.text.index("generated: class 0"):]
    assert row.startswith("generated: class 01.000 · 1") and "0." in row[:40]             # image 7 has class 1
    images = [np.asarray(image.convert("RGB")) for _, image in page.images()]
    wanted = np.asarray(Image.open(data / "images" / "00000" / "img00000007.png"))
    assert any(image.shape == wanted.shape and (image == wanted).all() for image in images)


def test_pictures_are_bounded():
    noise = Image.fromarray(random_images(1, 700, 700)[0])
    (attributes, image), = Page(gallery.picture(noise, 50_000, alt="")).images()
    assert len(attributes["src"]) < 50_000 * 4 / 3 + 40 and image.size == (256, 256)
    most = (gallery.GRIDS + 2) * gallery.GRID_BYTES + gallery.SAMPLE_BYTES * (
        gallery.SAMPLES + gallery.TOKENS * (gallery.NEAREST + 1))
    assert most * 4 / 3 + gallery.CURVES * gallery.POINTS * 12 < 19e6


def test_many_grids_are_thinned_out(run):
    for step in range(3, 101):
        shutil.copy(run / "grids" / "0000001.png", run / "grids" / f"{step:07d}.png")
    steps = list(page_of(run).shown())
    assert len(steps) == gallery.GRIDS and steps[0] == 1 and steps[-1] == 100 and "40 of 100 grids" in page_of(run).text


# -------------------------------------------------------------------------------------------------- missing and damaged

@pytest.mark.parametrize(("removed", "section", "word"), [
    ("grids", "grids", "--sampling-steps"), ("metrics.jsonl", "curves", "--logging-steps"),
    ("samples", "samples", "eval.sh"), ("samples", "neighbours", "eval.sh"), ("samples", "sweep", "REF_BATCH"),
    ("samples/*/class_tokens.npz", "neighbours", "--save-cls-tokens"), ("samples/*/metrics.json", "sweep", "REF_BATCH"),
    ("args.json", "neighbours", "no args.json"), ("samples/sweep.png", "sweep", "sweep.png")])
def test_what_is_missing_is_said_in_its_place(run, removed, section, word):
    for path in run.glob(removed):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page_of(run)
    place = re.search(f'<section id="{section}">.*?</section>', (run / "gallery.html").read_text(), re.DOTALL)[0]
    assert 'class="missing"' in place and word in Page(place).text


def test_the_command_that_stores_class_tokens_works(run):
    """The page names it; then the neighbours are there."""
    data = Path(json.loads((run / "args.json").read_text())["data_dir"])
    shutil.copytree(data, run / "data", ignore=shutil.ignore_patterns("features-*"))
    settings = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(settings | {"data_dir": str(run / "data")}))
    command = re.search(r"python -m preprocessing\.dataset_tools (encode [^<]*?)(?=Sweep)", page_of(run).text)[1]
    dataset_tools.main(command.split())
    assert "generated: class 0" in page_of(run).text


def test_damaged_lines_and_pictures_do_not_cost_the_page(run):
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "lo', '{"step": 2, "loss": NaN, "big": 1' + 400 * "0" + "}",
             '{"step": 2, "loss": 1.0}', "[]"]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "grids" / "0000002.png").write_bytes(b"no picture")
    (run / "grids" / "notes.png").write_bytes(b"other")
    for file in run.glob("samples/*/metrics.json"):
        file.write_text('{"asked": {}, "settings": {}, "weights_sha256": "0"}')
    page = page_of(run)
    assert [len(attributes["points"].split()) for name, attributes in page.elements if name == "polyline"] == [3]
    assert "0000002.png: not a readable image" in page.text and "class 0" in page.text


@pytest.mark.parametrize(("name", "content", "word"), [
    ("nothing", None, "no run"), ("checkpoints/0000002.pt", None, "no run"), ("args.json", "{", "not JSON"),
    ("args.json", "[]", "no settings")])
def test_refusals(run, capsys, name, content, word):
    folder = run if content else run / name
    if content:
        (run / name).write_text(content)
    with pytest.raises(SystemExit) as ended:
        gallery.main([str(folder)])
    assert ended.value.code == 2 and word in capsys.readouterr().err
    assert not (folder / "gallery.html").exists()


# --------------------------------------------------------------------------------------------------------- a browser

@pytest.fixture
def hostile(captioned):
    """Every text that comes from a file is hostile."""
    (captioned / "metrics.jsonl").write_text(json.dumps({"step": 2, HOSTILE: 1.0, "loss": 1.0}))
    settings = json.loads((captioned / "args.json").read_text())
    (captioned / "args.json").write_text(json.dumps(settings | {"method": HOSTILE, HOSTILE: HOSTILE}))
    for file in captioned.glob("samples/*/metrics.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"ref_batch": HOSTILE}))
    return captioned


def test_texts_of_files_are_escaped(hostile):
    assert gallery.tag("p", "<", gallery.Html("<b>"), data_x='"<') == '<p data-x="&quot;&lt;">&lt;<b></p>'
    page = page_of(hostile)
    assert page.text.count('<script>document.title="owned"</script>') >= 6
    assert [name for name, _ in page.elements].count("script") == 1
    assert not [one for _, attributes in page.elements for one in attributes if one.startswith("on")]
    assert all(attributes["src"].startswith("data:") for name, attributes in page.elements if name == "img")


@browser
def test_nothing_in_a_file_runs(hostile):
    page_of(hostile)
    page = opened(hostile / "gallery.html")
    assert "owned" not in re.search("<title>(.*?)</title>", (hostile / "gallery.html").read_text())[1]
    assert page.shown().keys() == {2} and [name for name, _ in page.elements].count("script") == 1


@browser
def test_the_slider_changes_the_picture(run, tmp_path):
    page_of(run)
    file = run / "gallery.html"
    (step, (red, _, blue)), = opened(file).shown().items()
    assert step == 2 and blue > 200 > red
    drag = 'onpageshow = () => { slider.value = 0; slider.dispatchEvent(new Event("input")) }'
    moved = tmp_path / "moved.html"
    moved.write_text(file.read_text() + f"<script>{drag}</script>")
    page = opened(moved)
    (step, (red, _, blue)), = page.shown().items()
    assert step == 1 and red > 200 > blue and "step 1 (2 of 2 grids)" in page.text
    assert "--step: 1" in dict(page.elements)["body"]["style"]                            # the line in the curves


@browser
def test_a_page_without_grids_has_no_error(run):
    shutil.rmtree(run / "grids")
    page_of(run)
    assert not opened(run / "gallery.html").shown()
