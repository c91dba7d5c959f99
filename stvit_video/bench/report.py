"""What every benchmark ends with: the machine it ran on, a table on the screen, the same rows as csv."""

import contextlib
import csv
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import InputError


def machine(device: Any) -> str:
    """One line: device (torch's, or its name), cores and threads, and versions of what does the work."""
    import torch  # takes a second, which the flags of a benchmark do not wait for

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"{name}; {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"{_version('av')}Python {platform.python_version()}"
    )


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}, "
    return ""


def markdown(rows: Sequence[Mapping]) -> str:
    """Rows as a table of a page; all have the same columns."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def write(rows: Sequence[Mapping], output: Path, name: str) -> Path:
    """Print the rows as a table and write them to `output`/`name`.csv; all rows have the same columns.

    None is an empty cell. Figures are printed to three digits and written in full.
    """
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    path = output / f"{name}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path, columns: Collection[str]) -> list[dict]:
    """The rows of a table that `write` wrote. columns: what it must have, all but `model` numbers.

    Raises InputError.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not rows or not set(columns) <= rows[0].keys():
        raise InputError(f"{path}: is no table with the columns {', '.join(columns)}")
    for line, row in enumerate(rows, 2):
        for column in set(columns) - {"model"}:
            try:
                row[column] = float(row[column])
            except (TypeError, ValueError):
                raise InputError(f"{path}, line {line}: {column} is {row[column]!r}, no number") from None
    return rows


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
