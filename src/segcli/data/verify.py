"""What is wrong with a data set, found before it costs a training: one finding per file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcli.data.sets import IGNORE, DataSet, Sample, read_values
from segcli.errors import ImageError
from segcli.images import read_image
from segcli.palettes import generic_class_set

_SPARSE = 2  # unnamed classes of which fewer than one in two occurs are grey levels, not ids


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        path: The file or folder.
        problem: What is wrong with it.
        fix: What to do.
        serious: Training or evaluating with it would fail or mislead; otherwise it is just left out.
    """

    path: Path
    problem: str
    fix: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.fix}"


@dataclass(frozen=True)
class _Checked:
    findings: tuple[Finding, ...]
    values: frozenset[int] = frozenset()  # that occur in the label file


def check(dataset: DataSet, progress: Callable[[], object] | None = None) -> list[Finding]:
    """Look at every file of a data set: both there, fully readable, of one size, ids in range.

    Every image and label is decoded (only that finds a cut-off file), in as many threads as there are cores.

    Args:
        progress: Called once per sample.
    """
    findings: list[Finding] = []
    values: set[int] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for checked in pool.map(lambda sample: _check_sample(sample, dataset), dataset.samples):
            findings += checked.findings
            values |= checked.values
            if progress is not None:
                progress()
    findings += _check_values(values, dataset)
    for path in dataset.unpaired:
        fix = "add its partner under the same name, or leave it: it is not used"
        findings.append(Finding(path, "has no partner", fix, serious=False))
    return findings


def check_overlap(parts: dict[str, DataSet]) -> Iterator[Finding]:
    """Images that are in two splits, so that a score on one says nothing about new images."""
    first_split: dict[Path, str] = {}
    for split, dataset in parts.items():
        for sample in dataset.samples:
            other = first_split.setdefault(sample.image, split)
            if other != split:
                yield Finding(sample.image, f"is in {other} and in {split}", "remove it from one of them")


def _check_sample(sample: Sample, dataset: DataSet) -> _Checked:
    missing = [path for path in (sample.image, sample.label) if not path.is_file()]
    if missing:
        fix = f"add it, or remove {sample.name} from the list"
        return _Checked(tuple(Finding(path, "does not exist", fix) for path in missing))
    findings = []
    size = None
    try:
        size = read_image(sample.image).pixels.shape[:2]
    except ImageError as error:
        findings.append(Finding(sample.image, str(error), "replace it, or remove it together with its label"))
    try:
        values = read_values(sample.label, dataset)
    except ImageError as error:
        findings.append(Finding(sample.label, str(error), "replace it, or remove it together with its image"))
        return _Checked(tuple(findings))
    if size is not None and values.shape != size:
        findings.append(_size_finding(sample, size, values.shape))
    occurring = np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist()
    wrong = [v for v in occurring if len(dataset.class_set) <= dataset.label_ids[v] != IGNORE]
    if wrong:
        last = len(dataset.class_set) - 1
        problem = f"holds {_listed(wrong)}, but the ids of {dataset.class_set.name} are 0..{last}"
        fix = "name all classes, or change values with: segcli data convert --map OLD=NEW"
        findings.append(Finding(sample.label, problem, fix))
    return _Checked(tuple(findings), frozenset(occurring))


def _size_finding(sample: Sample, size: tuple[int, ...], label_size: tuple[int, ...]) -> Finding:
    problem = f"is {label_size[1]} x {label_size[0]}, but its image is shown as {size[1]} x {size[0]}"
    if label_size == size[::-1]:
        return Finding(sample.label, problem, "turn it like the photo is shown (EXIF orientation)")
    return Finding(sample.label, problem, "make both the same size, the label with nearest neighbour")


def _check_values(values: set[int], dataset: DataSet) -> Iterator[Finding]:
    """Sets of values that are no class ids, over all label files together."""
    ignored = {value for value in values if dataset.label_ids[value] == IGNORE}
    folder = dataset.samples[0].label.parent
    if values and values == {0, 255} and 255 in ignored:
        problem = "all masks hold only 0 and 255, and 255 counts as ignore, so there is one class"
        yield Finding(folder, problem, "make 255 class 1 with: segcli data convert --from binary")
    elif values and values == ignored:
        yield Finding(
            folder, f"all masks hold only {_listed(sorted(values))}, which is ignored", "label some pixels"
        )
    unnamed = dataset.class_set == generic_class_set(len(dataset.class_set))
    ids = sorted(values - ignored)
    if unnamed and len(ids) > 1 and len(ids) * _SPARSE < len(dataset.class_set):
        problem = f"all masks together hold {_listed(ids)}: shades of grey, or ids with gaps"
        example = ",".join(f"{value}={number}" for number, value in enumerate(ids[:8]))
        yield Finding(folder, problem, f"number them from 0 with: segcli data convert --map {example}")


def _listed(values: list[int], shown: int = 8) -> str:
    text = ", ".join(str(value) for value in values[:shown])
    return text + (f" and {len(values) - shown} more" if len(values) > shown else "")
