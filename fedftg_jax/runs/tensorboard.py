"""Scalars and images for TensorBoard, without TensorFlow.

The event file says again what metrics.jsonl, timings.jsonl and generated.npz
say: it is written anew from the rows that there are when a run begins.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

FOLDER = 'tensorboard'  # in a run's folder


def start(
  folder: pathlib.Path,
  rows: list[dict[str, float]],
  images: Mapping[int, np.ndarray],
):
  """A writer into a run's folder, in place of what was there.

  Args:
    folder: of the run.
    rows: flat rows, each with its 'round', that come first.
    images: generated ones by round, likewise.

  Returns:
    The writer, for `add`; to be closed.
  """
  import tensorboardX  # takes time to import

  for old in (folder / FOLDER).glob('events.out.tfevents.*'):
    old.unlink()
  writer = tensorboardX.SummaryWriter(str(folder / FOLDER))
  for row in rows:
    add(writer, row)
  for done, some in images.items():
    add(writer, {'round': done}, some)
  return writer


def add(
  writer, row: Mapping[str, Any], images: np.ndarray | None = None
) -> None:
  """Adds a row's numbers, each under its column's name, and generated images.

  Args:
    writer: from `start`.
    row: flat; None is left out.
    images: [C, H, W, channels] uint8, if any.
  """
  for name, value in row.items():
    if name != 'round' and value is not None:
      writer.add_scalar(name, value, row['round'])
  if images is not None:
    writer.add_images('generated', images, row['round'], dataformats='NHWC')
  writer.flush()
