"""A program that reads columns of a Parquet file from stdin and writes one JSON object per line.

    {"columns": ["question", "answer"]}        first: the columns of the file
    {"rows": [{"question": "1 + 1?", ...}]}    a batch of rows
    {"refused": "..."}, {"unreadable": "..."}  last, if something is wrong

A file of 30 kB may hold a gigabyte of text while its metadata states a thousand bytes. Its pages may be of any size
before they can be inspected, and damaged metadata can kill the process inside pyarrow. So the file is read in this
separate process with bounded memory, which is started by its path and imports nothing from this package.
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
    """The decoded file is larger than any real file of questions."""


def serve(columns: Sequence[str], most_bytes: int, most_rows: int, batch_rows: int, batch_bytes: int) -> None:
    """Writes the rows of the file to standard output.

    Args:
      columns: names of the columns to read; if one is absent, only the names of the file's columns are written.
      most_bytes: largest total size of all columns in bytes, according to the file's row groups.
      most_rows: largest number of rows.
      batch_rows: number of rows decoded at once.
      batch_bytes: largest decoded size of such a batch, in bytes.
    """
    import pyarrow.parquet

    outer = pyarrow.parquet.ParquetFile(sys.stdin.buffer, pre_buffer=False)
    names = outer.schema_arrow.names
    _write({"columns": names})
    if not set(columns) <= set(names):
        return
    # Uses the sizes of row groups, not of their columns: pyarrow aborts on damaged column metadata.
    groups = [outer.metadata.row_group(index) for index in range(outer.metadata.num_row_groups)]
    size = sum(max(group.total_byte_size, group.num_rows) for group in groups)
    if size > most_bytes:
        raise _Refused(f"{size} bytes of columns")
    # With Parquet's dictionary encoding, equal texts are in memory only once until their row is read.
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
    """The size of an Arrow array in bytes once each text is stored separately."""
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
    # Values without a JSON form, such as dates, are replaced by their type; no question or answer has such a type.
    line = json.dumps(message, default=lambda value: {"type": type(value).__name__})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _bound_memory(most: int) -> None:
    """Limits this process to this many bytes beyond its current memory."""
    with contextlib.suppress(OSError, ValueError):  # macOS has neither this file nor this limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + most
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Runs with command-line arguments: the arguments of `serve` as JSON, and the memory limit in bytes."""
    import pyarrow.compute
    import pyarrow.parquet

    _bound_memory(int(sys.argv[2]))
    try:
        serve(**json.loads(sys.argv[1]))
    except _Refused as error:
        _write({"refused": str(error)})
    except MemoryError:  # pyarrow's memory error included
        _write({"refused": f"reading it needs more than {int(sys.argv[2])} bytes of memory"})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        _write({"unreadable": f"{error!s:.300}"})


if __name__ == "__main__":
    main()
