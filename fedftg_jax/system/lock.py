"""Locks a folder, so that only one process at a time uses it."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import platform

from upath import UPath

from fedftg_jax.system import cli, devices, files

FILE = '.lock'
_held: set[pathlib.Path] = set()  # locked by this process, which may reenter


@contextlib.contextmanager
def held(folder: UPath) -> Iterator[None]:
  """Holds a folder for this process, and creates it if necessary.

  The lock ends with the process, however the process ends. If several processes
  train together, the first one holds it. A store that is not a file system of
  this machine has no locks; nothing is held there. On a shared file system the
  lock works as far as that supports `flock` (NFS since Linux 2.6.12).

  Raises:
    cli.UsageError: names the process that holds the folder, if another one
      does.
  """
  if not files.is_local(folder) or not devices.is_first():
    yield
    return
  place = pathlib.Path(str(folder)).absolute()
  if place in _held:
    yield
    return
  made = [p for p in (place, *place.parents) if not p.exists()]
  try:
    place.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise cli.UsageError(
      'workdir',
      folder,
      f'cannot be created ({error.strerror}); must be a folder that you may '
      'write to',
    ) from error
  descriptor = _lock(place / FILE, folder)
  _held.add(place)
  try:
    yield
  finally:
    _held.discard(place)
    (place / FILE).unlink(missing_ok=True)
    os.close(descriptor)
    with contextlib.suppress(OSError):  # removes folders that stayed empty
      for path in made:
        path.rmdir()


def _lock(path, folder) -> int:
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      holder = os.read(descriptor, 200).decode(errors='replace').strip()
      os.close(descriptor)
      raise cli.UsageError(
        'workdir',
        folder,
        f'is in use by another process ({holder or "unknown"}); wait for it, '
        'or choose another folder',
      ) from error
    if _is_there(path, descriptor):
      os.truncate(descriptor, 0)
      os.write(descriptor, f'{os.getpid()} on {platform.node()}\n'.encode())
      return descriptor
    os.close(descriptor)  # its holder has just removed the file


def _is_there(path, descriptor) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(descriptor))
  except FileNotFoundError:
    return False
