"""A program that reads columns of the Parquet file that is its standard input, one JSON object a line.

    {"columns": ["question", "answer"]}        first of all: those that the file has
    {"rows": [{"question": "1 + 1?", ...}]}    a batch of rows
    {"refused": "..."}, {"unreadable": "..."}  last of all, if something is wrong

A file of 30 kB may hold a text of a gigabyte and say that it has a thousand bytes; its pages are as large as it likes
before anyone can look at them, and damaged metadata ends the process within pyarrow. So the file is read in this
process, which is started by its path and imports nothing of this package, and whose memory has a bound.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class _Refused(ValueError):
    """The file is larger inside than any file of questions is."""


def serve(columns: Sequence[str], most_bytes: int, most_rows: int, batch_rows: int, batch_bytes: int) -> None:
    """Writes the rows of the file.

    Args:
      columns: their names; without one of them nothing but the names of those in the file is written.
      most_bytes: in all columns, as the file's row groups say it.
      most_rows: more are refused.
      batch_rows: rows that are decoded at once.
      batch_bytes: that these may take.
    """
    import pyarrow.parquet

    outer = pyarrow.parquet.ParquetFile(sys.stdin.buffer, pre_buffer=False)
    names = outer.schema_arrow.names
    _write({"columns": names})
    if not set(columns) <= set(names):
        return
    # Of the groups, not of their columns: pyarrow ends the process where a column's damaged metadata is looked at.
    groups = [outer.metadata.row_group(index) for index in range(outer.metadata.num_row_groups)]
    size = sum(max(group.total_byte_size, group.num_rows) for group in groups)
    if size > most_bytes:
        raise _Refused(f"{size} bytes of columns")
    # Left as Parquet stores them, equal texts are in memory once until their row is read.
    leaves = [outer.schema.column(i) for i in range(len(outer.schema))]
    wanted = (leaf for leaf in leaves if leaf.path.split(".")[0] in columns)
    texts = [leaf.path for leaf in wanted if leaf.physical_type == "BYTE_ARRAY"]
    options = {"metadata": outer.metadata, "read_dictionary": texts or None, "pre_buffer": False}
    file, number = pyarrow.parquet.ParquetFile(sys.stdin.buffer, **options), 0
    for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns), use_threads=False):
        size = sum(map(_decoded_bytes, batch.columns))
        if size > batch_bytes or number > most_rows:
            raise _Refused(f"{size} bytes in the {len(batch)} rows from row {number} on")
        number += len(batch)
        _write({"rows": batch.to_pylist()})


def _decoded_bytes(array: Any) -> int:
    """What an Arrow array takes once each of its texts stands for itself."""
    import pyarrow.compute

    if isinstance(array, pyarrow.DictionaryArray):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return array.nbytes + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if isinstance(array, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        return array.nbytes + _decoded_bytes(array.flatten())
    if isinstance(array, pyarrow.StructArray):
        return sum(map(_decoded_bytes, array.flatten()))
    return array.nbytes


def _write(message: dict[str, Any]) -> None:
    # Of what JSON has no words for, such as a date, the type is said, which no question or answer is of.
    line = json.dumps(message, default=lambda value: {"type": type(value).__name__})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _bound_memory(most: int) -> None:
    """Lets this process take so many bytes more than it has taken by now."""
    with contextlib.suppress(OSError, ValueError):  # macOS has neither the file nor the limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + most
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Reads with the arguments of the command line: those of `serve` as JSON, and bytes of memory."""
    import pyarrow.compute
    import pyarrow.parquet

    _bound_memory(int(sys.argv[2]))
    try:
        serve(**json.loads(sys.argv[1]))
    except _Refused as error:
        _write({"refused": str(error)})
    except MemoryError:  # pyarrow's too
        _write({"refused": f"more than {int(sys.argv[2])} bytes of memory are needed to read it"})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        _write({"unreadable": f"{error!s:.300}"})


if __name__ == "__main__":
    main()
