"""A column of text in a Parquet file, by row groups."""

import functools
from collections.abc import Iterator
from typing import Any

from gated.data import tokenizer
from gated.data.faults import Fault, Report, describe

ROWS = 1024  # Read at a time.


@functools.lru_cache(maxsize=4)
def opened(path: str, field: str) -> Any:
  """-> the Parquet file; Fault if it is none, or if `field` is no column of text.

  `field` may be a nested name, such as meta.text.
  """
  parquet = tokenizer.optional('pyarrow.parquet')
  try:
    file = parquet.ParquetFile(path)
  except Exception as error:
    text = f'{path!r} is not a Parquet file: {describe(error)}'
    raise Fault('damaged Parquet', text) from error
  kind = _type(file.schema_arrow, field)
  if kind is None or not _is_text(kind):
    columns = {column.name: str(column.type) for column in file.schema_arrow}
    text = f'{path!r}: --field={field!r} is no column of text; it has {columns}'
    raise Fault('no text in the field', text)
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


def column(path: str, field: str, group: int) -> Any:
  """-> the metadata of a row group's column."""
  row_group = opened(path, field).metadata.row_group(group)
  columns = (row_group.column(i) for i in range(row_group.num_columns))
  return next(column for column in columns if column.path_in_schema == field)


def read(
  path: str, field: str, groups: range, report: Report
) -> Iterator[tuple[str, bytes]]:
  """Row groups -> (GROUP:ROW, text in bytes); a null is an empty text.

  Reports a row group that is damaged; its rows before the damage are kept.
  """
  pyarrow = tokenizer.optional('pyarrow')
  compute = tokenizer.optional('pyarrow.compute')
  file = opened(path, field)
  for group in groups:
    row = 0
    try:
      for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
        values = batch.column(0)
        if pyarrow.types.is_struct(values.type):
          values = compute.struct_field(values, field.split('.')[1:])
        if pyarrow.types.is_dictionary(values.type):
          values = values.dictionary_decode()
        # As bytes, so that bad UTF-8 is found row by row.
        for text in values.cast(pyarrow.large_binary()).to_pylist():
          yield f'{group}:{row}', text or b''
          row += 1
    except Exception as error:  # The library has several.
      text = f'{path}: row group {group} is damaged after row {row}: {describe(error)}'
      report(Fault('damaged Parquet', text))
