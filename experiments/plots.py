"""Pictures: accuracy curves, and a grid of generated images."""

from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
matplotlib.use('Agg')
from matplotlib import pyplot as plt  # pylint: disable=g-import-not-at-top
import numpy as np

_PER_CLASS = 8


def curves(
    path: Any, series: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    ylabel: str, title: str = '') -> None:
  """Draws each name's mean over seeds against rounds, with a band of one
  standard deviation where there are several seeds.

  Args:
    path: where to write.
    series: by name, for each seed, the points (round, value).
    ylabel: what the values are.
    title: of the picture.
  """
  figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
  for i, (name, seeds) in enumerate(series.items()):
    seeds = [dict(seed) for seed in seeds]
    rounds = sorted(set.intersection(*map(set, seeds)))
    values = np.array([[seed[t] for t in rounds] for seed in seeds])
    mean, spread = values.mean(0), values.std(0, ddof=1 if len(values) > 1 else 0)
    style = '-' if i % 2 == 0 else '--'  # curves may lie on each other
    line, = axes.plot(rounds, mean, style, label=name)
    if len(values) > 1:
      axes.fill_between(rounds, mean - spread, mean + spread, alpha=.2,
                        color=line.get_color(), linewidth=0)
  axes.set(xlabel='round', ylabel=ylabel, title=title)
  axes.grid(alpha=.3)
  axes.legend()
  figure.savefig(path, dpi=130)
  plt.close(figure)


def generated(
    path: Any, synthesise: Callable, shared: Any, num_classes: int) -> None:
  """Draws what the generator makes of each class, one labelled row each."""
  labels = jnp.repeat(jnp.arange(num_classes), _PER_CLASS)
  images = np.asarray(synthesise(shared, labels, jax.random.key(0)))
  low = images.min((1, 2, 3), keepdims=True)
  high = images.max((1, 2, 3), keepdims=True)
  images = (images - low) / np.maximum(high - low, 1e-6)
  if images.shape[-1] != 3:
    images = np.repeat(images.mean(-1, keepdims=True), 3, axis=-1)
  images = np.pad(images, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1)
  _, height, width, _ = images.shape
  mosaic = images.reshape(num_classes, _PER_CLASS, height, width, 3).transpose(
      0, 2, 1, 3, 4).reshape(num_classes * height, _PER_CLASS * width, 3)
  figure, axes = plt.subplots(
      figsize=(_PER_CLASS * .7, num_classes * .7 + .4), layout='constrained')
  axes.imshow(mosaic)
  axes.set(xticks=[], ylabel='class', yticks=(np.arange(num_classes) + .5) * height)
  axes.set_yticklabels(range(num_classes))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title('generated images, each scaled to its own range', fontsize=9)
  figure.savefig(path, dpi=100, bbox_inches='tight')
  plt.close(figure)
