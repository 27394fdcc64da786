"""Captions of pictures, from COCO's or another JSON file or from files beside them; and the command that adds them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from dataset import IMAGES, MOMENTS, MOMENTS_EXTENSIONS, find_store
from runtime import stores
from runtime.catalogue import Catalogue, key_of, read_captions, tidy, write_catalogue
from runtime.files import write_whole
from runtime.messages import UserError, say
from runtime.sources import TarStore
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


def _entries(record: object, where: str) -> Iterator[tuple[tuple, object]]:
    """What a record calls each of its pictures, one or more names or numbers, and captions of it."""
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected {{name: caption, ...}} or lines of {{"file_name": ..., "caption": ...}}')
    key, text = (next((record[one] for one in some if one in record), None) for some in (KEYS, FIELDS))
    if isinstance(record.get("annotations"), list):
        try:
            called = {image["id"]: image["file_name"] for image in record.get("images", ())}
            yield from (((called.get(one["image_id"]), one["image_id"]), one["caption"])
                        for one in record["annotations"] if one["caption"].strip())           # some have no words
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not COCO's captions ({shown(repr(error))}); give captions_*.json") from error
    elif key is not None and text is not None:
        yield (key,), text
    else:
        yield from (((key,), text) for key, text in record.items())


def read_file(file: str, index: dict[str | int, bytes | None]) -> dict[bytes, list[str]]:
    """The captions in a file by name, see `index_of`. Raises UserError naming keys of no picture, or of several."""
    data, where = FolderStore("").read(file), shown(file)
    lines = [data] if file.endswith(".json") else [line for line in data.splitlines() if line.strip()]
    records = [parse_json(line, where) for line in lines]
    records = records[0] if file.endswith(".json") and isinstance(records[0], list) else records
    found, unknown = {}, {}
    for keys, text in (entry for record in records for entry in _entries(record, where)):
        name = next((index[key] for key in keys if isinstance(key, str | int) and index.get(key)), None)
        if name is None:
            unknown[str(keys[0] or keys[-1])] = None
        else:
            found.setdefault(name, []).extend(tidy(text, f"{where}: {shown(name)}"))
    if unknown:
        raise UserError(f"{where}: {len(unknown)} keys are of no picture, or of several "
                        f"({few(np.array([*unknown][:4]))}); correct or remove them")
    return found


def read_beside(store: Store, names: np.ndarray, files: set[bytes]) -> dict[bytes, list[str]]:
    """Captions of `names` (n,) from those of `files` that have a picture's stem, which are taken out of it."""
    found = {}
    for name in names.tolist() if files else ():
        for file in (os.path.splitext(name)[0] + extension for extension in (b".txt", b".json")):
            if file in files and name not in found:
                data, where = store.read(file), store.where(file)
                if file.endswith(b".txt"):
                    texts = [line for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()]
                else:
                    content = parse_json(data, where)
                    texts = next((content[one] for one in FIELDS if isinstance(content, dict) and one in content), None)
                if texts is not None:                             # else it holds something else
                    found[name] = tidy(texts, where)
                    files.discard(file)
    return found


def source_captions(store: Store, names: np.ndarray, others: np.ndarray, metadata: dict, file: str | None,
                    begun: np.ndarray, key: Callable[[bytes], bytes] = bytes) -> dict[bytes, list[str]] | None:
    """Captions of the pictures `names` (n,), None if there are none. A notice counts the files that are passed over.

    From `file`, which may also name pictures of `begun`; else from dataset.json, whose content is `metadata`, by `key`;
    else from those of the files `others` that lie beside pictures; in class folders only if most pictures have one.
    """
    keys, left = np.array([key(name) for name in names.tolist()], dtype=bytes), set(others.tolist())
    listed = None if file else read_captions(store, keys, key, metadata)
    if file:
        found = read_file(file, index_of(begun))
    elif listed:
        found = {name: listed[i].split("\n") for i, name in enumerate(names.tolist())}
    else:
        found = read_beside(store, names, left)
        classes = not isinstance(store, TarStore) and all(b"/" in name for name in names.tolist())
        if classes and len(found) < len(names) / 2:               # class folders with stray text files
            found, left = {}, set(others.tolist())
    stores.pass_over(store, others[[name in left for name in others.tolist()]])
    if found or file:
        require_all(found, names, shown(file or store.path))
    return found or None


def require_all(found: dict[bytes, list[str]], names: np.ndarray, where: str) -> None:
    """Raise UserError naming those of `names` (n,) that have no captions."""
    lacking = names[[name not in found for name in names.tolist()]]
    if len(lacking):
        raise UserError(f"{where}: no caption for {len(lacking)} of {len(names)} pictures ({few(lacking)}); add them")


def captions(source: str, captions: str) -> None:
    """Write the captions of a file into dataset.json of the images and the moments below `source`, where they exist.

    The file names images as they are in the data set. Raises UserError before anything is written if it does not name
    all of them, or others.
    """
    found = {}
    for kind, extensions in ((IMAGES, IMAGE_EXTENSIONS), (MOMENTS, MOMENTS_EXTENSIONS)):
        for path in [Path(source, name) for name in kind if Path(source, name).exists()][:1]:
            found[extensions] = Catalogue(stores.open_store(path), extensions, recall=False)
    if not found:
        find_store(Path(source), IMAGES, "images")                # names what is missing
    index = index_of([*found.values()][0].names, by_id=False)
    given = {key_of(name): texts for name, texts in read_file(captions, index).items()}
    changed = []
    for one in found.values():
        require_all(given, one.keys, shown(captions))
        texts = {os.fsdecode(name): given[key_of(name)] for name in one.names.tolist()}
        changed.append(json.dumps({**stores.read_metadata(one.store), "captions": texts}).encode())
    for (extensions, one), content in zip(found.items(), changed, strict=True):
        path, store = Path(one.store.path), one.store
        if isinstance(store, FolderStore):
            write_whole(path / METADATA, lambda partial, content=content: partial.write_bytes(content))
        else:
            names = [name for name in map(os.fsdecode, store.directory[0].tolist()) if name != METADATA]
            stores.write_zip(path, chain(((name, store.read(name)) for name in names), [(METADATA, content)]))
        write_catalogue(path, extensions)
    say(f"{shown(source)}: captions of {len(given)} images")
