"""Texts of a Parquet file, one row after the other.

Only the pages of the wanted columns are read, and those a buffer at a time: a row group, which may be as large as its
file, is never in memory whole. A column that was written as a dictionary (pandas: category) is the exception, for its
distinct texts are held; write text as strings. pyarrow is an extra, imported when the first Parquet file is opened.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from cbtm.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
_ROWS = 128  # at once; a document may be long, and more rows were no faster
_BUFFER_BYTES = 1 << 20


def read_texts(file: BinaryIO, name: str, *forms: tuple[str, ...]) -> Iterator[tuple[str | None, ...]]:
    """Stream text columns in file order, over all row groups; None for a null and for what is not UTF-8.

    Args:
        file: The Parquet file, open and seekable.
        name: What to call it in errors.
        forms: The columns of each form that a file may have, one or more: names of top-level columns of strings, which
            may be dictionary-encoded. A form is read if all its columns are there, and one must be.

    Yields:
        For each row the texts of all columns of all forms, in this order; None for those of a form that is not read.

    Raises:
        ConfigError: If pyarrow is not installed.
        DataError: If the file is damaged, or has no form whole, or a column of another type.
        StorageError: If the disk does not give the bytes.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{name} needs pyarrow to be read: pip install 'cbtm[parquet]'") from error

    try:
        with ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as parquet:
            there = _columns_of(parquet.schema_arrow, name, forms)
            n_left = parquet.metadata.num_rows
            for batch in parquet.iter_batches(batch_size=_ROWS, columns=there, use_threads=False):
                columns = (
                    _texts(batch.column(column)) if column in there else itertools.repeat(None)
                    for column in itertools.chain(*forms)
                )
                yield from zip(*columns, strict=False)
                n_left -= batch.num_rows
            if n_left:
                raise DataError(f"{name} is damaged: its footer and its row groups differ by {abs(n_left)} rows")
    except (StorageError, DataError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the operating system's, not a complaint about the content
            raise StorageError(f"{name} cannot be read: {error}") from error
        raise DataError(f"{name} is cut short or damaged: {' '.join(str(error).split())}") from error


def _columns_of(schema: "pa.Schema", name: str, forms: tuple[tuple[str, ...], ...]) -> list[str]:
    """The columns to read: those of every form that the file has whole."""
    there = [column for form in forms if set(form) <= set(schema.names) for column in form]
    if not there:
        wanted = ", nor ".join(" and ".join(map(repr, form)) for form in forms)
        raise DataError(f"{name} has no column {wanted}; its columns: {', '.join(schema.names) or 'none'}")
    for column in there:
        _check_column(schema, name, column)
    return there


def _check_column(schema: "pa.Schema", name: str, column: str) -> None:
    import pyarrow as pa

    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        there = ", ".join(schema.names)
        raise DataError(f"{name} has {len(found)} columns named {column!r}, expected one; its columns: {there}")
    kind = schema.field(found[0]).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        raise DataError(f"{name}: column {column!r} is of type {kind}, expected string")


def _texts(values: Any) -> Iterator[str | None]:
    import pyarrow as pa

    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    # By way of bytes: Parquet's strings need not be UTF-8, and one that is not would lose its whole batch.
    for value in values.cast(pa.large_binary()).to_numpy(zero_copy_only=False):
        try:
            yield None if value is None else value.decode()
        except UnicodeDecodeError:
            yield None
