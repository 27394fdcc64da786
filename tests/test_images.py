"""Sets of images: npz files in ADM's form, folders, crops, and the file that is written."""

import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluations.images import ImageSet, open_images, pick
from preprocessing.crop import center_crop
from preprocessing.dataset_tools import main as dataset_tools
from runtime.messages import UserError
from runtime.npz import read_npz_shape, write_npz
from tests.conftest import random_images


def blocks(images: ImageSet, size: int) -> list[np.ndarray]:
    return list(images.blocks(range(start, min(start + size, images.count)) for start in range(0, images.count, size)))


def write_folder(folder, images):
    for i, image in enumerate(images):
        (folder / f"{i // 4:05d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i // 4:05d}" / f"img{i:08d}.png")
    return folder


# ---- an npz file -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_order_with_an_odd_last_block_and_unknown_keys(tmp_path, save):
    images = random_images(11, 12, 20)
    save(tmp_path / "a.npz", images, np.arange(11) % 3, mu_s=np.zeros(2), more=np.array([None, 1]))
    opened = open_images(tmp_path / "a.npz")
    assert (opened.count, opened.size, opened.statistics) == (11, (12, 20), None)
    assert np.array_equal(opened.labels, np.arange(11) % 3)
    read = blocks(opened, 4)
    assert [len(block) for block in read] == [4, 4, 3] and np.array_equal(np.concatenate(read), images)


@pytest.mark.parametrize("second", [np.arange(10), np.arange(11) / 2, np.zeros((11, 2), int),
                                    np.array(["cat"] * 11, object)])
def test_labels_are_one_whole_number_per_image(tmp_path, second):
    np.savez(tmp_path / "a.npz", random_images(11), second)
    assert open_images(tmp_path / "a.npz").labels is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_never_loaded_whole(tmp_path, save):
    images = random_images(96, 128, 128)                                          # 4.7 MB
    save(tmp_path / "a.npz", images)
    tracemalloc.start()
    try:
        opened = open_images(tmp_path / "a.npz")
        rows = sum(len(block) for block in opened.blocks(range(i, i + 2) for i in range(0, 96, 2)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 96 and peak < images.nbytes / 4


@pytest.mark.parametrize("kind", ["plain", "compressed", "fortran", "folder", "cropped", "memory"])
def test_blocks_with_gaps_between_them(tmp_path, kind):
    """As processes take them in turn; a set can be read repeatedly."""
    images = random_images(12)
    source, crop = tmp_path / "a.npz", None
    if kind == "folder":
        source = write_folder(tmp_path / "a", images)
    elif kind == "memory":
        source = images
    elif kind == "compressed":
        np.savez_compressed(source, images)
    else:
        np.savez(source, np.asfortranarray(images) if kind == "fortran" else images)
    if kind == "cropped":
        crop, images = 8, np.stack([np.array(center_crop(Image.fromarray(image), 8)) for image in images])
    ranges = [range(1, 4), range(4, 5), range(7, 9), range(11, 12)]
    opened = open_images(source, crop=crop)
    for _ in range(2):
        read = list(opened.blocks(iter(ranges)))
        assert all(np.array_equal(block, images[r.start:r.stop]) for r, block in zip(ranges, read, strict=True))
    assert list(opened.blocks([])) == []
    assert np.array_equal(np.stack(list(pick(opened, [0, 5, 11]))), images[[0, 5, 11]])


def header_only(path, shape):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})


GOOD, MU, SIGMA = random_images(4), np.zeros(3), np.eye(3)


@pytest.mark.parametrize("arrays, word", [
    (dict(images=GOOD), "has no arr_0 but images"),
    (dict(), "has no arr_0 but nothing"),
    (dict(mu_s=MU, sigma_s=SIGMA), "has no arr_0 but mu_s"),
    (dict(arr_0=GOOD.astype(np.float32)), "float32"),
    (dict(arr_0=GOOD.transpose(0, 3, 1, 2).copy()), r"\(4, 3, 16, 16\)"),
    (dict(arr_0=GOOD[..., 0]), r"\(4, 16, 16\)"),
    (dict(arr_0=GOOD[:1]), "at least 2"),
    (dict(arr_0=np.array([None, 1])), "object"),
    (dict(arr_0=np.zeros((4, 0, 8, 3), np.uint8)), "expected images of 1 to"),
    (dict(arr_0=GOOD, mu=MU), r"mu \(3,\) and sigma missing"),
    (dict(mu=MU, sigma=np.eye(4)), r"mu \(3,\) and sigma \(4, 4\)"),
    (dict(mu=np.eye(3), sigma=SIGMA), r"mu \(3, 3\)"),
    (dict(mu=MU, sigma=SIGMA, mu_s=MU), r"mu_s \(3,\) and sigma_s missing"),
    (dict(mu=MU, sigma=SIGMA, sigma_s=SIGMA), r"mu_s missing and sigma_s"),
    (dict(mu=MU * np.nan, sigma=SIGMA), "mu and sigma are not finite"),
    (dict(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA + np.inf), "mu_s and sigma_s are not finite"),
    (dict(mu=np.array(["a"] * 3), sigma=SIGMA), "expected numbers"),
    (dict(mu=np.array([None, 1]), sigma=SIGMA), "not a readable npz"),
    *((dict(mu=MU, sigma=SIGMA, about=np.array(text)), "about") for text in ("{", "[" * 100_000, "[7]")),
])
def test_an_npz_of_another_form_is_refused_in_one_line(tmp_path, arrays, word):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=word) as error:
        open_images(tmp_path / "a.npz", "the sample batch")
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)


@pytest.mark.parametrize("damage, word", [
    (lambda path: path.write_text("text"), "not a readable npz"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable npz"),
    (lambda path: np.save(path.open("wb"), GOOD), "not a readable npz"),
    (lambda path: path.unlink(), "not found"),
    (lambda path: header_only(path, (4, -8, -8, 3)), "arr_0"),
    (lambda path: header_only(path, (-4, 8, 8, 3)), "expected images of 1 to"),
    (lambda path: header_only(path, (4, 8, 8, 3)), "arr_0 ends before its 4 rows"),
])
def test_a_damaged_npz_is_refused_when_it_is_opened(tmp_path, damage, word):
    np.savez(tmp_path / "a.npz", GOOD)
    damage(tmp_path / "a.npz")
    with pytest.raises(UserError, match=word) as error:
        open_images(tmp_path / "a.npz")
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_pixels_are_reported_when_they_are_read(tmp_path, save):
    save(tmp_path / "a.npz", random_images(6))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="a.npz: not a readable npz"):
        blocks(open_images(tmp_path / "a.npz"), 4)


def test_a_compressed_array_that_inflates_to_gigabytes_is_refused_before_it_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", random_images(4), mu=MU)
    with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sigma.npy", bytes(1000))
        archive.getinfo("sigma.npy").file_size = 1_100_000_000                    # for the directory at the file's end
    with pytest.raises(UserError, match="sigma inflates to 1100000000 bytes"):
        open_images(tmp_path / "a.npz")


def test_arrays_in_memory():
    images = random_images(5)
    opened = open_images(images)
    assert (opened.count, opened.size) == (5, (16, 16)) and open_images(opened) is opened
    for bad, word in ((images / 255, "float64"), (images[..., :2], r"\(5, 16, 16, 2\)"), (images[:1], "at least 2")):
        with pytest.raises(UserError, match=word):
            open_images(bad)


def test_statistics_are_read_as_float64_with_images_or_without(tmp_path):
    mu, sigma = np.arange(3, dtype=np.float32), 2 * np.eye(3)
    np.savez(tmp_path / "adm.npz", GOOD, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    own = open_images(tmp_path / "adm.npz").statistics
    assert {value.dtype for value in (own.mu, own.sigma, own.mu_s, own.sigma_s)} == {np.dtype(np.float64)}
    assert np.array_equal(own.mu, mu) and np.array_equal(own.sigma_s, sigma[:2, :2]) and own.about == {}
    assert open_images(tmp_path / "adm.npz", crop=8).statistics is None           # not those of the cropped images
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma, about=np.array(json.dumps({"images": 7})))
    opened = open_images(tmp_path / "fid.npz")                                    # as pytorch-fid writes it
    assert (opened.count, opened.size, opened.blocks) == (None, None, None)
    assert opened.statistics.mu_s is None and opened.statistics.about == {"images": 7}


# ---- a folder --------------------------------------------------------------------------------------------------------

def test_a_folder_is_read_by_path_with_grey_pictures_and_any_suffix(tmp_path):
    images = random_images(6)
    for name, image in zip(["b/10.PNG", "b/2.png", "a/z.bmp", "a/y/x.png", "c.png", "d.webp"], images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name, **({"lossless": True} if name == "d.webp" else {}))
    Image.fromarray(images[0]).convert("L").save(tmp_path / "e.png")
    for name in (".hidden.png", "notes.txt"):
        (tmp_path / name).write_text("no image")
    opened = open_images(tmp_path)
    assert (opened.count, opened.size, opened.labels) == (7, (16, 16), None)
    read = np.concatenate(blocks(opened, 4))
    assert np.array_equal(read[:6], images[[3, 2, 0, 1, 4, 5]])
    assert np.array_equal(read[6], np.repeat(np.array(Image.fromarray(images[0]).convert("L"))[..., None], 3, axis=2))


def test_a_folder_of_tif_is_convertible_and_scorable(tmp_path):
    """`convert` and the evaluator see the same files."""
    images = random_images(3)
    (tmp_path / "raw").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "raw" / f"{i}.tif")
    dataset_tools(["convert", "--source", str(tmp_path / "raw"), "--dest", str(tmp_path / "images"),
                   "--resolution", "16x16", "--workers", "0"])
    for folder in ("raw", "images"):
        assert np.array_equal(np.concatenate(blocks(open_images(tmp_path / folder), 2)), images)


def test_the_evaluator_and_convert_see_the_same_files_and_say_what_they_pass_over(tmp_path, capsys):
    """Thumbnails and what was deleted lie in hidden folders; scores depend on every file."""
    images, raw = random_images(8), tmp_path / "raw"
    for folder in ("raw/a", "raw/.ipynb_checkpoints", "raw/a/.Trash-1000/files", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    names = ["a/0.png", "a/1.bmp", "a/2.TIF", "a/3.gif", "a/4.jfif", "b/5.jpeg", "b/6.png", "b/7.webp"]
    (raw / "b").symlink_to(tmp_path / "elsewhere")
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).convert("L").save(raw / name)
    for name in (".ipynb_checkpoints/0-checkpoint.png", "a/.Trash-1000/files/9.png", "a/.8.png"):
        Image.fromarray(images[0]).save(raw / name)
    (raw / "notes.txt").write_text("")
    opened = open_images(raw, crop=16)                            # also pictures with a palette
    assert "4 hidden or other" in (said := capsys.readouterr().err) and "raw" in said
    dataset_tools(["convert", "--source", str(raw), "--dest", str(tmp_path / "images"), "--resolution", "16",
                   "--workers", "0"])
    assert "4 hidden or other" in capsys.readouterr().err
    converted = open_images(tmp_path / "images")
    assert np.array_equal(np.concatenate(blocks(opened, 3)), np.concatenate(blocks(converted, 3)))
    assert opened.count == 8 and not capsys.readouterr().err     # our own files are not mentioned


def test_labels_of_a_folder_come_from_dataset_json_by_name(tmp_path, capsys):
    write_folder(tmp_path, random_images(6))
    labels = [[f"{i // 4:05d}/img{i:08d}.png", 10 * i] for i in range(6)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    assert open_images(tmp_path).labels.tolist() == [0, 10, 20, 30, 40, 50]
    hostile = [json.dumps({"labels": [*labels[1:], [labels[0][0], wrong]]}) for wrong in (0.5, True, None, [1], 2**64)]
    for text in ("{}", json.dumps({"labels": None})):
        (tmp_path / "dataset.json").write_text(text)
        assert open_images(tmp_path).labels is None and not capsys.readouterr().err
    for text in (json.dumps({"labels": labels[1:]}), "{", "[]", "[" * 100_000,
                 json.dumps({"labels": [[{}, 1]]}), json.dumps({"labels": 7}), *hostile):
        (tmp_path / "dataset.json").write_text(text)
        assert open_images(tmp_path).labels is None and "dataset.json" in capsys.readouterr().err


def eps(path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "eps")
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("spoil, word", [
    (lambda path: Image.new("RGBA", (16, 16)).save(path), "mode RGBA"),
    (lambda path: Image.new("RGB", (16, 17)).save(path), r"\(17, 16\) pixels"),
    (lambda path: path.write_bytes(path.read_bytes()[:400]), "not a readable image"),
    (lambda path: path.write_bytes(b""), "not a readable image"),
    (eps, "not a readable image"),
    (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
])
def test_an_unsuitable_image_of_a_folder_is_named(tmp_path, spoil, word):
    write_folder(tmp_path, random_images(3))
    spoil(tmp_path / "00000" / "img00000002.png")
    with pytest.raises(UserError, match=f"img00000002.png.*{word}|{word} .*img00000002.png") as error:
        blocks(open_images(tmp_path), 2)
    assert "\n" not in str(error.value)


def test_folders_and_pipes_named_like_pictures_are_no_images(tmp_path):
    write_folder(tmp_path, random_images(3))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "0.png")                                                 # to read it would never end
    assert open_images(tmp_path).count == 3
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="at least 2"):
        open_images(tmp_path / "other")


def test_every_image_is_cropped_as_adm_did(tmp_path):
    """Which makes one size of many."""
    pictures = [random_images(1, *size, seed=i)[0] for i, size in enumerate([(20, 31), (8, 8), (40, 33)])]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    opened = open_images(tmp_path, crop=8)
    assert opened.size == (8, 8)
    expected = np.stack([np.array(center_crop(Image.fromarray(picture), 8)) for picture in pictures])
    assert np.array_equal(np.concatenate(blocks(opened, 2)), expected)


# ---- writing ---------------------------------------------------------------------------------------------------------

def test_the_written_file_is_numpys_and_ours(tmp_path):
    images, more = random_images(7, 12, 20), dict(arr_1=np.arange(7), about=np.array("text"), sigma=np.eye(2))
    path = tmp_path / "deep" / "a.npz"
    strided = images.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
    for stream in (iter(images), iter([images[:4], images[4:]]), iter([strided])):
        write_npz(path, stream, 7, (12, 20), **more)
        with np.load(path) as file:
            assert file.files == ["arr_0", *more] and file["arr_0"].dtype == np.uint8
            assert np.array_equal(file["arr_0"], images)
            assert all(np.array_equal(file[name], value) for name, value in more.items())
    assert np.array_equal(np.concatenate(blocks(open_images(path), 3)), images)
    assert read_npz_shape(path) == ((7, 12, 20, 3), np.uint8) and read_npz_shape(path, "sigma") == ((2, 2), np.float64)
    with pytest.raises(UserError, match="a.npz: not a readable npz file .*mu"):
        read_npz_shape(path, "mu")
    assert [path.name for path in path.parent.iterdir()] == ["a.npz"]             # no temporary file is left


def test_the_written_file_is_whole_or_absent(tmp_path):
    def cut():
        yield from random_images(2)
        raise UserError("the source ends")

    with pytest.raises(UserError, match="the source ends"):
        write_npz(tmp_path / "a.npz", cut(), 4, (16, 16))
    with pytest.raises(AssertionError, match="bytes for 4 images"):
        write_npz(tmp_path / "a.npz", iter(random_images(3)), 4, (16, 16))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_npz(tmp_path / "file" / "a.npz", iter(random_images(4)), 4, (16, 16))
