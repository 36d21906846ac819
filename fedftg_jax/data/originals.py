"""Shared parts of TFDS builders that read original files from a folder.

TFDS can write array_record files without TensorFlow if images are given as PNG
bytes. Its own builders of MNIST and CIFAR yield arrays, which only TensorFlow
could encode, and read through TensorFlow.
"""

import gzip
import pathlib
import zlib

from fedftg_jax.data import images as images_lib

SPLITS = ('train', 'test')


class FromFiles:
  """A mixin for a TFDS builder that reads examples from its `manual_dir`.

  A subclass defines which files a split has, and how they are read.

  Attributes:
    ARCHIVE: the folder in the archive in which the files are published.
    PLACES: folders where a system's package puts the files.
    INSTALL: how to get them there.
  """

  ARCHIVE = ''
  PLACES = ()
  INSTALL = ''
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'Put the original files there, as published.'
  pkg_dir_path = None  # no metadata files beside the module

  @classmethod
  def file_names(cls, config: str | None, split: str) -> tuple[str, ...]:
    """Returns the names of a split's files; each may also end in .gz."""
    raise NotImplementedError

  def _read(self, paths):
    """Reads a split's images [M, H, W, channels] and its labels by feature.

    Each array of labels is [M].
    """
    raise NotImplementedError

  def _more(self, split, number):
    """Returns further features of an example."""
    del split, number
    return {}

  def _split_generators(self, dl_manager):
    config = self.builder_config and self.builder_config.name
    folder = pathlib.Path(dl_manager.manual_dir)
    # Everything is read and checked before the first example is written.
    content = {
      split: self._read(_paths(folder, self.file_names(config, split)))
      for split in SPLITS
    }
    return {split: self._examples(split, *c) for split, c in content.items()}

  def _examples(self, split, images, labels):
    for i, image in enumerate(images):
      yield (
        i,
        {
          'image': images_lib.encode(image),
          **{name: int(values[i]) for name, values in labels.items()},
          **self._more(split, i),
        },
      )


def find_folder(
  builder: type[FromFiles],
  config: str | None,
  manual_dir: str | None,
  default_dir: str,
) -> pathlib.Path:
  """Finds the folder with all original files of a data set.

  It is `manual_dir`, or, if that is None, `default_dir` or a folder where a
  system's package puts the files; or a subfolder with the name of the data set
  (`fashion_mnist`) or of the published archive (`cifar-10-batches-bin`).

  Args:
    builder: that of the data set.
    config: such as 'balanced'; None for a data set without configurations.
    manual_dir: the folder that the user gives; None if none is given.
    default_dir: where TFDS looks for files that are put there by hand.

  Returns:
    The folder.

  Raises:
    ValueError: names the files that are missing and where to put them.
  """
  names = [
    name for split in SPLITS for name in builder.file_names(config, split)
  ]
  roots = [manual_dir] if manual_dir else [default_dir, *builder.PLACES]
  folders = [
    pathlib.Path(root).expanduser() / subfolder
    for root in roots
    for subfolder in dict.fromkeys((builder.name, builder.ARCHIVE, ''))  # type: ignore[attr-defined]
  ]
  lacks = {
    folder: [
      name for name, path in zip(names, _paths(folder, names)) if path is None
    ]
    for folder in folders
  }
  # The folder itself comes last, since several data sets use the same names for
  # their files. If the user gave it, the error should name it.
  best = min(
    reversed(folders) if manual_dir else folders,
    key=lambda folder: len(lacks[folder]),
  )
  if not lacks[best]:
    return next(folder for folder in folders if not lacks[folder])
  where = (
    'put them there'
    if manual_dir
    else (
      'put them there, or name the folder that has them by --manual_dir'
      + (f', or {builder.INSTALL}' if builder.INSTALL else '')
    )
  )
  raise ValueError(
    f'no {", ".join(lacks[best])} (or .gz) in {best}: these are the '
    f'original files of the data set; {where}'
  )


def read_bytes(path: pathlib.Path) -> bytes:
  """Reads a file, and decompresses it if its name ends in .gz.

  Raises:
    ValueError: if it cannot be read.
  """
  try:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == '.gz' else content
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path}: cannot be read ({error})') from error


def _paths(folder, names):
  """Returns the path of each file, plain or gzipped; None if it is missing."""

  def one(name):
    either = folder / name, folder / f'{name}.gz'
    return next((path for path in either if path.is_file()), None)

  return [one(name) for name in names]
