"""Captions of pictures, from COCO's or another JSON file or from files beside them; and the command that adds them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from dataset import IMAGES, MOMENTS, MOMENTS_EXTENSIONS, find_store, first_store
from runtime import stores
from runtime.catalogue import Catalogue, key_of, read_captions, require_all, tidy, write_catalogue
from runtime.files import read_patiently, write_whole
from runtime.messages import UserError, say
from runtime.sources import TarStore, sample_key
from runtime.stores import IMAGE_EXTENSIONS, METADATA, FolderStore, Store, few, parse_json, shown

# Of a record, the first of each that it has.
KEYS, FIELDS = ("file_name", "key", "image", "name"), ("caption", "captions", "text")


def index_of(names: np.ndarray, by_id: bool = True) -> dict[str | int, bytes | None]:
    """Map what a file may call pictures to their `names` (n,); None: several are called so.

    That is a path or file name, with or without its extension, a key or, `by_id`, COCO's number at the end of the name.
    """
    index = {}
    for name in names.tolist():
        path = os.fsdecode(name)
        stem = os.path.splitext(path)[0]
        number = re.findall("[0-9]+$", stem) if by_id else ()
        for called in {stem, os.fsdecode(key_of(name)), *map(os.path.basename, (path, stem)), *map(int, number)}:
            index[called] = name if called not in index else None
    return index | {os.fsdecode(name): name for name in names.tolist()}


def _first(record: object, names: tuple[str, ...]) -> object:
    """The first of a record's fields `names` that it has, or None."""
    return next((record[name] for name in names if name in record), None) if isinstance(record, dict) else None


def _entries(record: dict) -> Iterator[tuple[tuple, object]]:
    """What a record calls each of its pictures, one or more names or numbers, and captions of it.

    Raises AttributeError, KeyError or TypeError if it is none.
    """
    key, text, annotations = _first(record, KEYS), _first(record, FIELDS), record.get("annotations")
    if isinstance(annotations, list):                             # COCO's, of which some have no words
        called = {image["id"]: image["file_name"] for image in record.get("images", ())}
        yield from (((called.get(one["image_id"]), one["image_id"]), one["caption"])
                    for one in annotations if one["caption"].strip())
    elif key is not None and text is not None:
        yield (key,), text
    else:
        yield from (((key,), text) for key, text in record.items())


def read_file(file: str, index: dict[str | int, bytes | None]) -> dict[bytes, list[str]]:
    """The captions in a file by name, see `index_of`. Raises UserError naming keys of no picture, or of several."""
    where, whole = shown(file), file.endswith(".json")
    data = read_patiently(Path(file).read_bytes, where)
    records = [parse_json(part, where) for part in ([data] if whole else filter(bytes.strip, data.splitlines()))]
    try:
        records = records[0] if whole and isinstance(records[0], list) else records
        entries = [entry for record in records for entry in _entries(record)]
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f'{where}: no captions ({shown(repr(error))}); expected {{name: caption, ...}}, lines of '
                        '{"file_name": ..., "caption": ...} or COCO\'s captions_*.json') from error
    found, unknown = {}, {}
    for keys, text in entries:
        name = next((index[key] for key in keys if isinstance(key, str | int) and index.get(key)), None)
        if name is None:
            unknown[str(keys[0] or keys[-1])] = None
        else:
            found.setdefault(name, []).extend(tidy(text, f"{where}: {shown(name)}"))
    if unknown:
        raise UserError(f"{where}: {len(unknown)} keys are of no picture, or of several "
                        f"({few(np.array([*unknown][:4]))}); correct or remove them")
    return found


def read_beside(store: Store, names: np.ndarray, others: np.ndarray) -> tuple[dict[bytes, list[str]], list[bytes]]:
    """Captions of `names` (n,) from those of the files `others` (m,) that have a picture's stem; and these files.

    In a tar also its `sample_key`.
    """
    found, used = {}, []
    stems = {sample_key(name): name for name in names.tolist()} if isinstance(store, TarStore) else {}
    stems |= {os.path.splitext(name)[0]: name for name in names.tolist()} if len(others) else {}
    for file in others[::-1].tolist():                            # .txt comes before .json
        (stem, extension), where = os.path.splitext(file), store.where(file)
        texts = None
        if stem in stems and extension == b".txt":
            try:
                texts = [line for line in store.read(file).decode("utf-8-sig").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
        elif stem in stems and extension == b".json":
            texts = _first(parse_json(store.read(file), where), FIELDS)
        if texts is not None:                                     # else it holds something else
            found[stems.pop(stem)] = tidy(texts, where)
            used.append(file)
    return found, used


def source_captions(store: Store, names: np.ndarray, others: np.ndarray, metadata: dict, file: str | None,
                    begun: np.ndarray, key: Callable[[bytes], bytes] = bytes) -> dict[bytes, list[str]] | None:
    """Captions of the pictures `names` (n,), None if there are none. A notice counts the files that are passed over.

    From `file`, which may also name pictures of `begun`; else from dataset.json, whose content is `metadata`, by `key`;
    else from those of the files `others` that lie beside pictures; in class folders only if most pictures have one.
    """
    used, keys = [], np.array([key(name) for name in names.tolist()], dtype=bytes)
    if file:
        found = read_file(file, index_of(begun))
    elif listed := read_captions(store, keys, key, metadata):
        found = {name: listed[i].split("\n") for i, name in enumerate(names.tolist())}
    else:
        found, used = read_beside(store, names, others)
        classes = not isinstance(store, TarStore) and all(b"/" in name for name in names.tolist())
        if classes and len(found) < len(names) / 2:               # class folders with stray text files
            found, used = {}, []
    stores.pass_over(store, others[~np.isin(others, [*used, *getattr(store, "told", ())])])
    if found or file:
        require_all(found, "caption", shown(file or store.path), names)
    return found or None


def captions(source: str, captions: str) -> None:
    """Write the captions of a file into dataset.json of the images and the moments below `source`, where they exist.

    The file names images as they are in the data set. Raises UserError before anything is written if it does not name
    all of them, or others.
    """
    kinds = ((IMAGES, IMAGE_EXTENSIONS), (MOMENTS, MOMENTS_EXTENSIONS))
    found = [(Catalogue(store, extensions, recall=False), extensions) for candidates, extensions in kinds
             if (store := first_store(Path(source), candidates))]
    if not found:
        find_store(Path(source), IMAGES, "images")                # names what is missing
    index = index_of(found[0][0].names, by_id=False)
    given = {key_of(name): texts for name, texts in read_file(captions, index).items()}
    for one, _ in found:
        require_all(given, "caption", shown(captions), one.keys)
    for one, extensions in found:
        path, store = Path(one.store.path), one.store
        texts = {os.fsdecode(name): given[key] for name, key in zip(one.names.tolist(), one.keys.tolist(), strict=True)}
        content = json.dumps({**one.metadata, "captions": texts}).encode()
        if isinstance(store, FolderStore):
            write_whole(path / METADATA, lambda partial, content=content: partial.write_bytes(content))
        else:
            kept = [name for name in map(os.fsdecode, store.directory[0].tolist()) if name != METADATA]
            stores.write_zip(path, chain(((name, store.read(name)) for name in kept), [(METADATA, content)]))
        write_catalogue(path, extensions)
    say(f"{shown(source)}: captions of {len(given)} images")
