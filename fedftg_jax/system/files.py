"""Writes files atomically, on this machine or in any store of fsspec."""

from collections.abc import Iterator
import contextlib
import csv
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from upath import UPath

from fedftg_jax.data import arrays as arrays_lib

_PART = '.part-'  # prefix of files that are being written

PathLike = str | os.PathLike[str] | UPath


def is_local(path: PathLike) -> bool:
  """Returns whether `path` is in this machine's file system."""
  return isinstance(UPath(path), pathlib.Path)


def is_link(path: PathLike) -> bool:
  """Tells whether `path` is a link, which only local file systems have."""
  return is_local(path) and os.path.islink(str(path))


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary local path whose file replaces `path` on success.

  On this machine it is renamed; in a store that cannot rename, the whole file
  is written. If several processes train together all of them call this, because
  computing the content may need all; the file of process 0 is kept.
  """
  path = UPath(path)
  if not is_local(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder, path.name)
      yield temporary
      if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(temporary.read_bytes())
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  # The name is unpredictable, so that nobody can put a link there. The suffix
  # stays at the end, because writers choose their format by it.
  temporary = path.with_name(f'{_PART}{secrets.token_hex(8)}{path.suffix}')
  try:
    yield temporary  # type: ignore[misc]
    if jax.process_index() == 0:
      with temporary.open('rb') as file:
        os.fsync(file.fileno())  # before it replaces, in case of a power cut
      os.replace(temporary, path)  # type: ignore[arg-type]
  except OSError as error:
    if error.errno is None or error.filename not in (None, str(temporary)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    temporary.unlink(missing_ok=True)


def remove_parts(folder: PathLike) -> None:
  """Removes the unfinished files of a killed process from a local folder."""
  if is_local(folder):
    for part in pathlib.Path(str(folder)).glob(_PART + '*'):
      part.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_bytes(path: PathLike, content: bytes) -> None:
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def write_json(path: PathLike, value: Any) -> None:
  """Writes a value as indented JSON."""
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def write_jsonl(path: PathLike, rows: list[dict[str, Any]]):
  """Writes one line of JSON for each row."""
  write_text(
    path, ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
  )


def write_csv(path: PathLike, rows: list[dict[str, Any]]):
  """Writes flat rows as CSV, with the columns of all rows; None is empty."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with replacing(path) as temporary:
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, columns, lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)


def read_json(path: PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    ValueError: names the file if it is damaged.
  """
  try:
    return json.loads(UPath(path).read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
  """Reads the rows of a file with one line of JSON each.

  If the last line is incomplete, because writing was interrupted, it is left
  out.

  Raises:
    ValueError: names the file if it is damaged.
  """
  try:
    *lines, last = UPath(path).read_text(encoding='utf-8').split('\n')
    rows = [json.loads(line) for line in lines if line]
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  with contextlib.suppress(ValueError):  # without a line end it may be cut off
    rows += [json.loads(last)] if last else []
  return rows


def read_arrays(path: PathLike) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz written by this package.

  Raises:
    ValueError: if it is damaged.
  """
  with UPath(path).open('rb') as file:
    return arrays_lib.read(file)


def write_tree(path: PathLike, tree: Any, compressed: bool = False) -> None:
  """Writes arrays as .npz, with names such as 'params/conv0/kernel'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {
    jax.tree_util.keystr(place, simple=True, separator='/'): np.asarray(leaf)
    for place, leaf in leaves
  }
  with replacing(path) as temporary:
    save = np.savez_compressed if compressed else np.savez
    save(temporary, **arrays)  # type: ignore[arg-type]


def names(folder: PathLike) -> list[str]:
  """Lists the names in a folder; none if it does not exist."""
  folder = UPath(folder)
  return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def remove(folder: PathLike) -> None:
  """Removes a folder with everything in it."""
  if is_local(folder):
    shutil.rmtree(folder)  # type: ignore[arg-type]
  else:
    UPath(folder).rmdir(recursive=True)


def upload(folder: pathlib.Path, to: PathLike) -> None:
  """Copies a local folder's files to a store, with its subfolders."""
  for path in folder.rglob('*'):
    if path.is_file():
      there = UPath(to) / path.relative_to(folder).as_posix()
      there.parent.mkdir(parents=True, exist_ok=True)
      there.write_bytes(path.read_bytes())


def download(folder: PathLike, to: pathlib.Path) -> None:
  """Copies a store's files to a local folder, with its subfolders."""
  folder = UPath(folder)
  for path in folder.rglob('*'):
    if path.is_file():
      here = to / path.path.removeprefix(folder.path).lstrip('/')
      if not here.resolve().is_relative_to(to.resolve()):  # keys may have ..
        raise OSError(f'{path}: points outside of {folder}')
      here.parent.mkdir(parents=True, exist_ok=True)
      here.write_bytes(path.read_bytes())
