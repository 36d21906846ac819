"""Reads arrays from files without pickle; errors name the file."""

from typing import IO
import zipfile
import zlib

import numpy as np


def read(
  path: str | IO[bytes], single: str | None = None, prefix: str = ''
) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz file by name.

  Args:
    path: the file, or an open file.
    single: if given, a .npy file is accepted too, as one array of this name.
    prefix: only arrays whose names begin with it are read.

  Returns:
    The arrays by name.

  Raises:
    ValueError: if the file cannot be read, is of another kind, or holds Python
      objects.
  """
  kinds = (
    '.npz file' if single is None else f'.npz (with {single}) or .npy file'
  )
  try:
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
      if single is not None:
        return {single: file}
      raise ValueError('it is a single array')
    with file:
      return {
        name: file[name] for name in file.files if name.startswith(prefix)
      }
  except (
    OSError,
    EOFError,
    MemoryError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
  ) as error:
    reason = ' '.join(str(error).split())
    if 'allow_pickle' in reason:
      reason = 'it is not a NumPy file, or holds Python objects'
    name = getattr(path, 'name', path)
    raise ValueError(f'{name}: not a readable {kinds} ({reason})') from error
