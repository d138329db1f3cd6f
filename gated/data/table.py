"""A column of text or of token ids in a Parquet file, by row groups."""

import functools
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from gated.data import ids, pieces, tokenizer
from gated.data.faults import Fault, Report, describe
from gated.data.pieces import Piece, Reading, Span, Split

BATCH = 1 << 24  # Bytes of rows that are read at a time, of mean size,
ROWS = 1024  # and at most so many rows.
BUFFER = 1 << 20  # Bytes of a file that are read ahead.


def _opened(path: str, reading: Reading) -> Any:
  status = os.stat(path)
  return _open(path, reading, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _open(path: str, reading: Reading, version: tuple[int, ...]) -> Any:
  """-> the Parquet file; Fault if it is none, or if the field is no column of text.

  The field may be a nested name, such as meta.text. With `reading.ids` it must have lists
  of integers.
  """
  field, is_right = reading.field, _is_ids if reading.ids else _is_text
  parquet = tokenizer.optional('pyarrow.parquet')
  try:
    file = parquet.ParquetFile(path, buffer_size=BUFFER)
  except Exception as error:
    text = f'{path!r} is not a Parquet file: {describe(error)}'
    raise Fault('damaged Parquet', text) from error
  kind = _type(file.schema_arrow, field)
  if kind is None or not is_right(kind):
    columns = {column.name: str(column.type) for column in file.schema_arrow}
    wanted = 'list of ids' if reading.ids else 'text'
    text = f'{path!r}: --field={field!r} is no column of {wanted}; it has {columns}'
    raise Fault(f'no {wanted} in the field', text)
  return file


def _type(schema: Any, field: str) -> Any:
  """-> the type of a column or of a field in it; None for a missing one."""
  pyarrow = tokenizer.optional('pyarrow')
  kind = pyarrow.struct(list(schema))
  for name in [field] if field in schema.names else field.split('.'):
    if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
      return None
    kind = kind.field(name).type
  return kind


def _is_text(kind: Any) -> bool:
  types = tokenizer.optional('pyarrow').types
  if types.is_dictionary(kind):
    kind = kind.value_type
  checks = (
    types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
    types.is_large_binary, types.is_binary_view, types.is_null,
  )  # fmt: skip
  return any(check(kind) for check in checks)


def _is_ids(kind: Any) -> bool:
  types = tokenizer.optional('pyarrow').types
  checks = types.is_list, types.is_large_list, types.is_fixed_size_list
  return any(check(kind) for check in checks) and types.is_integer(kind.value_type)


def _column(path: str, reading: Reading, group: int) -> Any:
  """-> the metadata of a row group's column."""
  row_group = _opened(path, reading).metadata.row_group(group)
  columns = (row_group.column(i) for i in range(row_group.num_columns))
  # The values of a list are in FIELD.list.element.
  name = lambda column: column.path_in_schema.partition('.list.')[0]
  return next(column for column in columns if name(column) == reading.field)


def _rows(path: str, reading: Reading, group: int) -> int:
  """-> the rows of a group that are read at a time."""
  column = _column(path, reading, group)
  mean = column.total_uncompressed_size / max(column.num_values, 1)
  return int(min(max(BATCH // max(mean, 1), 1), ROWS))


def split(path: str, reading: Reading) -> Split:
  result, start, size = [], 0, 0
  groups = _opened(path, reading).metadata.num_row_groups
  for group in range(groups):
    size += _column(path, reading, group).total_uncompressed_size
    if size >= pieces.UNIT or group == groups - 1:
      result.append((start, group + 1, size))
      start, size = group + 1, 0
  return result


def spans(file: BinaryIO, piece: Piece) -> list[Span]:
  result = []
  for group in range(piece.start, piece.stop):
    column = _column(piece.path, piece.reading, group)
    start = column.dictionary_page_offset or column.data_page_offset
    result.append((start, start + column.total_compressed_size))
  return result


def read(piece: Piece, report: Report) -> Iterator[tuple[str, Any]]:
  """Row groups -> (NAME:GROUP:ROW, text in bytes, or ids); a null is an empty text.

  Reports a row group that is damaged; its rows before the damage are kept.
  """
  pyarrow = tokenizer.optional('pyarrow')
  compute = tokenizer.optional('pyarrow.compute')
  path, reading = piece.path, piece.reading
  field, file = reading.field, _opened(path, reading)
  for group in range(piece.start, piece.stop):
    row = 0
    try:
      size = _rows(path, reading, group)
      for batch in file.iter_batches(size, row_groups=[group], columns=[field]):
        values = batch.column(0)
        if pyarrow.types.is_struct(values.type):
          values = compute.struct_field(values, field.split('.')[1:])
        if pyarrow.types.is_dictionary(values.type):
          values = values.dictionary_decode()
        if not reading.ids:
          # As bytes, so that bad UTF-8 is found row by row.
          values = values.cast(pyarrow.large_binary())
        for value in values.to_pylist():
          name = f'{piece.name}:{group}:{row}'
          row += 1
          if reading.ids:
            place = f'{path}: {name}'
            ids_N = ids.array(value or [], place)
            yield from ids.divided(name, place, ids_N, reading.eos)
          else:
            yield name, value or b''
    except Fault as fault:
      report(fault)
    except Exception as error:  # The library has several.
      text = f'{path}: row group {group} is damaged after row {row}: {describe(error)}'
      report(Fault('damaged Parquet', text))
