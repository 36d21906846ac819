"""Names the folders of runs, and checks which run a folder holds."""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from upath import UPath

from fedftg_jax.data import image_folder
from fedftg_jax.system import cli, files, lock, progress
from fedftg_jax.system import versions as versions_

DIVERGED = 'diverged.json'  # in the folder of a run that is not finite
# Prefixes of flag values after which the path of a file or a folder follows.
_NAMES_FILES = ('npz', 'file', 'folder')
# Flags of earlier versions, at the values at which they changed nothing.
_GONE = {'ftg_temperature': 1.0}


def contents(config: dict[str, Any]) -> dict[str, str]:
  """Computes fingerprints of the files that the configuration names."""
  named = {}
  for flag in ('dataset', 'partition', 'schedule', 'public_data'):
    kind, _, path = config.get(flag, '').partition(':')
    if kind in _NAMES_FILES:
      named[f'{flag} {"folder" if kind == "folder" else "file"}'] = (
        _fingerprint(pathlib.Path(path))
      )
  return named


def _fingerprint(path: pathlib.Path) -> str:
  """Computes a digest of a file, or of the images in a folder.

  The digest of a folder covers the images' names and bytes.
  """
  if path.is_file():
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  found = sorted(
    (file, file.stat())
    for split in ('train', 'test')
    for name in image_folder.classes(str(path))
    for file in image_folder.files(path, split, name)
    if file.is_file()
  )
  return _of_files(
    path,
    tuple(
      (str(p.relative_to(path)), s.st_size, s.st_mtime_ns) for p, s in found
    ),
  )


@functools.lru_cache(maxsize=4)
def _of_files(folder, found):
  """Computes a digest of files; cached while sizes and times do not change."""
  digest = hashlib.sha256()
  for name, size, _ in found:
    digest.update(f'{name}\0{size}\0'.encode())
    digest.update((folder / name).read_bytes())
  return digest.hexdigest()[:16]


def identity(config: dict[str, Any]) -> dict[str, Any]:
  """Returns what distinguishes runs: everything but the number of rounds."""
  return {
    k: v for k, v in {**config, **contents(config)}.items() if k != 'rounds'
  }


def folder_name(text: str) -> str:
  """Makes a folder's name from `text`; a long one is shortened and hashed."""
  name = re.sub(r'[^\w+=.,-]', '_', text)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return name if len(name) <= 80 else f'{name[:70]}-{digest}'


def workdir(asked: str | None, config: dict[str, Any], *words: str) -> UPath:
  """Returns the folder that --workdir names, or the default one.

  Raises:
    cli.UsageError: if its store is unknown or cannot be reached.
  """
  folder = UPath(asked) if asked and '://' not in asked else None
  if folder is not None or not asked:
    return folder or default_folder(config, *words)
  try:
    folder = UPath(asked)
    folder.exists()
  except Exception as error:  # packages of stores raise many types
    raise cli.UsageError(
      'workdir',
      asked,
      f'cannot be reached ({type(error).__name__}: {error}); '
      'must be a folder, or one in a store of fsspec whose package is '
      'installed',
    ) from error
  return folder


def default_folder(config: dict[str, Any], *words: str) -> UPath:
  """Returns a folder in runs/ that is named after the configuration."""
  digest = hashlib.sha256(
    json.dumps([identity(config), words], sort_keys=True).encode()
  ).hexdigest()
  words = words or (
    config['method'],
    config['dataset'].split(':')[0],
    f'seed{config["seed"]}',
  )
  return UPath('runs') / f'{folder_name("-".join(words))}-{digest[:8]}'


def is_finished(folder: UPath, config: dict[str, Any]) -> bool:
  """Returns whether `folder` holds this run, finished, with enough rounds.

  Raises:
    cli.UsageError: if it holds anything else.
  """
  check_folder(folder, identity(config))
  return rounds_finished(folder) >= config['rounds']


def rounds_finished(folder: UPath) -> int:
  """Returns the number of rounds of a finished run, or 0.

  It is 0 also if the summary is damaged; the run writes it again when it
  continues.
  """
  path = folder / 'summary.json'
  try:
    rounds = files.read_json(path)['rounds'] if path.exists() else 0
  except (ValueError, KeyError, TypeError):
    return 0
  return rounds if isinstance(rounds, int) else 0


def _check_writable(folder) -> None:
  if not files.is_local(folder):
    return
  nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
  if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
    raise cli.UsageError(
      'workdir',
      folder,
      f'cannot be written: {nearest} must be a folder that you may write to',
    )


def check_folder(folder: UPath, ours: dict[str, Any]) -> None:
  """Refuses a folder that holds something else.

  Args:
    folder: where to write.
    ours: what will be written there, as in its config.json.

  Raises:
    cli.UsageError: says what it holds.
  """
  path = folder / 'config.json'
  if not path.exists():
    if folder.is_dir() and any(p.name[0] != '.' for p in folder.iterdir()):
      raise cli.UsageError(
        'workdir', folder, 'holds other files; choose an empty or a new folder'
      )
    return
  try:
    saved = json.loads(path.read_text(encoding='utf-8'))
    there = {**saved['config'], **saved['contents']}
    dict(saved['versions']), list(saved.get('went_on_with', []))
  except (ValueError, KeyError, TypeError) as error:
    raise cli.UsageError(
      'workdir',
      folder,
      'its config.json cannot be read; remove the folder or choose another',
    ) from error
  if there.get('program') != ours.get('program'):
    kind = {'compare': 'comparison'}.get(
      there.get('program'),  # type: ignore[arg-type]
      there.get('program', 'single run'),  # type: ignore[arg-type]
    )
    raise cli.UsageError(
      'workdir', folder, f'holds a {kind}; choose another folder'
    )
  for name, value in _GONE.items():
    if there.get(name) == value:
      del there[name]
  for name in sorted((ours.keys() | there.keys()) - {'rounds'}):
    if there.get(name) != ours.get(name):
      raise cli.UsageError(
        'workdir',
        folder,
        f'holds another configuration ({name}: {_shown(there, name)}, not '
        f'{_shown(ours, name)}); choose another folder',
      )


def _shown(config, name) -> str:
  return str(config[name]) if name in config else 'not given'


@contextlib.contextmanager
def opened(folder: UPath, ours: dict[str, Any]) -> Iterator[None]:
  """Checks a folder with `check_folder` and locks it for this process.

  Raises:
    cli.UsageError: as in `check_folder`, or if the folder cannot be written to,
      or if another process holds it.
  """
  _check_writable(folder)
  check_folder(folder, ours)
  with lock.held(folder):
    check_folder(folder, ours)  # another process may have written meanwhile
    yield


def claim_folder(folder: UPath, config: dict[str, Any]) -> None:
  """Writes config.json, by which `check_folder` identifies the folder.

  It records the code and the versions with which a run began. If the run
  continues with other versions, they are added and printed, because results are
  then not guaranteed to be the same bytes.
  """
  path, versions = folder / 'config.json', versions_.current()
  saved = files.read_json(path) if path.exists() else {}
  began, later = saved.get('versions', versions), saved.get('went_on_with', [])
  if versions not in (began, *later):
    progress.say(
      f'{folder}: was started with other versions '
      f'({_differences(began, versions)})'
    )
    later = [*later, versions]
  files.write_json(
    path,
    {
      'config': config,
      'contents': contents(config),
      'versions': began,
      'code': saved.get('code', versions_.code()),
      **({'went_on_with': later} if later else {}),
    },
  )


def _differences(began, now) -> str:
  return ', '.join(
    f'{name} {began.get(name)}, not {value}'
    for name, value in now.items()
    if began.get(name) != value
  )
