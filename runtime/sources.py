"""Pictures as others keep them, read in place as a Store: tars, parquet shards, Arrow folders, image lists.

`described` is what a dataset.json would say of them: labels, names of the classes, captions.
"""

import contextlib
import csv
import functools
import glob
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime import stores
from runtime.files import PASSING, read_patiently
from runtime.messages import MayPass, UserError
from runtime.stores import IMAGE_EXTENSIONS, FolderStore, Store, ZipStore, is_zip_name, open_store, parse_json, shown

SHARDS, LISTS = (".arrow", ".parquet", ".tar"), (".csv", ".jsonl", ".tsv")
PASSED_OVER = re.compile(r"\.|cache-[0-9a-f]{16}.*\.arrow")       # the library datasets leaves caches beside its shards
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}|(train|test|valid|validation|val|dev)(?![a-z])")
LABELS, CAPTIONS = ("label", "labels", "class", "cls"), ("caption", "captions", "text")  # usual names of columns
# Kinds of columns, by pyarrow's name of their type; the library datasets keeps bytes and path of a picture.
KINDS = {"image": r"(large_)?binary|struct<(.*, )?bytes: (large_)?binary", "number": r"u?int[0-9]+",
         "words": r"(large_)?string|(large_)?list<[a-z]+: (large_)?string"}


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Raise what a library of another format raises as a UserError that names `where`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{where}: {shown(str(error))}; (re)install it: pip install {error.name or ''}") from None
    except Exception as error:                                    # of any kind
        kind = MayPass if getattr(error, "errno", None) in PASSING else UserError
        raise kind(f"{where}: cannot be read ({shown(str(error))[:200]}); download or write it again") from error


def as_labels(values: dict[str, Any], where: Callable[[str], str], classes: list | None = None,
              found: str | None = None) -> dict:
    """"labels" and "classes" of dataset.json, from labels by name: whole numbers, or words, whose rank is the label.

    `where(name)` names a picture in messages; `classes` are names of whole numbers; `found` is the column if it was
    found rather than named. Raises UserError for other labels, for other `classes`, and if those found in 32 rows or
    more look like captions or like numbers of rows.
    """
    if values and all(isinstance(value, str) and re.fullmatch("-?[0-9]{1,9}", value) for value in values.values()):
        values = {name: int(value) for name, value in values.items()}
    kind = str if any(isinstance(value, str) for value in values.values()) else int
    for name, value in values.items():
        if type(value) is not kind or (value < 0 if kind is int else not value.strip()):
            raise UserError(f"{where(name)}: label {shown(str(value))[:60]}, expected name or number >= 0; correct it")
    several = sorted(set(values.values()))
    if found and 2 * len(several) > len(values) >= 32 and (kind is str or not classes and found not in LABELS):
        raise UserError(f"{where('')}: {len(several)} of {len(values)} values of {shown(found)} differ, as captions or "
                        "numbers of rows do; give --label-column or --caption-column")
    if kind is str:
        classes = several
    elif classes and not (all(isinstance(one, str) for one in classes) and max(several, default=0) < len(classes)):
        raise UserError(f"{where('')}: label {max(several)}, but names of {len(classes)} classes; write it again")
    rank = {value: i for i, value in enumerate(classes or ())}
    return {"labels": [[name, rank.get(value, value)] for name, value in values.items()], "classes": classes}


# ---- tars ------------------------------------------------------------------------------------------------------------

def _members(file: IO, end: int, folder: str, nested: bool = False) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files of the tar that begins where `file` stands, up to `end`.

    Files of a tar in it are named TAR/NAME. Raises what tarfile does, and ValueError for what is no plain file.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()                               # it keeps all of them
            name, start, size = member.name.removeprefix("./"), member.offset_data, member.size
            if member.isreg() and not member.issparse() and 0 <= size <= end - start and is_zip_name(name):
                if name.endswith(".tar") and not nested:
                    file.seek(start)
                    yield from _members(file, start + size, f"{Path(name).stem}/", nested=True)
                else:
                    yield folder + name, start, size
            elif not member.isdir():
                raise ValueError(f'{name}: a link, no file, cut off, or no relative name without ".."')
        file.seek(archive.offset)                                 # tarfile takes a damaged header for the end
        if file.read(max(0, min(tarfile.BLOCKSIZE, end - archive.offset))) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"damaged or cut off at byte {archive.offset}")


def sample_key(member: bytes) -> bytes:
    """The key of a WebDataset's sample: a member's name up to the first dot of its last part."""
    return re.sub(rb"\.[^/]*$", b"", member)


class TarStore(ZipStore):
    """The files of an uncompressed tar, or of several as TAR/NAME (WebDataset), read by offset like those of a zip.

    A tar in a tar is listed likewise (ILSVRC's train, a tar for each class).
    """

    def __init__(self, path: str | Path, tars: list[str]):
        super().__init__(path)
        self._tars, self.told = tars, []                          # `told`: files beside pictures that gave labels

    @functools.cached_property
    def directory(self) -> tuple[np.ndarray, np.ndarray]:
        """Names (n,) of all files, sorted; and (n, 3) int64: index of the tar, offset, size."""
        names, table = [], []
        for i, tar in enumerate(self._tars):
            folder = "" if tar == self.path else f"{Path(tar).stem}/"
            with naming(f"{shown(tar)}: as an uncompressed tar of plain files"), open(tar, "rb") as file:
                for name, offset, size in _members(file, os.path.getsize(tar), folder):
                    names.append(os.fsencode(name))
                    table.append((i, offset, size))
        return self._sorted(names, table, 3)

    def _label(self, picture: bytes) -> int | str | None:
        """What `.cls` or the field "label" of `.json` beside a picture says, None without one."""
        for stem in (os.path.splitext(picture)[0], sample_key(picture)):
            if stem + b".cls" in self:
                self.told.append(stem + b".cls")
                return os.fsdecode(self.read(stem + b".cls")).strip()
            file = stem + b".json"
            content = parse_json(self.read(file), self.where(file)) if file in self else None
            if isinstance(content, dict) and isinstance(content.get("label"), int | str):
                self.told.append(file)
                return content["label"]
        return None

    def described(self) -> dict:
        pictures = [name for name in self.names().tolist() if name.lower().endswith(IMAGE_EXTENSIONS)]
        values = {os.fsdecode(name): self._label(name) for name in pictures}
        labelled = any(value is not None for value in values.values())
        if labelled and len({*map(sample_key, pictures)}) < len(pictures):
            raise UserError(f"{shown(self.path)}: two pictures of one sample, as 1.png and 1.mask.png are; keep one")
        return as_labels(values, self.where) if labelled else {}

    def read(self, name: bytes | str) -> bytes:
        tar, offset, size = self._entry(name)

        def fetch() -> bytes:
            with open(self._tars[tar], "rb") as file:
                return os.pread(file.fileno(), size, offset)

        if len(data := read_patiently(fetch, self.where(name))) != size:
            raise UserError(f"{self.where(name)}: the tar was cut since it was listed; write it again")
        return data


# ---- tables ----------------------------------------------------------------------------------------------------------

def choose(kinds: dict[str, str], named: dict[str, str | None], where: str, classes: set[str] = frozenset()
           ) -> dict[str, str | None]:
    """The columns "image", "label" and "caption" (or None) of columns whose kinds are image, number, words or other;
    and "found", that of the label if it was not named.

    They are those `named`; without a named label or caption, those with a usual name or among `classes`; else the only
    one of numbers or words. Raises UserError, naming `where` and the candidates, if one is missing or ambiguous.
    """
    fitting = {flag: [name for name, kind in kinds.items() if kind in wanted] for flag, wanted in (
        ("image", ("image",)), ("label", ("number", "words")), ("caption", ("words",)))}

    def only(flag: str, candidates: list[str]) -> str | None:
        if len(candidates) > 1:
            raise UserError(f"{where}: give --{flag}-column, one of {', '.join(map(shown, candidates))}")
        return candidates[0] if candidates else None

    for flag, name in named.items():
        if name not in (None, *fitting[flag]) and (name != "none" or flag == "image"):
            raise UserError(f"--{flag}-column {shown(name)}: {'of another type' if name in kinds else 'no column'} in "
                            f"{where}; candidates are {', '.join(map(shown, fitting[flag])) or 'none'}")
    image, label, caption = named["image"] or only("image", fitting["image"]), named["label"], named["caption"]
    if image is None:
        raise UserError(f"{where}: no column of images, or of paths of images, among {', '.join(map(shown, kinds))}")
    if label is None and caption is None:
        label, caption = (only(flag, [name for name, kind in kinds.items() if name in usual and kind != "image"])
                          for flag, usual in (("label", {*LABELS, *classes}), ("caption", {*CAPTIONS} - classes)))
    if label is None and caption is None:
        label = only("label-column or --caption", fitting["label"])
        label, caption = (None, label) if kinds.get(label) == "words" else (label, None)
    label, caption = (None if name == "none" and name not in kinds else name for name in (label, caption))
    return {"image": image, "label": label, "caption": caption, "found": label if named["label"] is None else None}


def require_ratio(size: int, stored: int) -> None:
    """Raise ValueError if `stored` bytes of a file from elsewhere would become too large a `size` in memory."""
    if size > (limit := stores.SMALL + stores.MAX_RATIO * stored):
        raise ValueError(f"{size} bytes, stored in {stored}; the limit is {limit}")


def _shard(path: str) -> tuple[Any, list[int], Callable[[int, str, int], Iterator]]:
    """The schema of a parquet or Arrow file, the numbers of rows of its groups, and a function of group, column and
    number of rows in memory that yields arrays of values. Raises what pyarrow does, and as `require_ratio`.
    """
    import pyarrow.ipc
    import pyarrow.parquet

    if int(pyarrow.__version__.partition(".")[0]) < 15:           # earlier ones ran code of a file (CVE-2023-47248)
        raise UserError(f"{shown(path)}: pyarrow {pyarrow.__version__} is too old; `pip install -U pyarrow`")
    if path.endswith(".parquet"):
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)             # 0 would read a whole group
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        # 100: the name of a row
        require_ratio(sum(one.total_byte_size + 100 * one.num_rows for one in groups), os.path.getsize(path))
        return file.schema_arrow, [one.num_rows for one in groups], lambda group, column, rows: (
            batch.column(0) for batch in file.iter_batches(rows, [group], [column], use_threads=False))
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()          # still on the disk, if uncompressed
    require_ratio(table.nbytes + 100 * table.num_rows, os.path.getsize(path))
    return table.schema, [table.num_rows], lambda _, column, rows: iter(table.column(column).chunks)


def _columns(schema: Any) -> tuple[dict[str, str], dict[str, list]]:
    """The kinds of a schema's columns, for `choose`, and the names of classes that the library datasets records."""
    forms = {field.name: str(field.type).removeprefix("dictionary<values=") for field in schema}
    kinds = {name: next((kind for kind, pattern in KINDS.items() if re.match(pattern, form)), "other")
             for name, form in forms.items()}
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return kinds, {name: one["names"] for name, one in features.items()
                   if isinstance(one, dict) and isinstance(one.get("names"), list)}


class RowStore(FolderStore):
    """Pictures that are rows with a label or captions.

    Subclasses have `columns`, see `choose`, and `values(column)`, by name; those of None may be anything.
    """

    classes: list | None = None                                   # their names, where the source records them

    def listing(self) -> tuple[np.ndarray, np.ndarray]:
        return np.sort(np.array([*map(os.fsencode, self.values(None))], dtype=bytes)), np.array([], dtype=bytes)

    def __contains__(self, name: bytes | str) -> bool:
        return False                                              # no dataset.json

    def described(self) -> dict:
        label, caption = self.columns["label"], self.columns["caption"]
        found = {"labels": None} if label is None else as_labels(
            self.values(label), self.where, self.classes, self.columns.get("found"))
        return found | ({} if caption is None else {"captions": self.values(caption)})


class TableStore(RowStore):
    """The pictures in a column of parquet or Arrow shards. A row's name is SHARD/00000012.png, whatever its format.

    Rows are read forwards, one at a time; names, labels and captions are in memory.
    """

    def __init__(self, path: str | Path, shards: list[str], named: dict[str, str | None]):
        """Raises UserError for an unreadable shard, and for columns as `choose` does."""
        super().__init__(path)
        self._shards, self._bounds, first = {Path(shard).stem: shard for shard in shards}, {}, None
        self._cursor: tuple | None = None                         # see `read`
        for stem, path in self._shards.items():
            with naming(shown(path)):
                schema, groups, _ = _shard(path)
                self._bounds[stem], (kinds, names) = np.cumsum([0, *groups]), _columns(schema)
            if first is None:
                first, self.columns = kinds, choose(kinds, named, shown(path), set(names))
                self.classes = names.get(self.columns["label"])
            if any(kinds.get(column) != first.get(column) for column in self.columns.values()):
                raise UserError(f"{shown(path)}: other columns than {shown(shards[0])} has; give shards of one set")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cursor": None}

    def described(self) -> dict:
        """Also what changes with the rows: a row's number is its name, so only the same rows may be continued."""
        found = super().described()
        return found | {"rows": [[*map(os.path.getsize, self._shards.values())], found.get("captions")]}

    def values(self, column: str | None) -> dict[str, Any]:
        found = {}
        for stem, path in self._shards.items():
            values = range(self._bounds[stem][-1])
            if column is not None:
                with naming(f"{shown(path)}: column {shown(column)}"):
                    _, groups, batches = _shard(path)
                    parts = (part for i in range(len(groups)) for part in batches(i, column, 1024))
                    values = [value for part in parts for value in part.to_pylist()]
            found |= {f"{stem}/{row:08d}.png": value for row, value in enumerate(values)}
        return found

    def _place(self, name: bytes | str) -> tuple[str, int] | None:
        stem, _, row = os.fsdecode(name).removesuffix(".png").rpartition("/")
        return (stem, int(row)) if stem in self._shards else None

    def where(self, name: bytes | str) -> str:
        place = self._place(name)
        return shown(f"{self._shards[place[0]]}: row {place[1]}" if place else self.path)

    def read(self, name: bytes | str) -> bytes:
        with naming(self.where(name)):
            stem, row = self._place(name)
            group = int(np.searchsorted(self._bounds[stem], row, side="right")) - 1
            place = os.getpid(), stem, group                      # a file open in two processes has one position
            (before, after, values), self._cursor = self._cursor or (None, 0, None), None         # None after an error
            if before != place or row < after:
                parts = _shard(self._shards[stem])[2](group, self.columns["image"], 1)
                after, values = int(self._bounds[stem][group]), itertools.chain.from_iterable(parts)
            value = next(itertools.islice(values, row - after, None)).as_py()
            self._cursor = place, row + 1, values
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise UserError(f"{self.where(name)}: holds no picture, or only its path; write it with the bytes")
        return data


# ---- lists -----------------------------------------------------------------------------------------------------------

def _records(path: str) -> list[dict]:
    """The lines of a list: CSV, or TSV without quotes, with a header, or without one as path and label; JSON lines with
    equal names."""
    text = FolderStore("").read(path).decode("utf-8-sig", "surrogateescape")
    if path.endswith(".jsonl"):
        lines = [parse_json(line.encode("utf-8", "surrogateescape"), f"{shown(path)}: line {i}")
                 for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {"strict": True}
        with naming(shown(path)):
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), **form) if row] or [[]]
        first = [*map(_is_picture, rows[0])]
        if any(first) and first not in ([True], [True, False]):
            raise UserError(f"{shown(path)}: has no header, nor path and label; name the columns in its first line")
        head = ["path", "label"][:len(first)] if any(first) else rows.pop(0)
        lines = [dict(zip(head, row, strict=True)) if len(row) == len(head) else None for row in rows]
    for i, line in enumerate(lines, 1):
        if not isinstance(line, dict) or line.keys() != lines[0].keys():
            raise UserError(f"{shown(path)}: entry {i} has other columns than the first; correct it")
    return lines


def _is_picture(value: object) -> bool:
    """Whether it can be a picture's name. JSON can hold NUL and half characters, which no file's name has."""
    return (isinstance(value, str) and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)
            and os.fsencode(value).lower().endswith(IMAGE_EXTENSIONS))


def _kind(values: list) -> str:
    """For `choose`, of a column of a list."""
    if _is_picture(values[0]):
        return "image"
    if all(type(value) is int or isinstance(value, str) and value.isdecimal() for value in values):
        return "number"
    return "words" if all(isinstance(value, str | list | int | None) for value in values) else "other"


class ListStore(RowStore):
    """The pictures that a list (CSV, TSV, JSON lines) names, by paths from its own folder.

    One in several lines has the captions of all.
    """

    def __init__(self, path: str, named: dict[str, str | None]):
        """Raises UserError for an unreadable list, and for columns as `choose` does."""
        super().__init__(Path(path).parent)
        self._file, records = path, _records(path)
        kinds = {name: _kind([record[name] for record in records]) for name in (records or [{}])[0]}
        self.columns = choose(kinds, named, shown(path))
        pictures = [record[self.columns["image"]] for record in records]
        if not all(map(_is_picture, pictures)) or len({*pictures}) < len(pictures) and not self.columns["caption"]:
            raise UserError(f"{shown(path)}: names a picture twice, or something else than a picture; correct it")
        self._records = {name: [] for name in pictures}
        for name, record in zip(pictures, records, strict=True):
            self._records[name].append(record)

    def values(self, column: str | None) -> dict[str, Any]:
        found = {name: [record.get(column) for record in records] for name, records in self._records.items()}
        return {name: values if len({*map(str, values)}) > 1 else values[0] for name, values in found.items()}

    def where(self, name: bytes | str) -> str:
        return super().where(name) if os.fsdecode(name) in self._records else shown(self._file)


def open_source(path: str | Path, image_column: str | None = None, label_column: str | None = None,
                caption_column: str | None = None) -> Store:
    """As `open_store`, and what others keep pictures in: a list (LISTS), or shards (SHARDS) of one data set.

    Shards are a file, a folder that holds neither pictures nor folders, or a pattern like DIR/train-*.parquet. Raises
    UserError for shards of two forms or splits or with one name, for columns as `choose` does, and for columns where
    there are none.
    """
    path, named = str(path), {"image": image_column, "label": label_column, "caption": caption_column}
    inside = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else (
        [path] if os.path.exists(path) else glob.glob(path))
    inside = sorted(name for name in inside if not PASSED_OVER.match(os.path.basename(name)))
    plain = os.path.isdir(path) and any(_is_picture(name) or os.path.isdir(name) for name in inside)
    shards = [name for name in inside if name.endswith(SHARDS) and os.path.isfile(name) and not plain]
    forms, stems = sorted({Path(name).suffix for name in shards}), sorted(Path(name).stem for name in shards)
    splits = sorted({found[1] or found[2] for stem in stems if (found := SPLIT.match(stem))})
    twice = sorted({f"{one} (twice)" for one, next_one in itertools.pairwise(stems) if one == next_one})
    if several := next((names for names in (forms, splits) if len(names) > 1), twice):
        pattern = Path(shards[0]).with_name(f"{splits[0] if several is splits else ''}*{Path(shards[0]).suffix}")
        raise UserError(f"{shown(path)}: holds shards of {shown(', '.join(several[:9]))}; give those of one, as in "
                        f"--source '{shown(pattern)}'")
    if squeezed := [name for name in inside if re.search(r"\.(tar\.\w+|tgz)$", name) and not plain]:
        raise UserError(f"{shown(squeezed[0])}: tars must be uncompressed, to be read in place; decompress it")
    if forms and forms[0] != ".tar":
        return TableStore(path, shards, named)
    if path.endswith(LISTS) and os.path.isfile(path):
        return ListStore(path, named)
    if any(named.values()):
        raise UserError(f"--image-column, --label-column, --caption-column: {shown(path)} has none; leave them out")
    return TarStore(shards[0] if len(shards) == 1 else path, shards) if forms else open_store(path)
