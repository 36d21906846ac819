"""Files that are there whole or not at all."""

import contextlib
import csv
import json
import os
import pathlib
from typing import Any, Iterator

import jax
import numpy as np


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A temporary path beside `path` that takes its place on success.

  Where several processes train together all come here, since what is written may
  have to be computed by all; that of process 0 remains.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # The suffix stays last: writers choose their format by it.
  temporary = path.with_name(
      f'.{path.stem}.{jax.process_index()}.{os.getpid()}{path.suffix}')
  try:
    yield temporary
    if jax.process_index() == 0:
      os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  with replacing(path) as temporary:
    temporary.write_text(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def write_jsonl(path: str | os.PathLike[str], rows: list[dict[str, Any]]):
  write_text(path, ''.join(
      json.dumps(row, allow_nan=False) + '\n' for row in rows))


def write_csv(path: str | os.PathLike[str], rows: list[dict[str, Any]]):
  """Writes flat rows under the columns of all of them; None is an empty cell."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with replacing(path) as temporary:
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, columns, lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)


def read_json(path: str | os.PathLike[str]) -> Any:
  return json.loads(pathlib.Path(path).read_text())


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  return [json.loads(line) for line in pathlib.Path(path).read_text().split('\n')
          if line]


def write_tree(path: str | os.PathLike[str], tree: Any) -> None:
  """Writes arrays as .npz, named by their place: 'params/conv0/kernel'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {jax.tree_util.keystr(place, simple=True, separator='/'):
            np.asarray(leaf) for place, leaf in leaves}
  with replacing(path) as temporary:
    np.savez(temporary, **arrays)
