"""Sets of images: npz files in ADM's form in all their variants, folders, crops, and the file that is written."""

import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

import dataset
from evaluations import images as module
from evaluations.images import ImageSet, open_images, pick, write_npz
from preprocessing.crop import center_crop
from runtime.messages import UserError
from tests.conftest import random_images


def blocks(images: ImageSet, size: int) -> list[np.ndarray]:
    return list(images.blocks(range(start, min(start + size, images.count)) for start in range(0, images.count, size)))


def write_folder(folder, images):
    for i, image in enumerate(images):
        (folder / f"{i // 4:05d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i // 4:05d}" / f"img{i:08d}.png")
    return folder


# --- an npz file -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_npz_is_read_in_order_with_an_odd_last_block_and_unknown_keys(tmp_path, save, batch_size, capsys):
    images = random_images(11, 12, 20)
    save(tmp_path / "a.npz", images, np.arange(11) % 3, names=np.array(["a", "b"]), mu_s=np.zeros(2), more=np.array([None, 1]))
    opened = open_images(tmp_path / "a.npz")
    assert (opened.count, opened.size, opened.statistics) == (11, (12, 20), None)
    assert np.array_equal(opened.labels, np.arange(11) % 3)
    read = blocks(opened, batch_size)
    assert [len(block) for block in read] == ([4, 4, 3] if batch_size == 4 else [11])
    assert np.array_equal(np.concatenate(read), images) and not capsys.readouterr().err


@pytest.mark.parametrize("second", [
    np.arange(10), np.arange(11) / 2, np.zeros((11, 2), int),
    np.array(["cat"] * 11, object),
])
def test_what_is_not_one_whole_number_an_image_is_no_label(tmp_path, second):
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
    """As they are dealt to several processes."""
    images = random_images(12)
    source, crop = tmp_path / "a.npz", None
    if kind == "plain":
        np.savez(source, images)
    elif kind == "compressed":
        np.savez_compressed(source, images)
    elif kind == "fortran":
        np.savez(source, np.asfortranarray(images))
    elif kind == "cropped":
        np.savez(source, images)
        crop, images = 8, np.stack([np.array(center_crop(Image.fromarray(image), 8)) for image in images])
    else:
        source = write_folder(tmp_path / "a", images) if kind == "folder" else images
    ranges = [range(1, 4), range(4, 5), range(7, 9), range(11, 12)]
    opened = open_images(source, crop=crop)
    for _ in range(2):                                                            # as often as one likes
        read = list(opened.blocks(iter(ranges)))
        assert len(read) == 4 and all(np.array_equal(block, images[r.start:r.stop]) for r, block in zip(ranges, read, strict=True))
    assert list(opened.blocks([])) == []
    assert np.array_equal(np.stack(list(pick(opened, [0, 5, 11]))), images[[0, 5, 11]])


def write_member(path, images, version):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, images, version=version)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())


def test_later_npy_versions_and_fortran_order_are_loaded_whole_and_said(tmp_path, capsys):
    images = random_images(5, 12, 20)
    write_member(tmp_path / "two.npz", images, (2, 0))
    assert np.array_equal(np.concatenate(blocks(open_images(tmp_path / "two.npz"), 2)), images) and not capsys.readouterr().err
    write_member(tmp_path / "three.npz", images, (3, 0))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(images))
    for name in ("three.npz", "fortran.npz"):
        opened = open_images(tmp_path / name)
        assert f"{name} is in Fortran order or of a later npy version: it is loaded whole" in capsys.readouterr().err
        assert (opened.count, opened.size) == (5, (12, 20))
        assert np.array_equal(np.concatenate(blocks(opened, 2)), images)


def bad_sources(tmp_path):
    """(file or folder, part of the sentence)"""
    good, mu, sigma = random_images(4), np.zeros(3), np.eye(3)
    cases = {
        "no arr_0": (dict(images=good), "has no arr_0 but images"),
        "nothing": ({}, "has no arr_0 but nothing"),
        "mu_s alone": (dict(mu_s=mu, sigma_s=sigma), "has no arr_0 but mu_s, sigma_s"),
        "float": (dict(arr_0=good.astype(np.float32)), "float32"),
        "float in order": (dict(arr_0=np.asfortranarray(good / 255)), "float64"),
        "NCHW": (dict(arr_0=good.transpose(0, 3, 1, 2).copy()), r"\(4, 3, 16, 16\)"),
        "grey": (dict(arr_0=good[..., 0]), r"\(4, 16, 16\)"),
        "one": (dict(arr_0=good[:1]), "holds 1 images: a score needs at least 2"),
        "objects": (dict(arr_0=np.array([None, 1])), "object"),
        "mu alone": (dict(arr_0=good, mu=mu), r"mu \(3,\) and sigma missing"),
        "wide": (dict(mu=mu, sigma=np.eye(4)), r"mu \(3,\) and sigma \(4, 4\)"),
        "flat": (dict(mu=np.eye(3), sigma=sigma), r"mu \(3, 3\)"),
        "half": (dict(mu=mu, sigma=sigma, mu_s=mu), r"mu_s \(3,\) and sigma_s missing"),
        "other half": (dict(mu=mu, sigma=sigma, sigma_s=sigma), r"mu_s missing and sigma_s \(3, 3\)"),
        "nan": (dict(mu=mu * np.nan, sigma=sigma), "mu and sigma of .*nan.npz are not finite"),
        "inf": (dict(mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma + np.inf), "mu_s and sigma_s of .*inf.npz are not finite"),
        "about": (dict(mu=mu, sigma=sigma, about=np.array("{")), "not a readable npz"),
        "deep": (dict(mu=mu, sigma=sigma, about=np.array("[" * 100_000)), "not a readable npz"),
        "list": (dict(mu=mu, sigma=sigma, about=np.array("[7]")), "about of .*list.npz is no JSON object"),
        "mu of objects": (dict(mu=np.array([None, 1]), sigma=sigma), "not a readable npz"),
        "no pixels": (dict(arr_0=np.zeros((4, 0, 8, 3), np.uint8)), r"\(4, 0, 8, 3\): expected images of 1 to"),
    }
    for name, (arrays, sentence) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        yield tmp_path / f"{name}.npz", sentence
    (tmp_path / "text.npz").write_text("text")
    yield tmp_path / "text.npz", "not a readable npz"
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no header")
    yield tmp_path / "header.npz", "not a readable npz"
    for name, shape, sentence in (("negative", (4, -8, -8, 3), "expected images of 1 to"), ("large", (4, 2**14, 2**14, 3), "expected"),
                                  ("fewer", (-4, 8, 8, 3), "expected images of 1 to")):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        yield tmp_path / f"{name}.npz", sentence
    np.savez(tmp_path / "short.npz", good)
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:-100])
    yield tmp_path / "short.npz", "not a readable npz"
    yield tmp_path / "none.npz", "not found"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "0 images"


def test_what_is_no_set_of_images_is_refused_in_one_line(tmp_path):
    for path, sentence in bad_sources(tmp_path):
        with pytest.raises(UserError, match=sentence) as error:
            open_images(path, "the sample batch")
        assert "\n" not in str(error.value) and path.name in str(error.value)


@pytest.mark.parametrize("key", ["arr_1", "mu", "sigma"])
def test_an_array_that_is_inflated_beyond_the_limit_is_refused(tmp_path, monkeypatch, key):
    arrays = {"arr_1": np.zeros(4, np.int64), "mu": np.zeros(3), "sigma": np.eye(3)}
    arrays[key] = np.zeros((40, 40))
    np.savez_compressed(tmp_path / "a.npz", arr_0=random_images(4), **arrays)
    monkeypatch.setattr(module, "MAX_LOADED", 1000)
    with pytest.raises(UserError, match=f"a.npz holds {key}.npy of 12928 bytes: expected at most 1000"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "deflated"])
def test_a_damaged_npz_is_said_when_the_damage_is_met(tmp_path, damage):
    path = tmp_path / "a.npz"
    if damage == "cut":
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, random_images(6))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    else:
        (np.savez if damage == "flipped" else np.savez_compressed)(path, random_images(6))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(UserError, match="arr_0 ends before the 6 images" if damage == "cut" else "a.npz is damaged") as error:
        blocks(open_images(path), 4)
    assert "\n" not in str(error.value)


def test_arrays_in_memory():
    images = random_images(5)
    opened = open_images(images)
    assert (opened.count, opened.size, opened.content) == (5, (16, 16), None) and open_images(opened) is opened
    for bad, sentence in ((images / 255, "the images is float64"), (images[..., :2], r"\(5, 16, 16, 2\)"), (images[:1], "holds 1 images")):
        with pytest.raises(UserError, match=sentence):
            open_images(bad)


# --- statistics in the file ------------------------------------------------------------------------------------------------------


def test_statistics_are_read_as_float64_with_images_or_without(tmp_path):
    mu, sigma = np.arange(3, dtype=np.float32), 2 * np.eye(3)
    np.savez(tmp_path / "adm.npz", random_images(4), np.arange(4), mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    own = open_images(tmp_path / "adm.npz").statistics
    assert {value.dtype for value in (own.mu, own.sigma, own.mu_s, own.sigma_s)} == {np.dtype(np.float64)} and own.about == {}
    assert np.array_equal(own.mu, mu) and np.array_equal(own.sigma_s, sigma[:2, :2])
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma, about=np.array(json.dumps({"images": 7})))         # as pytorch-fid keeps it
    opened = open_images(tmp_path / "fid.npz")
    assert (opened.count, opened.size, opened.blocks) == (None, None, None)
    assert opened.statistics.mu_s is None and opened.statistics.sigma_s is None and opened.statistics.about == {"images": 7}


def test_statistics_are_not_those_of_the_cropped_images(tmp_path):
    np.savez(tmp_path / "a.npz", random_images(4), mu=np.zeros(3), sigma=np.eye(3))
    assert open_images(tmp_path / "a.npz", crop=8).statistics is None


# --- a folder --------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_path_with_grey_pictures_and_any_suffix(tmp_path):
    images = random_images(6)
    for name, image in zip(["b/10.PNG", "b/2.png", "a/z.bmp", "a/y/x.png", "c.png", "d.webp"], images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name, **({"lossless": True} if name == "d.webp" else {}))
    Image.fromarray(images[0]).convert("L").save(tmp_path / "e.png")
    (tmp_path / "notes.txt").write_text("no image")
    opened = open_images(tmp_path)
    assert (opened.count, opened.size, opened.labels) == (7, (16, 16), None)
    read = np.concatenate(blocks(opened, 4))
    assert np.array_equal(read[:6], images[[3, 2, 0, 1, 4, 5]])
    assert np.array_equal(read[6], np.repeat(np.array(Image.fromarray(images[0]).convert("L"))[..., None], 3, axis=2))


def test_labels_of_a_folder_come_from_dataset_json_by_name(tmp_path):
    write_folder(tmp_path, random_images(6))
    labels = [[f"{i // 4:05d}/img{i:08d}.png", 10 * i] for i in range(6)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    assert open_images(tmp_path).labels.tolist() == [0, 10, 20, 30, 40, 50]
    hostile = [json.dumps({"labels": [*labels[1:], [labels[0][0], wrong]]}) for wrong in (0.5, True, "7", None, [1], 2**64, 10**400)]
    for text in (json.dumps({"labels": labels[1:]}), json.dumps({"labels": None}), json.dumps({}), "{", "[]", "NaN", "[" * 100_000,
                 json.dumps({"labels": [[{}, 1]]}), json.dumps({"labels": 7}), *hostile):
        (tmp_path / "dataset.json").write_text(text)
        assert open_images(tmp_path).labels is None


def test_images_of_a_folder_that_do_not_fit_are_refused(tmp_path):
    for i, mode in enumerate(["RGB", "L", "RGBA"]):
        Image.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="2.png has mode RGBA"):
        blocks(open_images(tmp_path), 2)
    Image.new("RGB", (8, 9)).save(tmp_path / "2.png")
    with pytest.raises(UserError, match="2.png is 8 x 9 pixels and .*0.png 8 x 8 pixels"):
        blocks(open_images(tmp_path), 2)
    Image.fromarray(random_images(1)[0]).save(tmp_path / "2.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:400])
    with pytest.raises(UserError, match="2.png is not a readable image"):
        blocks(open_images(tmp_path), 2)


def test_pictures_in_a_folder_that_cannot_be_decoded_are_named_in_one_line(tmp_path, monkeypatch):
    Image.fromarray(random_images(1)[0]).save(tmp_path / "0.png")
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "eps")
    monkeypatch.setattr(dataset, "MAX_PIXELS", 300)
    large = io.BytesIO()
    Image.new("RGB", (20, 16)).save(large, "png")
    for content, sentence in ((b"", "is not a readable image"), (b"text", "is not a readable image"),
                              (eps.getvalue(), "is not a readable image"), (large.getvalue(), "has more than 300 pixels")):
        (tmp_path / "line\nbreak.png").write_bytes(content)
        for crop in (None, 8):
            with pytest.raises(UserError, match=rf"line\\nbreak.png {sentence}") as error:
                blocks(open_images(tmp_path, crop=crop), 2)
            assert "\n" not in str(error.value)


def test_an_animation_is_its_first_frame(tmp_path):
    first, second, third = (Image.fromarray(image) for image in random_images(3))
    first.save(tmp_path / "a.png", save_all=True, append_images=[second, third])
    first.save(tmp_path / "b.webp", save_all=True, append_images=[second, third], lossless=True)
    assert np.array_equal(np.concatenate(blocks(open_images(tmp_path), 2)), [np.array(first)] * 2)


def test_what_is_named_like_a_picture_and_is_none(tmp_path):
    write_folder(tmp_path, random_images(3))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert open_images(tmp_path).count == 3
    os.mkfifo(tmp_path / "0.png")                                                 # to read it would never end
    with pytest.raises(UserError, match="0.png is no file but a pipe"):
        open_images(tmp_path)
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="cannot read .*0.png: No such file"):
        open_images(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    write_folder(tmp_path, random_images(6))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot list .*00001: Permission denied"):
        open_images(tmp_path)


def test_names_of_any_bytes_have_a_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file, image in zip(("\udcff.png", f"{name} \n.png"), random_images(2), strict=True):
            Image.fromarray(image).save(tmp_path / name / file)
    assert open_images(tmp_path / "a").content() != open_images(tmp_path / "b").content()


# --- the crop --------------------------------------------------------------------------------------------------------------------


def test_every_image_is_cropped_as_adm_did(tmp_path):
    """Which makes one size of many."""
    pictures = [random_images(1, *size, seed=i)[0] for i, size in enumerate([(20, 31), (8, 8), (40, 33)])]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    opened = open_images(tmp_path, crop=8)
    assert opened.size == (8, 8)
    expected = np.stack([np.array(center_crop(Image.fromarray(picture), 8)) for picture in pictures])
    assert np.array_equal(np.concatenate(blocks(opened, 2)), expected)
    images = random_images(3, 20, 31)
    np.savez(tmp_path / "a.npz", images)
    opened = open_images(tmp_path / "a.npz", crop=8)
    assert opened.size == (8, 8)
    expected = np.stack([np.array(center_crop(Image.fromarray(image), 8)) for image in images])
    assert np.array_equal(np.concatenate(blocks(opened, 2)), expected)


def test_content_changes_with_a_pixel_a_name_and_the_crop_alone(tmp_path):
    images = random_images(6)
    contents = []
    for i, name in enumerate(["a", "b", "changed", "renamed"]):
        write_folder(tmp_path / name, images)
        np.savez(tmp_path / f"{name}.npz", images if i != 2 else images + 1)
        if name == "changed":
            Image.fromarray(images[0] + 1).save(tmp_path / name / "00000" / "img00000000.png")
        if name == "renamed":
            (tmp_path / name / "00000" / "img00000000.png").rename(tmp_path / name / "00000" / "img.png")
        contents.append((open_images(tmp_path / name).content(), open_images(tmp_path / f"{name}.npz").content()))
    assert contents[0] == contents[1] and contents[3][1] == contents[0][1]
    assert len({folder for folder, _ in contents}) == 3 and len({npz for _, npz in contents}) == 2
    assert open_images(tmp_path / "a", crop=8).content() != contents[0][0]
    assert open_images(tmp_path / "a.npz", crop=8).content() != contents[0][1]


# --- writing ---------------------------------------------------------------------------------------------------------------------


def test_written_file_is_numpys_and_ours(tmp_path):
    images = random_images(7, 12, 20)
    for stream in (iter(images), iter([images[:4], images[4:]]), iter([images.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)])):
        write_npz(tmp_path / "deep" / "a.npz", stream, 7, (12, 20), arr_1=np.arange(7), about=np.array("text"), sigma=np.eye(2))
        with np.load(tmp_path / "deep" / "a.npz") as file:
            assert file.files == ["arr_0", "arr_1", "about", "sigma"]
            assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], images)
            assert np.array_equal(file["arr_1"], np.arange(7)) and str(file["about"]) == "text" and np.array_equal(file["sigma"], np.eye(2))
    write_npz(tmp_path / "none.npz", iter([]), 0, (12, 20), mu=np.ones(2))
    with np.load(tmp_path / "none.npz") as file:
        assert file.files == ["mu"]
    write_npz(tmp_path / "b.npz", iter(images), 7, (12, 20))
    assert np.array_equal(np.concatenate(blocks(open_images(tmp_path / "b.npz"), 3)), images)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]     # no temporary file is left


def test_written_file_is_whole_or_absent(tmp_path):
    def cut():
        yield from random_images(2)
        raise UserError("the source ends")

    with pytest.raises(UserError, match="the source ends"):
        write_npz(tmp_path / "a.npz", cut(), 4, (16, 16))
    with pytest.raises(AssertionError, match="bytes for 4 images"):
        write_npz(tmp_path / "a.npz", iter(random_images(3)), 4, (16, 16))
    assert not (tmp_path / "a.npz").exists()


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    def cut():
        yield from random_images(2)
        raise UserError("the source ends")

    with pytest.raises(UserError):
        write_npz(tmp_path / "a.npz", cut(), 4, (16, 16))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_npz(tmp_path / "file" / "a.npz", iter(random_images(4)), 4, (16, 16))
