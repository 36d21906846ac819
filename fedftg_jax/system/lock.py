"""One process at a time in a folder."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import platform

from upath import UPath

from fedftg_jax.system import cli, devices, files

FILE = '.lock'
_held: set[pathlib.Path] = set()  # by this process, which may come again


@contextlib.contextmanager
def held(folder: UPath) -> Iterator[None]:
  """Holds a folder, which is made if need be, for this process.

  The lock ends with the process, however that ends. Of several processes of one
  training the first holds it. A store that is no file system of this machine
  has no locks: there nothing is held. On a shared file system it holds as far
  as that has `flock` (NFS since Linux 2.6.12).

  Raises:
    cli.UsageError: if another process holds the folder, with which.
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
      f'cannot be made ({error.strerror}); must be a folder that one may write '
      'to',
    ) from error
  descriptor = _lock(place / FILE, folder)
  _held.add(place)
  try:
    yield
  finally:
    _held.discard(place)
    (place / FILE).unlink(missing_ok=True)
    os.close(descriptor)
    with contextlib.suppress(OSError):  # as it was, where nothing was written
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
    os.close(descriptor)  # its holder has just taken the file away


def _is_there(path, descriptor) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(descriptor))
  except FileNotFoundError:
    return False
