"""Pictures as others keep them: written by the real writers, read as a folder of the same pictures is."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from preprocessing.dataset_tools import main
from runtime.messages import UserError
from runtime.sources import naming, open_source
from tests import test_preparation_kills, test_preprocessing
from tests.test_preparation_kills import ROOT, arguments, everything
from tests.test_preprocessing import as_file, convert, data_files, encode, fill, picture, record

refused, images = test_preprocessing.refused, test_preparation_kills.images       # fixtures

NAMES = ["cat", "dog", "eel"]
LABELS = [0, 2, 1, 1, 0, 2, 0, 2]
MODES = ["RGB", "L", "RGBA", "P", "CMYK", "1", "RGB", "LA"]       # read as `to_rgb` reads them from a folder
FORMS = ["png", "png", "webp", "png", "jpeg", "png", "jpeg", "png"]
WORDS = [["a cat"], ["an eel", "a wet eel"], ["été"], ["a dog"], ["the \"cat\", again"], ["x"], ["cat"], ["y"]]
COUNT = len(LABELS)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Encoded pictures of several modes, sizes and formats."""
    return [as_file(picture(40 + 3 * i, 36 + 5 * i, i).convert(mode), form)
            for i, (mode, form) in enumerate(zip(MODES, FORMS, strict=True))]


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> Path:
    """The pictures in class folders."""
    return fill(tmp_path_factory.mktemp("folder"), {f"{NAMES[LABELS[i]]}/p{i}.{FORMS[i]}": data
                                                    for i, data in enumerate(pictures)})


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("expected") / "images"
    convert(folder, dest)
    return dest


def told(dest: Path) -> tuple[set, list | None]:
    """Each file with its label and captions, whatever it is called; and the names of the classes."""
    about, files = record(dest), data_files(dest)
    labels, captions = dict(about["labels"] or {}), about.get("captions", {})
    return {(data, labels.get(name), tuple(captions.get(name, ()))) for name, data in files.items()}, about["classes"]


def row_table(pictures: list[bytes], form: str) -> pa.Table:
    """The pictures as rows; `form` says how labels and pictures are stored."""
    image = pa.array([{"bytes": one, "path": None} for one in pictures]) if "struct" in form else pa.array(pictures)
    label = pa.array([NAMES[one] for one in LABELS] if "names" in form else LABELS)
    label = label.dictionary_encode() if "dictionary" in form else label
    return pa.table({"id": list(range(COUNT)), "image": image, "label": label})


def shards(path: Path, table: pa.Table, rows: int = 3, group: int = 2) -> Path:
    """A table as parquet shards of `rows` rows, in row groups of `group`."""
    path.mkdir()
    count = -(-len(table) // rows)
    for i in range(count):
        pq.write_table(table.slice(i * rows, rows), path / f"train-{i:05d}-of-{count:05d}.parquet",
                       row_group_size=group)
    return path


def hugging_face(path: Path, pictures: list[bytes], kind: str) -> Path:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=NAMES)
    features = datasets.Features(image=datasets.Image(), fine=label, id=datasets.Value("int32"))
    rows = {"image": [{"bytes": one, "path": None} for one in pictures], "fine": LABELS, "id": LABELS}
    data = datasets.Dataset.from_dict(rows, features=features)
    if kind == "arrow":
        data.save_to_disk(path, num_shards=3)
        return path
    path.mkdir()
    data.to_parquet(path / "train-00000-of-00001.parquet", batch_size=3)
    return path / "train-00000-of-00001.parquet"


def web_dataset(path: Path, pictures: list[bytes], beside, field: str = "") -> Path:
    """Tars of three samples; `beside(i)` are their members other than the picture, which is FIELD.jpg."""
    path.mkdir()
    with webdataset.ShardWriter(f"{path}/%06d.tar", maxcount=3, verbose=0) as writer:
        for i, data in enumerate(pictures):
            writer.write({"__key__": f"sample{i}", field + {"jpeg": "jpg"}.get(FORMS[i], FORMS[i]): data, **beside(i)})
    return path


def tar_of_tars(path: Path, pictures: list[bytes]) -> Path:
    """As ILSVRC2012_img_train.tar."""
    with tarfile.open(path, "w") as archive:
        for label, name in enumerate(NAMES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as one:
                for i, data in enumerate(pictures):
                    if LABELS[i] == label:
                        info = tarfile.TarInfo(f"{name}_{i}.JPEG")
                        info.size = len(data)
                        one.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{name}.tar")
            info.size = len(inner.getvalue())
            archive.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def image_list(path: Path, folder: Path, form: str) -> Path:
    """A list beside the folder `photos`, a link to `folder`."""
    (path / "photos").symlink_to(folder)
    rows = [(f"photos/{NAMES[LABELS[i]]}/p{i}.{FORMS[i]}", LABELS[i], NAMES[LABELS[i]]) for i in range(COUNT)]
    text = {"csv": "\ufeffpath,label\n" + "".join(f"{name},{label}\n" for name, label, _ in rows),
            "tsv": "image\tclass\n" + "".join(f"{name}\t{label}\n" for name, _, label in rows),
            "bare.csv": "".join(f"{name},{label}\r\n" for name, label, _ in rows),
            "jsonl": "".join(json.dumps({"file": name, "cls": label, "n": 1.5}) + "\n" for name, _, label in rows)}
    (path / f"list.{form}").write_text(text[form])
    return path / f"list.{form}"


LABELLED = {
    "parquet": lambda path, pictures, folder: shards(path / "pq", row_table(pictures, "")),
    "parquet, structs": lambda path, pictures, folder: shards(path / "pq", row_table(pictures, "struct")),
    "parquet, names": lambda path, pictures, folder: shards(path / "pq", row_table(pictures, "names")),
    "parquet, dictionary": lambda path, pictures, folder: shards(path / "pq", row_table(pictures, "names dictionary")),
    "parquet of datasets": lambda path, pictures, folder: hugging_face(path / "hf", pictures, "parquet"),
    "arrow of datasets": lambda path, pictures, folder: hugging_face(path / "hf", pictures, "arrow"),
    "webdataset, cls": lambda path, pictures, folder: web_dataset(path / "w", pictures, lambda i: {"cls": LABELS[i]}),
    "webdataset, json": lambda path, pictures, folder: web_dataset(
        path / "w", pictures, lambda i: {"json": {"label": NAMES[LABELS[i]]}}),
    "tar of tars": lambda path, pictures, folder: tar_of_tars(path / "train.tar", pictures),
    **{form: lambda path, pictures, folder, form=form: image_list(path, folder, form)
       for form in ("csv", "tsv", "bare.csv", "jsonl")}}
WITHOUT_NAMES = {"parquet", "parquet, structs", "webdataset, cls", "csv", "bare.csv"}


@pytest.mark.parametrize("form", LABELLED)
def test_images_and_labels_are_those_of_a_folder(form, pictures, folder, expected, tmp_path, capsys):
    source = LABELLED[form](tmp_path, pictures, folder)
    convert(source, tmp_path / "images", "--workers=2")
    found, classes = told(tmp_path / "images")
    assert found == told(expected)[0] and classes == (None if form in WITHOUT_NAMES else NAMES)
    assert len(found) == COUNT and "passed over" not in capsys.readouterr().err
    before = sorted(path.name for path in tmp_path.iterdir())
    convert(source, tmp_path / "images")                          # finished already: nothing is written
    assert "finished already" in capsys.readouterr().out and before == sorted(p.name for p in tmp_path.iterdir())


SEVERAL = [f"c{i}" for i in range(40)]
KEPT = {
    "a few words": lambda path, data: table({"image": data[:2], "label": ["a", "b"]})(path),
    "words of a named column": lambda path, data: table({"image": data, "t": SEVERAL})(path),
    "numbers in a column label": lambda path, data: table({"image": data, "label": [*range(40)]})(path),
    "names in tars": lambda path, data: tarred(*(one for i, file in enumerate(data) for one in (
        (f"{i}.input.png", FILE, file), (f"{i}.cls", FILE, f"c{i}".encode()))))(path)}


@pytest.mark.parametrize("form", KEPT)
def test_labels_that_all_differ_are_labels(form, tmp_path):
    """And WebDataset's keys end at the first dot."""
    (tmp_path / "source").mkdir()
    KEPT[form](tmp_path / "source", [as_file(picture(32, 32, i), "png") for i in range(40)])
    convert(tmp_path / "source", tmp_path / "images", *["--label-column=t"] * ("named" in form))
    labels = [label for _, label in record(tmp_path / "images")["labels"]]
    assert len(labels) in (2, 40) and sorted(labels) == [*range(len(labels))]


CAPTIONED = {
    "parquet": lambda path, pictures, folder: shards(path / "pq", pa.table({"png": pictures, "words": WORDS})),
    "webdataset, json": lambda path, pictures, folder: web_dataset(
        path / "w", pictures, lambda i: {"json": {"caption": WORDS[i]}, "cls": LABELS[i]}),
    "webdataset, txt": lambda path, pictures, folder: web_dataset(
        path / "w", pictures, lambda i: {"txt": "\n".join(WORDS[i])}),
    "webdataset, a field's name": lambda path, pictures, folder: web_dataset(
        path / "w", pictures, lambda i: {"txt": "\n".join(WORDS[i])}, field="input.")}


@pytest.mark.parametrize("form", CAPTIONED)
def test_captions_are_those_of_a_folder(form, pictures, folder, tmp_path, capsys):
    fill(tmp_path / "flat", {f"p{i}.{FORMS[i]}": data for i, data in enumerate(pictures)})
    fill(tmp_path / "flat", {f"p{i}.txt": "\n".join(words).encode() for i, words in enumerate(WORDS)})
    convert(tmp_path / "flat", tmp_path / "expected")
    convert(CAPTIONED[form](tmp_path, pictures, folder), tmp_path / "images")
    found, wanted = told(tmp_path / "images")[0], told(tmp_path / "expected")[0]
    assert {(data, words) for data, _, words in found} == {(data, words) for data, _, words in wanted}
    assert {label for _, label, _ in found} == ({0, 1, 2} if form == "webdataset, json" else {None})
    assert "passed over" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "webdataset", "csv"])
def test_encode_reads_images_of_the_right_size(form, vae_folder, tmp_path):
    """Captions and labels, too; keys are names in the source."""
    files = [as_file(picture(32, 32, i), "png") for i in range(COUNT)]
    fill(tmp_path, {f"flat/{i:08d}.png": data for i, data in enumerate(files)})
    fill(tmp_path, {f"flat/{i:08d}.txt": "\n".join(words).encode() for i, words in enumerate(WORDS)})
    fill(tmp_path, {"flat/dataset.json": json.dumps({"labels": [[f"{i:08d}.png", label] for i, label in
                                                                enumerate(LABELS)]}).encode()})
    encode(tmp_path / "flat", tmp_path / "expected", f"--model-url={vae_folder}")
    if form == "parquet":
        source = shards(tmp_path / "pq", pa.table({"image": files, "label": LABELS, "text": WORDS}), rows=100)
    elif form == "webdataset":
        source = tmp_path / "w.tar"
        with webdataset.TarWriter(str(source)) as writer:
            for i, data in enumerate(files):
                writer.write({"__key__": f"{i:08d}", "png": data, "cls": LABELS[i], "txt": "\n".join(WORDS[i])})
    else:
        lines = [{"path": f"flat/{i:08d}.png", "label": LABELS[i], "text": WORDS[i]} for i in range(COUNT)]
        source = tmp_path / "list.jsonl"
        source.write_text("\n".join(map(json.dumps, lines)))
    named = ["--label-column=label", "--caption-column=text"] if form != "webdataset" else []
    encode(source, tmp_path / "found", f"--model-url={vae_folder}", "--workers=1", *named)
    assert told(tmp_path / "found") == told(tmp_path / "expected")
    assert {(label, words) for _, label, words in told(tmp_path / "found")[0]} == {
        (label, tuple(words)) for label, words in zip(LABELS, WORDS, strict=True)}
    stem = {"parquet": "train-00000-of-00001/", "webdataset": "", "csv": "flat/"}[form]
    assert f"{stem}img-mean-std-00000003.npy" in data_files(tmp_path / "found")


def test_rows_are_read_in_any_order_from_any_process(pictures, tmp_path):
    store = open_source(shards(tmp_path / "pq", row_table(pictures, "struct"), rows=5, group=2))
    names = store.names().tolist()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(COUNT), 3)).tolist()
    assert all(store.read(names[i]) == pictures[i] for i in order)
    child = os.fork()                                             # with a shard open
    if child == 0:
        os._exit(not all(pickle.loads(pickle.dumps(store)).read(names[i]) == store.read(names[i]) == pictures[i]
                         for i in range(COUNT)))
    assert os.waitpid(child, 0)[1] == 0 and store.read(names[-1]) == pictures[-1]


def test_damaged_rows_are_named_and_the_others_are_done(pictures, tmp_path, refused, capsys):
    bad = list(pictures)
    bad[1], bad[4], bad[5] = b"junk", None, b""
    source = shards(tmp_path / "pq", row_table(bad, "struct"), rows=4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        convert(source, tmp_path / "images")
    errors = capsys.readouterr().err
    for shard, row in ((0, 1), (1, 0), (1, 1)):
        assert f"pq/train-{shard:05d}-of-00002.parquet: row {row}:" in errors
    assert ended.value.code == 2 and len(data_files(tmp_path / "images")) == COUNT - 3
    convert(source, tmp_path / "images", "--skip-bad=3")
    assert [label for _, label in record(tmp_path / "images")["labels"]] == [LABELS[i] for i in (0, 2, 3, 6, 7)]


def test_a_killed_conversion_of_parquet_continues(images, tmp_path):
    files = sorted(images.rglob("*.png"))
    labels = [int(file.parent.name == "b") for file in files]
    rows = pa.table({"image": [file.read_bytes() for file in files], "label": labels})
    source, dest = shards(tmp_path / "pq", rows, rows=110, group=7), tmp_path / "killed/out"
    process = subprocess.Popen([sys.executable, "-m", "preprocessing.dataset_tools",
                                *arguments("convert", source, dest, Path())], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(dest.glob("*/*.png"))) < 20:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert (dest / ".unfinished.json").exists() and len(list(dest.glob("*/*.png"))) < len(files)
    main(arguments("convert", source, dest, Path()))
    main(arguments("convert", source, tmp_path / "whole/out", Path()))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    main(arguments("convert", images, tmp_path / "folder/out", Path()))
    assert told(dest)[0] == told(tmp_path / "folder/out")[0]


@pytest.mark.parametrize("command", [convert, encode])
def test_another_column_of_pictures_does_not_continue(command, vae_folder, tmp_path, refused, capsys):
    files = [as_file(picture(32, 32, i), "png") for i in range(4)]
    source = shards(tmp_path / "pq", pa.table({"image": files[:2], "mask": files[2:], "label": [0, 1]}))
    flags = [f"--model-url={vae_folder}"] * (command is encode)
    command(source, tmp_path / "dest", "--image-column=image", *flags)
    line = refused(command, source, tmp_path / "dest", "--image-column=mask", *flags)
    assert "image_column image, now image_column mask" in line
    one = shards(tmp_path / "one", pa.table({"image": files[:2], "label": [0, 1]}))
    for column in (["--image-column=image"], []):                 # the same, named or found
        command(one, tmp_path / "same", *column, *flags)
    assert "finished already" in capsys.readouterr().out


def test_changed_rows_do_not_continue(pictures, tmp_path, refused, capsys):
    """A row's number is its name: without a bad row, the later ones would get the captions of their neighbours."""
    files = [*pictures[:2], b"junk", *pictures[3:]]
    source = shards(tmp_path / "pq", pa.table({"image": files, "text": WORDS}), rows=100)
    assert "--dest" in refused(convert, source, tmp_path / "images").splitlines()[-1]
    next(source.iterdir()).unlink()
    order = [0, 1, *range(3, COUNT)]
    pq.write_table(pa.table({"image": [files[i] for i in order], "text": [WORDS[i] for i in order]}),
                   source / "train-00000-of-00001.parquet")
    assert "other pictures" in refused(convert, source, tmp_path / "images", "--skip-bad=1")


def test_a_table_without_labels(pictures, tmp_path):
    source = shards(tmp_path / "pq", pa.table({"image": pictures, "id": range(COUNT), "height": [3] * COUNT}))
    convert(source, tmp_path / "images", "--label-column=none")
    assert record(tmp_path / "images")["labels"] is None


def test_a_folder_packed_as_a_tar_keeps_its_classes(folder, tmp_path):
    """`tar cf` puts the folder's name before those of the classes."""
    with tarfile.open(tmp_path / "packed.tar", "w") as archive:
        archive.add(folder, "train")
    convert(folder, tmp_path / "expected")
    convert(tmp_path / "packed.tar", tmp_path / "images")
    assert told(tmp_path / "images") == told(tmp_path / "expected")


def test_shards_by_pattern_and_one_split_of_a_folder(pictures, tmp_path, refused):
    """As ImageNet lies on the hub: train, validation and test in one folder."""
    source = shards(tmp_path / "pq", row_table(pictures, ""), rows=4)
    pq.write_table(row_table(pictures, ""), source / "validation-00000-of-00001.parquet")
    assert "train" in (line := refused(convert, source, tmp_path / "images")) and "validation" in line
    convert(f"{source}/train-*", tmp_path / "images")
    convert(source / "validation-00000-of-00001.parquet", tmp_path / "one")
    assert told(tmp_path / "images") == told(tmp_path / "one")


def test_a_picture_in_several_lines_of_a_list_has_their_captions(folder, tmp_path, refused):
    """As Flickr30k's captions.txt; a label may be repeated, too, but not another one."""
    names = [f"photos/{NAMES[LABELS[i]]}/p{i}.{FORMS[i]}" for i in range(COUNT)]
    text = "image,label,caption\n" + "".join(
        f"{name},{LABELS[i]},{word} {i}\n" for word in ("a", "b") for i, name in enumerate(names))
    (tmp_path / "photos").symlink_to(folder)
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "other.csv").write_text(text.replace(",0,b", ",1,b"))
    columns = "--label-column=label", "--caption-column=caption"
    convert(tmp_path / "list.csv", tmp_path / "images", *columns)
    assert {words for _, _, words in told(tmp_path / "images")[0]} == {(f"a {i}", f"b {i}") for i in range(COUNT)}
    assert sorted(label for _, label in record(tmp_path / "images")["labels"]) == sorted(LABELS)
    assert "label ['0', '1']" in refused(convert, tmp_path / "other.csv", tmp_path / "more", *columns)


def test_quotes_are_letters_in_tsv(pictures, tmp_path):
    words = b'image\ttext\n0.png\t"a\n1.png\tb"\n2.png\tc\n'
    fill(tmp_path, {f"{i}.png": pictures[i] for i in range(3)} | {"l.tsv": words})
    convert(tmp_path / "l.tsv", tmp_path / "images")
    assert [*record(tmp_path / "images")["captions"].values()] == [['"a'], ['b"'], ["c"]]


def test_what_datasets_caches_beside_its_shards_is_no_data(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    source = hugging_face(tmp_path / "hf", pictures, "arrow")
    datasets.load_from_disk(source).map(lambda row: row, num_proc=None)
    assert list(source.glob("cache-*.arrow"))
    for found in (source, source / "*.arrow"):
        assert len(open_source(found).names()) == COUNT


# ---- bad input -------------------------------------------------------------------------------------------------------

def table(columns: dict, **files: bytes):
    """A writer of one shard, with other files beside it."""

    def write(path: Path) -> Path:
        pq.write_table(pa.table(columns), path / "a.parquet")
        return fill(path, {name.replace("_", "."): data for name, data in files.items()})

    return write


def listed(name: str, text: str):
    return lambda path: fill(path, {name: text.encode()}) / name


def tarred(*members: tuple, name: str = "a.tar"):
    def write(path: Path) -> Path:
        with tarfile.open(path / name, "w") as archive:
            for member, kind, data in members:
                info = tarfile.TarInfo(member)
                info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
                archive.addfile(info, io.BytesIO(data))
        return path / name

    return write


def cut_at(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def overwritten(write):
    """The second header of a tar with small files is damaged."""

    def damaged(path: Path) -> Path:
        with open(tar := write(path), "r+b") as file:
            file.seek(1024)
            file.write(b"x" * 9)
        return tar

    return damaged


def inner_tar(member: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        info = tarfile.TarInfo(member)
        info.type, info.size = kind, size
        archive.addfile(info, io.BytesIO(bytes(size)))
    return data.getvalue()


def two_shards(first: dict, second: dict):
    def write(path: Path) -> Path:
        for name, columns in (("a", first), ("b", second)):
            pq.write_table(pa.table(columns), path / f"{name}.parquet")
        return path

    return write


def two_files(first: str, second: str):
    def write(path: Path) -> Path:
        for name in (first, second):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"image": P}), path / name)
        return path

    return write


def classed(labels: list, names: list):
    """One shard with names of classes as the library datasets records them."""

    def write(path: Path) -> Path:
        about = json.dumps({"info": {"features": {"n": {"names": names}}}})
        rows = pa.table({"image": P, "n": labels}).replace_schema_metadata({"huggingface": about})
        pq.write_table(rows, path / "a.parquet")
        return path

    return write


P, FILE = [b"x", b"y"], tarfile.REGTYPE
REFUSED = {
    "no images": (table({"label": [0, 1], "text": ["a", "b"]}), [], ["column of images", "label, text"]),
    "two images": (table({"image": P, "mask": P}), [], ["--image-column", "image, mask"]),
    "two numbers": (table({"image": P, "width": [1, 2], "height": [3, 4]}), [], ["--label-column", "width, height"]),
    "words or number": (table({"image": P, "id": [1, 2], "url": ["a", "b"]}), [], ["--caption-column", "id, url"]),
    "two labels": (table({"image": P, "label": [1, 2], "class": [1, 2]}), [], ["--label-column", "label, class"]),
    "unknown column": (table({"image": P, "n": [0, 1]}), ["--label-column=label"], ["label: no column", "are n"]),
    "wrong type": (table({"image": P, "n": [0, 1]}), ["--caption-column=n"], ["another type", "none"]),
    "label of floats": (table({"image": P, "n": [0.5, 1]}), ["--label-column=n"], ["another type"]),
    "captions as labels": (table({"image": P * 16, "label": [*"abcdefghijklmnopqrstuvwxyzABCDEF"]}), [],
                           ["32 of 32 values of label", "--caption-column"]),
    "ids as labels": (table({"image": P * 16, "id": [*range(32)]}), [], ["values of id", "--label-column"]),
    "too few names of classes": (classed([0, 3], ["a", "b", "c"]), [], ["label 3", "3 classes"]),
    "numbers as names of classes": (classed([0, 1], [0, 1]), [], ["2 classes"]),
    "two pictures of a sample": (tarred(("a.png", FILE, b"x"), ("a.b.png", FILE, b"x"), ("a.cls", FILE, b"0")), [],
                                 ["a.tar", "two pictures"]),
    "no label in a row": (table({"image": P, "label": [0, None]}), [], ["a.parquet: row 1", "label None"]),
    "labels of a test split": (table({"image": P, "label": [-1, -1]}), [], ["a.parquet: row 0", "label -1"]),
    "empty name": (table({"image": P * 2, "label": ["a", "a", "a", ""]}), [], ["row 3"]),
    "empty caption": (table({"image": P, "text": ["a", " "]}), [], ["a/00000001", "captions"]),
    "other columns": (two_shards({"image": P, "label": [0, 1]}, {"image": P}), [], ["b.parquet", "a.parquet"]),
    "another type": (two_shards({"image": P, "label": [0, 1]}, {"image": P, "label": ["a", "b"]}), [], ["b.parquet"]),
    "damaged": (lambda path: fill(path, {"a.parquet": b"PAR1junk"}), [], ["a.parquet", "cannot be read"]),
    "no arrow": (lambda path: fill(path, {"a.arrow": b"junk"}), [], ["a.arrow", "cannot be read"]),
    "two forms": (table({"image": P}, b_tar=b""), [], [".parquet, .tar"]),
    "two splits": (two_files("train.parquet", "test.parquet"), [], ["test, train"]),
    "two splits, numbered": (two_files("train-1.parquet", "validation-00000-of-00001.parquet"), [], ["train, valid"]),
    "one stem": (lambda path: two_files("a/0.parquet", "b/0.parquet")(path) / "*/0.parquet", [], ["0 (twice)"]),
    "compressed": (lambda path: fill(path, {"0.tar.gz": b""}), [], ["0.tar.gz", "uncompressed"]),
    "compressed, a file": (lambda path: fill(path, {"0.tgz": b""}) / "0.tgz", [], ["0.tgz", "uncompressed"]),
    "unusable labels": (table({"image": P, "label": [0.0, 1.0]}), [], ["a.parquet: row 0", "label 0.0"]),
    "a mix of labels": (listed("l.jsonl", '{"p": "a.png", "cls": 1}\n{"p": "b.png", "cls": "x"}'), [], ["label 1"]),
    "a null as label": (listed("l.jsonl", '{"p": "a.png", "cls": 1}\n{"p": "b.png", "cls": null}'), [], ["None"]),
    "another column": (listed("l.jsonl", '{"path": "a.png", "label": 1}\n{"path": "b.png"}'), [], ["entry 2"]),
    "no JSON": (listed("l.jsonl", '{"path": "a.png"}\n{'), [], ["line 2"]),
    "ragged": (listed("l.csv", "path,label\na.png,1\nb.png\n"), [], ["entry 2"]),
    "an open quote": (listed("l.csv", 'path,text\na.png,"hi\nb.png,x\n'), [], ["l.csv", "cannot be read"]),
    "label before path": (listed("l.csv", "0,a.png\n1,b.png\n"), [], ["l.csv", "no header"]),
    "a label beyond all": (listed("big.csv", "a.png,20000000\nb.png,1\n"), [], ["big.csv: label 20000000"]),
    "no words": (listed("words.csv", "path,text\na.png,x\nb.png,\n"), [], ["words.csv: b.png: captions"]),
    "named twice": (listed("l.csv", "a.png,1\na.png,2\n"), [], ["twice"]),
    "a list as name": (listed("l.jsonl", '{"p": "a.png"}\n{"p": ["x"]}'), [], ["something else"]),
    "half a character": (listed("l.jsonl", '{"p": "a.png"}\n{"p": "\\ud800.png"}'), [], ["something else"]),
    "half a character first": (listed("l.jsonl", '{"p": "\\ud800.png"}'), [], ["column of images"]),
    "a NUL": (listed("l.jsonl", '{"p": "a.png"}\n{"p": "b\\u0000.png"}'), [], ["something else"]),
    "empty list": (listed("l.csv", ""), [], ["column of images"]),
    "nothing there": (listed("l.csv", "a.png,1\nb.png,2\n"), [], ["2 of 2"]),
    "negative": (listed("l.csv", "a.png,-1\nb.png,0\n"), [], ["label -1"]),
    "leads out": (tarred(("../a.png", FILE, b"x")), [], ["a.tar", "../a.png"]),
    "a link": (tarred(("a.png", tarfile.SYMTYPE, b"")), [], ["a.tar", "a.png"]),
    "leads out, inside": (tarred(("c.tar", FILE, inner_tar("../a.png"))), [], ["../a.png"]),
    "a link inside": (tarred(("c.tar", FILE, inner_tar("a.png", tarfile.LNKTYPE))), [], ["a.png"]),
    "cut between files": (lambda path: cut_at(tarred(("a.png", FILE, b"x"), ("b.png", FILE, b"y"))(path), 1024), [],
                          ["a.tar", "cut off at byte 1024"]),
    "cut inside": (tarred(("c.tar", FILE, inner_tar("a.png", size=900)[:700]), ("d.tar", FILE, inner_tar("b.png"))), [],
                   ["a.tar", "a.png: a link, no file, cut off"]),
    "no tar inside": (tarred(("c.tar", FILE, b"junk" * 200)), [], ["a.tar", "uncompressed"]),
    "damaged later": (overwritten(tarred(("a.png", FILE, b"x"), ("b.png", FILE, b"x"))), [], ["a.tar", "byte 1024"]),
    "some labels": (tarred(("a.png", FILE, b"x"), ("b.png", FILE, b"x"), ("a.cls", FILE, b"0")), [], ["b.png", "None"]),
    "columns of a tar": (tarred(("a.png", FILE, b"x")), ["--label-column=label"], ["a.tar has none"]),
}


@pytest.mark.parametrize(("write", "flags", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(write, flags, words, tmp_path, refused):
    (tmp_path / "source").mkdir()
    line = refused(convert, write(tmp_path / "source"), tmp_path / "images", *flags)
    assert all(word in line for word in words), line
    assert not (tmp_path / "images/dataset.json").exists()


def test_a_shard_that_is_cut_is_named(pictures, tmp_path, refused):
    source = shards(tmp_path / "pq", row_table(pictures, ""), rows=4)
    os.truncate(source / "train-00001-of-00002.parquet", 300)
    assert "train-00001" in refused(convert, source, tmp_path / "images") and not (tmp_path / "images").exists()


def test_parquet_without_pyarrow(pictures, folder, expected, tmp_path, refused, monkeypatch):
    source = shards(tmp_path / "pq", row_table(pictures, ""))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install pyarrow" in refused(convert, source, tmp_path / "images")
    convert(folder, tmp_path / "images")                          # nothing else needs it


def test_a_library_that_cannot_be_loaded_is_named():
    with pytest.raises(UserError, match="a: libx.so: cannot open"), naming("a"):
        raise ImportError("libx.so: cannot open")                 # the loader's errors have no name


def test_a_pyarrow_that_runs_code_is_refused(pictures, tmp_path, refused, monkeypatch):
    source = shards(tmp_path / "pq", row_table(pictures, ""))
    monkeypatch.setattr(pa, "__version__", "14.0.0")
    assert "14.0.0" in refused(convert, source, tmp_path / "images")


def arrow(path: Path, columns: dict) -> None:
    rows = pa.table(columns)
    with pa.ipc.new_stream(path, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)


def parquet(columns: dict, **options):
    return lambda path: pq.write_table(pa.table(columns), f"{path}/a.parquet", compression="zstd", **options)


LARGE = [bytes(5 << 20)] * 3
BOMBS = {"pages": parquet({"image": LARGE}, use_dictionary=False), "a dictionary": parquet({"image": LARGE}),
         "structs": parquet({"image": [{"bytes": one} for one in LARGE]}),
         "words": parquet({"image": P, "text": ["a" * (5 << 20)] * 2}),
         "rows": parquet({"image": pa.nulls(10**5, pa.binary())}),
         "Arrow": lambda path: arrow(f"{path}/a.arrow", {"image": LARGE})}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_does_not_take_much_memory(kind, tmp_path):
    BOMBS[kind](tmp_path)
    with pytest.raises(UserError, match=r"a\.(parquet|arrow).*the limit is"):
        (store := open_source(tmp_path)).described()
        store.read(store.names()[0])


def test_paths_of_a_list_cannot_lead_out_of_the_destination(tmp_path, vae_folder, refused):
    fill(tmp_path, {"a.png": as_file(picture(32, 32), "png"), "lists/l.csv": b"../a.png,0\n"})
    convert(tmp_path / "lists/l.csv", tmp_path / "images")        # numbers them
    line = refused(encode, tmp_path / "lists/l.csv", tmp_path / "x/moments", f"--model-url={vae_folder}")
    assert "../" in line and not (tmp_path / "x").exists()


def test_a_row_of_another_process_or_a_cut_shard_raises_one_sentence(pictures, tmp_path):
    store = open_source(shards(tmp_path / "pq", row_table(pictures, ""), rows=4))
    name = store.names()[-1]
    os.truncate(tmp_path / "pq/train-00001-of-00002.parquet", 100)
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: row 3: cannot be read"):
        store.read(name)
