"""Saves and restores checkpoints: trees of arrays on disk, with orbax.

A checkpoint is a folder named after the round. It is written completely or not
at all. It holds the arrays, named by their place in the tree, a fingerprint of
them, and a note by which the caller recognises its own checkpoints. A
checkpoint that is damaged, belongs to another run, or has another structure is
refused, and the error names the reason. Digests of its files are compared
before orbax reads them, because orbax's threads print tracebacks of their own
for damaged files.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

from etils import epy
import jax
import numpy as np

from fedftg_jax.base import PyTree

with epy.lazy_imports():  # importing it takes half a second
  from orbax import checkpoint as ocp

_ROUND = re.compile('0|[1-9][0-9]*')
_UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of an interrupted save
_DIGESTS = 'digests.json'  # digests of a checkpoint's other files, written last


class Refused(ValueError):
  """A checkpoint that cannot be used, with the reason.

  Attributes:
    differ: the names in its note whose values are not the expected ones.
  """

  differ: tuple[str, ...] = ()


def save(
  folder: str | os.PathLike[str],
  round_: int,
  tree: PyTree,
  note: Mapping[str, Any],
) -> None:
  """Writes a checkpoint, and removes the remains of interrupted saves.

  If several processes train together, only one of them calls this. An
  interruption (Ctrl-C) takes effect after the checkpoint is written.

  Args:
    folder: where the checkpoints of this run are.
    round_: number of rounds done; a checkpoint of that name is replaced.
    tree: arrays.
    note: values that JSON can hold, by name; `restore` requires an equal note.

  Raises:
    OSError: if it cannot be written; existing checkpoints are kept.
  """
  arrays = _named(jax.device_get(tree))
  about = {'note': note, 'fingerprint': _fingerprint(arrays)}
  folder = pathlib.Path(os.path.abspath(folder))
  folder.mkdir(parents=True, exist_ok=True)
  args = ocp.args.Composite(
    arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
  )
  try:
    _reserve(folder, sum(array.nbytes for array in arrays.values()))
    _to_its_end(
      lambda checkpointer: checkpointer.save(
        folder / str(round_), force=True, args=args
      )
    )
    _write_digests(folder / str(round_))
  except Exception as error:  # the drivers of stores raise many types
    raise OSError(
      f'{folder}: the checkpoint of round {round_} cannot be written '
      f'({_line(error)}); earlier checkpoints are still there'
    ) from error
  for name in os.listdir(folder):
    if _UNFINISHED in name:
      shutil.rmtree(folder / name, ignore_errors=True)


def prune(folder: str | os.PathLike[str], round_: int, keep: int) -> None:
  """Removes all but the last `keep` checkpoints up to `round_`.

  Checkpoints of later rounds stay.
  """
  for old in [r for r in rounds(folder) if r <= round_][:-keep]:
    shutil.rmtree(pathlib.Path(folder, str(old)))


def rounds(folder: str | os.PathLike[str]) -> list[int]:
  """Returns the rounds that have a checkpoint, in ascending order."""
  if not os.path.isdir(folder):
    return []
  return sorted(
    int(name) for name in os.listdir(folder) if _ROUND.fullmatch(name)
  )


def restore(
  folder: str | os.PathLike[str],
  round_: int,
  like: PyTree,
  note: Mapping[str, Any],
) -> PyTree:
  """Reads a checkpoint.

  Args:
    folder: see `save`.
    round_: which checkpoint.
    like: arrays or their shapes and types, in the structure to restore.
    note: see `save`.

  Returns:
    NumPy arrays in the structure of `like`.

  Raises:
    Refused: if it cannot be read, is damaged, or belongs to something else.
  """

  def refuse(why, differ=()):
    error = Refused(f'{folder}/{round_}: {why}')
    error.differ = tuple(differ)
    raise error

  place = pathlib.Path(os.path.abspath(folder), str(round_))
  args = ocp.args.Composite(
    about=ocp.args.JsonRestore(), arrays=ocp.args.StandardRestore()
  )
  for path in place.rglob('*'):
    if path.is_file() and not os.access(path, os.R_OK):
      raise PermissionError(f'{path} cannot be read: permission denied')
  try:
    saved = json.loads((place / _DIGESTS).read_text())
  except (FileNotFoundError, NotADirectoryError):
    saved = None  # the save was killed before it wrote them
  except ValueError:
    refuse(f'is damaged: {_DIGESTS}')
  if saved is not None:
    there = _digests(place)
    for name, digest in saved.items():
      if there.get(name) != digest:
        refuse(f'is damaged: {name}')
  try:
    found = _to_its_end(
      lambda checkpointer: checkpointer.restore(place, args=args)
    )
  except (MemoryError, PermissionError):  # a passing problem, not damage
    raise
  except Exception as error:  # orbax raises many types for a damaged folder
    refuse(f'cannot be read ({_line(error)})')
  about, arrays = (
    found['about'],
    {
      name: np.asarray(array) for name, array in (found['arrays'] or {}).items()
    },
  )
  wanted_note = json.loads(json.dumps(note))
  if about.get('note') != wanted_note:
    found_note = about.get('note') or {}
    differ = [
      name
      for name in sorted(wanted_note.keys() | found_note.keys())
      if wanted_note.get(name) != found_note.get(name)
    ]
    names = ', '.join(differ)
    refuse(f'is the checkpoint of another run; these differ: {names}', differ)
  if about.get('fingerprint') != _fingerprint(arrays):
    refuse('is damaged: its arrays are not those that were saved')
  wanted = _named(like)
  for name in sorted(wanted.keys() ^ arrays.keys()):
    refuse(f'{"lacks" if name in wanted else "has"} {name}')
  for name, leaf in wanted.items():
    got = arrays[name]
    if (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
      refuse(
        f'{name} is {got.dtype}{list(got.shape)}, not '
        f'{leaf.dtype}{list(leaf.shape)}'
      )
  return jax.tree.map(
    lambda leaf, name: arrays.get(name, np.zeros(leaf.shape, leaf.dtype)),
    like,
    _names(like),
  )


def _reserve(folder: pathlib.Path, num_bytes: int) -> None:
  """Checks that there is room for a file of that size.

  This is checked beforehand because threads of orbax that fail during a write
  print their tracebacks whenever they end.

  Raises:
    OSError: if there is no room.
  """
  if hasattr(os, 'posix_fallocate'):
    with tempfile.TemporaryFile(dir=folder) as file:
      os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))


def _to_its_end(act: Callable[['ocp.Checkpointer'], Any]) -> Any:
  """Calls `act` in a thread: orbax prints errors if it is interrupted."""

  def run():
    with _checkpointer() as checkpointer:
      return act(checkpointer)

  logger = logging.getLogger('absl')
  logger.addFilter(_not_of_orbax)
  try:
    with futures.ThreadPoolExecutor(1) as thread:  # leaving it waits for `act`
      return thread.submit(run).result()
  finally:
    logger.removeFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  """Returns whether a log record does not come from orbax."""
  return 'orbax' not in pathlib.Path(record.pathname).parts


def _checkpointer():
  """Makes a checkpointer for one process, which waits for no other process."""
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(), active_processes={jax.process_index()}
  )
  return ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
      arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
      about=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    ),
    multiprocessing_options=alone,
  )


def _names(tree: PyTree) -> PyTree:
  """Names each leaf by its place, such as 'variables.params.conv0.kernel'."""
  return jax.tree_util.tree_map_with_path(
    lambda place, _: jax.tree_util.keystr(place, simple=True, separator='.'),
    tree,
  )


def _named(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves by name, except those of size 0 (orbax rejects them)."""
  return {
    name: leaf
    for name, leaf in zip(jax.tree.leaves(_names(tree)), jax.tree.leaves(tree))
    if leaf.size
  }


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
  return digest.hexdigest()


def _write_digests(place: pathlib.Path) -> None:
  part = place / f'{_DIGESTS}.part'
  with part.open('w') as file:
    json.dump(_digests(place), file)
    file.flush()
    os.fsync(file.fileno())
  part.replace(place / _DIGESTS)


def _digests(place: pathlib.Path) -> dict[str, str]:
  """Computes a digest of each file of a checkpoint, by relative path."""
  digests = {}
  for path in sorted(place.rglob('*')):
    if path.is_file() and not path.name.startswith(_DIGESTS):
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'blake2b').hexdigest()
      digests[path.relative_to(place).as_posix()] = digest
  return digests


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:200]}'
