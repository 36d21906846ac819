"""Files that are there whole or not at all, here or in any store of fsspec."""

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

_PART = '.part-'  # begins the name of a file that is being written

PathLike = str | os.PathLike[str] | UPath


def is_local(path: PathLike) -> bool:
  """Whether `path` is of this machine's file system."""
  return isinstance(UPath(path), pathlib.Path)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
  """A temporary local path whose file takes the place of `path` on success.

  On this machine that is a rename; a store that has none gets the whole file.
  Where several processes train together all come here, since what is written
  may have to be computed by all; that of process 0 remains.
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
  # Nobody can foresee the name and lay a link there. The suffix stays last:
  # writers choose their format by it.
  temporary = path.with_name(f'{_PART}{secrets.token_hex(8)}{path.suffix}')
  try:
    yield temporary  # type: ignore[misc]
    if jax.process_index() == 0:
      with temporary.open('rb') as file:
        os.fsync(file.fileno())  # before it replaces, for a power cut
      os.replace(temporary, path)  # type: ignore[arg-type]
  except OSError as error:
    if error.errno is None or error.filename not in (None, str(temporary)):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    temporary.unlink(missing_ok=True)


def remove_parts(folder: PathLike) -> None:
  """Removes files that a killed process had begun, of a folder of this
  machine."""
  if is_local(folder):
    for part in pathlib.Path(str(folder)).glob(_PART + '*'):
      part.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
  with replacing(path) as temporary:
    temporary.write_text(text)


def write_json(path: PathLike, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def write_jsonl(path: PathLike, rows: list[dict[str, Any]]):
  write_text(
    path, ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
  )


def write_csv(path: PathLike, rows: list[dict[str, Any]]):
  """Writes flat rows under the columns of all of them; None is an empty
  cell."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with replacing(path) as temporary:
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, columns, lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)


def read_json(path: PathLike) -> Any:
  """The value of a file; ValueError that names it if it is damaged."""
  try:
    return json.loads(UPath(path).read_text())
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
  """The rows of a file; of one that was cut, the whole ones. ValueError that
  names the file if it is damaged."""
  try:
    *lines, last = UPath(path).read_text().split('\n')
    rows = [json.loads(line) for line in lines if line]
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  with contextlib.suppress(ValueError):  # no end of line: it was cut here
    rows += [json.loads(last)] if last else []
  return rows


def read_arrays(path: PathLike) -> dict[str, np.ndarray]:
  """All arrays of an .npz that we wrote; ValueError if it is damaged."""
  with UPath(path).open('rb') as file:
    return arrays_lib.read(file)


def write_tree(path: PathLike, tree: Any) -> None:
  """Writes arrays as .npz, named by their place: 'params/conv0/kernel'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {
    jax.tree_util.keystr(place, simple=True, separator='/'): np.asarray(leaf)
    for place, leaf in leaves
  }
  with replacing(path) as temporary:
    np.savez(temporary, **arrays)  # type: ignore[arg-type]


def names(folder: PathLike) -> list[str]:
  """What is in a folder; nothing where there is none."""
  folder = UPath(folder)
  return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def remove(folder: PathLike) -> None:
  """A folder with all that is in it."""
  if is_local(folder):
    shutil.rmtree(folder)  # type: ignore[arg-type]
  else:
    UPath(folder).rmdir(recursive=True)


def upload(folder: pathlib.Path, to: PathLike) -> None:
  """Writes a local folder's files, in folders of the same names."""
  for path in folder.rglob('*'):
    if path.is_file():
      there = UPath(to) / path.relative_to(folder).as_posix()
      there.parent.mkdir(parents=True, exist_ok=True)
      there.write_bytes(path.read_bytes())


def download(folder: PathLike, to: pathlib.Path) -> None:
  """The other way."""
  folder = UPath(folder)
  for path in folder.rglob('*'):
    if path.is_file():
      here = to / path.path.removeprefix(folder.path).lstrip('/')
      if not here.resolve().is_relative_to(to.resolve()):  # keys may have ..
        raise OSError(f'{path}: leads out of {folder}')
      here.parent.mkdir(parents=True, exist_ok=True)
      here.write_bytes(path.read_bytes())
