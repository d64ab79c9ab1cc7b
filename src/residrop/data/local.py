"""A user's own images: folders of files and of parquet shards, with their classes, splits and damaged images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from residrop.common.errors import ConfigError, DataError
from residrop.data.decoded import decoded_or_build, fingerprint
from residrop.data.folders import TEST, Listing, decode_files, list_folder, unreadable
from residrop.data.remarks import named, remark
from residrop.data.request import Found, Request
from residrop.data.splits import Files, Images, renumber, select, stratified, take_apart

__all__ = ["load_parquet", "load_tree", "stand_ins"]

_IN_MEMORY_BYTES = 1 << 30  # an image folder that decodes to more streams through workers


def _divided(request: Request, has_test: bool, where: Path, missing: str) -> bool:
    """Whether the test part is to be held out of the training part."""
    if request.split is None:
        if not has_test:
            advice = f"add {missing}, or hold out a share of every class with --split 0.2"
            raise DataError(f"{where}: images to train on but none for testing; {advice}")
        return False
    if has_test and "train" in request.wanted:
        raise ConfigError(f"split={request.split}: {where} has a test part of its own; leave split out")
    return not has_test


def _kept(total: int, skipped: Tensor, names: Sequence[str], where: str) -> Tensor:
    """The numbers of the images that could be read; a remark counts and names the others."""
    if len(skipped):
        remark(f"{where}: {len(skipped)} of {total} images cannot be read and are left out: {named(names, 10)}")
    keep = torch.ones(total, dtype=torch.bool)
    keep[skipped] = False
    return keep.nonzero().flatten()


# Parquet


def load_parquet(request: Request) -> Found:
    """Read parquet:DIR."""
    from residrop.data.parquet import decode_shards, shard_labels, test_shards  # loads pyarrow
    from residrop.data.shards import find_shards

    folder = request.existing()
    parts = find_shards(folder)
    test = test_shards(parts, folder)
    if "train" not in parts and ("train" in request.wanted or test is None):
        raise DataError(f"{folder}: no train-*.parquet; name the folder that holds the shards")
    divided = _divided(request, test is not None, folder, "test-*.parquet or validation-*.parquet with labels")
    classes, found = request.classes, dict[str, Images | Files]()
    for name in ("train",) if divided else request.wanted:
        files = parts["train"] if name == "train" else test
        assert files is not None
        labels, classes = shard_labels(files, classes)
        decode = partial(decode_shards, files, len(labels), request.size)
        key = f"parquet-{name}" + (f"-{request.size}" if request.size else "")
        mark = fingerprint(folder, files, f"{name} {request.size}")
        tensors = decoded_or_build(folder, key, mark, partial(decode, request.skip), request.cache)
        if len(tensors["skipped"]) and not request.skip:
            tensors = decode(skip=False)  # raises what is wrong with the first
        rows = [f"row {row} of {name}" for row in tensors["skipped"].tolist()]
        kept = _kept(len(labels), tensors["skipped"], rows, f"{folder}, {name}")
        found[name] = Images(tensors["pixels"], labels[kept])
        if divided:
            assert request.split is not None
            held_out = stratified(labels[kept], classes, request.split, [str(row) for row in kept.tolist()])
            found["train"], found["test"] = take_apart(found["train"], held_out)
    assert classes is not None
    sizes = {part.pixels.shape[-1] for part in found.values() if isinstance(part, Images)}
    if len(sizes) > 1:
        text = " and ".join(f"{size}x{size}" for size in sorted(sizes))
        raise DataError(f"{folder}: its parts have images of {text} pixels; resize them with parquet:DIR?size=N")
    return Found(found, classes)


# Folders


def load_tree(request: Request, size: int, shorter: int = 0, test_names: Sequence[str] = TEST) -> Found:
    """Read folder:DIR or, with a `shorter` edge, imagenet:DIR."""
    folder = request.existing()
    has_test = any((folder / name).is_dir() for name in test_names)
    has_train = (folder / "train").is_dir()
    if has_test and not has_train and "train" in request.wanted:
        raise DataError(f"{folder}: no folder train; expected train/<class>/<image> in it")
    divided = _divided(request, has_test, folder, f"a folder {' or '.join(test_names)} beside train")
    parts = list_folder(folder, test_names, ("train",) if divided else request.wanted)
    if divided:
        parts = _divide(next(iter(parts.values())), request)
    classes = request.classes or (parts.get("train") or parts["test"]).names
    labels = {name: renumber(part.labels, part.names, classes, str(part.folder)) for name, part in parts.items()}
    images = sum(len(part.paths) for part in parts.values())
    if shorter or request.listed is not None or images * 3 * size * size >= _IN_MEMORY_BYTES:
        return _streamed(request, parts, labels, classes, Files((), torch.empty(0), size, shorter))
    found = dict[str, Images | Files]()
    for name, part in parts.items():
        mark = fingerprint(folder, part.paths, f"{name} {size}")
        decode, key = partial(decode_files, part.paths, size), f"folder-{name}-{size}"
        tensors = decoded_or_build(folder, key, mark, partial(decode, request.skip), request.cache)
        if len(tensors["skipped"]) and not request.skip:
            tensors = decode(skip=False)  # raises what is wrong with the first
        rows = [str(part.paths[row].relative_to(part.folder)) for row in tensors["skipped"].tolist()]
        kept = _kept(len(part.paths), tensors["skipped"], rows, f"{part.folder}")
        found[name] = Images(tensors["pixels"], labels[name][kept])
    return Found(found, classes)


def _names_of(part: Listing) -> list[str]:
    above = len(part.folder.as_posix()) + 1
    return [path.as_posix()[above:] for path in part.paths]


def _divide(whole: Listing, request: Request) -> dict[str, Listing]:
    """Hold out the test part; None of what a continued run has trained on is in it."""
    assert request.split is not None
    names = _names_of(whole)
    chosen = set(stratified(whole.labels, whole.names, request.split, names).tolist())
    if request.listed is not None:
        trained = set(request.listed)
        chosen = {number for number in chosen if names[number] not in trained}
    index = {
        "train": [number for number in range(len(names)) if number not in chosen],
        "test": sorted(chosen),
    }
    return {
        name: replace(whole, paths=tuple(whole.paths[i] for i in numbers), labels=whole.labels[numbers])
        for name, numbers in index.items()
        if name in request.wanted
    }


def _streamed(
    request: Request, parts: dict[str, Listing], labels: dict[str, Tensor], classes: tuple[str, ...], form: Files
) -> Found:
    """The parts as files to be decoded batch by batch, of the size of `form`."""
    found, names = dict[str, Images | Files](), dict[str, list[str]]()
    for name, part in parts.items():
        files, names[name] = replace(form, paths=part.paths, labels=labels[name]), _names_of(part)
        if request.skip:
            mark = fingerprint(request.existing(), part.paths)
            skipped = decoded_or_build(
                request.existing(),
                f"readable-{name}",
                mark,
                lambda part=part, name=name: {
                    "skipped": torch.tensor(list(unreadable(part.paths, f"checking {name}")))
                },
                request.cache,
            )["skipped"].to(torch.int64)
            bad = [names[name][row] for row in skipped.tolist()]
            kept = _kept(len(files), skipped, bad, str(part.folder))
            files, names[name] = select(files, kept), [names[name][row] for row in kept.tolist()]  # pyright: ignore
        found[name] = files
    if "train" not in parts:
        return Found(found, classes)
    if request.listed is None:
        return Found(found, classes, tuple(names["train"]))
    place, present = parts["train"].folder, set(names["train"])
    gone = [name for name in request.listed if name not in present]
    if 2 * len(gone) > len(request.listed):
        missing = f"{len(gone)} of the {len(request.listed)} images that the run was started on are missing"
        raise DataError(f"{place}: {missing} ({named(gone)}); give the folder that it was started on")
    if gone:
        remark(
            f"{place}: gone since this run began, so others take their places: {named(gone, 10)} ({len(gone)} in all)"
        )
    if new := sorted(present - set(request.listed)):
        remark(f"{place}: left out, as new since this run began: {named(new, 10)} ({len(new)} in all)")
    index = {name: number for number, name in enumerate(classes)}
    found["train"] = replace(
        form,
        paths=tuple(place / name for name in request.listed),
        labels=torch.tensor([index[name.partition("/")[0]] for name in request.listed]),
    )
    return Found(found, classes, request.listed, frozenset(place / name for name in gone))


def stand_ins(images: Images | Files, gone: frozenset[Path], *, drop: bool) -> Images | Files:
    """Leave out the files that are `gone`; unless `drop`, the next file that is there takes the place of each.

    So that a training that goes on without them keeps the order and number of its batches.
    """
    if not isinstance(images, Files) or not gone:
        return images
    there = [number for number, path in enumerate(images.paths) if path not in gone]
    if drop or not there:
        return select(images, torch.tensor(there, dtype=torch.int64))
    following = torch.searchsorted(torch.tensor(there), torch.arange(len(images))) % len(there)
    return select(images, torch.tensor(there)[following])
