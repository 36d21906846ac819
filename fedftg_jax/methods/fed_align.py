"""FedAlign: the slimmed last stage is regularised towards the full one.

Mendieta, Yang, Wang, Lee, Ding and Chen, Local Learning Matters: Rethinking
Data Heterogeneity in Federated Learning, CVPR 2022, arXiv:2111.14213; terms as
in its released code (commit 08bcb38). The last stage of the network is run
again on its own input f1, using only the first channels of f1 and of each layer
(see `base.LastStage`). With f2 the stage's output, M = pool(f1) f2^T / (H W)
for each example, and sigma its largest singular value, the local objective
gains

  L = mean_b (sigma(M_slim) - sigma(M_full))^2,   scaled by  mu CE / L,

with M_full and the scale held constant: the value of the term is mu CE, its
gradient mu CE times that of log L. Only leading slices of the last stage get a
gradient. sigma is computed by 10 steps of the power iteration for M M^T,
starting from a vector of ones, and the gradient passes through all of them.
Nothing is sent besides the model, and nothing is kept.

Deviations from the released code: if the two sigmas are equal up to rounding,
the term is 0 (the code divides by 0); clients count by all of their examples,
not by whole batches; clipping and momentum, and whether momentum is kept
between rounds, are the solver's (`--clip_norm`, `--momentum`,
`--keep_momentum`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import distillation, losses, models
from fedftg_jax.base import Method, Model
from fedftg_jax.models import layers, resnet

_ROUNDING = 16  # units in the last place within which sigmas count as equal


def fed_align(
  model: Model, mu: float = 0.45, width: float = 0.25, iterations: int = 10
) -> Method:
  """Builds FedAlign: the alignment of a slimmed last stage with the full one.

  Args:
    model: the classifier; it must have stages.
    mu: weight of the alignment.
    width: share of the last stage's channels, above 0 and at most 1; rounded to
      a multiple of 8, but never more than there are.
    iterations: number of power iterations.

  Returns:
    The method.

  Raises:
    ValueError: for a value out of range, or a model without stages.
  """
  last_stage = models.need(model, 'last_stage', 'fed_align')
  distillation.check_least(mu=(mu, 0), iterations=(iterations, 1))
  if not 0 < width <= 1:
    raise ValueError(f'width must be above 0 and at most 1, got {width}.')

  def penalty(variables, output, batch, view, key):
    del view, key
    if not mu:
      return 0.0
    start, end = map(losses.held_fixed, output.stages)
    slim_end = last_stage(variables, start, batch.mask, width)
    slim_start = start[..., : resnet.slim(start.shape[-1], width)]
    own, target = (
      spectral_norm(transmitting_matrix(*ends), iterations)
      for ends in ((slim_start, slim_end), (start, end))
    )
    cross_entropy = losses.cross_entropy(output.logits, batch.y, batch.mask)
    return alignment(own, target, mu * cross_entropy, batch.mask)

  return Method(penalty=penalty)


def alignment(
  own: jax.Array,
  target: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Scales mean_b (own - target)^2 to `value`; 0 where the two are equal.

  Args:
    own: [B] singular values of the slimmed stage.
    target: [B] singular values of the full stage, held constant.
    value: the value that the term gets, held constant.
    mask: [B] False on padding; None if there is no padding.

  Returns:
    A scalar whose gradient is `value` times that of the logarithm of the mean.
  """
  target = losses.held_fixed(target)
  gap = losses.masked_mean((own - target) ** 2, mask)
  rounding = _ROUNDING * jnp.finfo(gap.dtype).eps
  least = losses.masked_mean((rounding * target) ** 2, mask)
  differ = gap > least
  scale = jnp.where(differ, value / jnp.where(differ, gap, 1), 0)
  return losses.held_fixed(scale) * gap


def transmitting_matrix(start: jax.Array, end: jax.Array) -> jax.Array:
  """Computes the matrix pool(start) end^T / (H W) of a stage.

  Args:
    start: [B, h, w, C] the stage's input; it is pooled to the size of its
      output.
    end: [B, H, W, D] its output.

  Returns:
    [B, C, D].
  """
  start, end = map(layers.at_least_float32, (start, end))
  _, height, width, _ = end.shape
  for axis, size in ((1, height), (2, width)):
    rows = jnp.asarray(_pooling(start.shape[axis], size), start.dtype)
    start = jnp.moveaxis(jnp.tensordot(rows, start, (1, axis)), 0, axis)
  return jnp.einsum('bhwc,bhwd->bcd', start, end) / (height * width)


def _pooling(num_in: int, num_out: int) -> np.ndarray:
  """Computes the weights [out, in] of PyTorch's adaptive average pooling.

  They are means over windows that cover the input.
  """
  weights = np.zeros((num_out, num_in))
  for i in range(num_out):
    window = slice(i * num_in // num_out, -(-(i + 1) * num_in // num_out))
    weights[i, window] = 1 / (window.stop - window.start)
  return weights


def spectral_norm(matrices: jax.Array, iterations: int = 10) -> jax.Array:
  """Estimates largest singular values by power iteration.

  Args:
    matrices: [B, C, D].
    iterations: number of products with M M^T; the value is that of the last
      one.

  Returns:
    [B], never above the singular values; differentiable.
  """

  def product(v):
    back = jnp.einsum('bcd,bc->bd', matrices, v)
    return jnp.einsum('bcd,bd->bc', matrices, back)

  def norm(v):
    """Returns whether v is not a zero vector, and its norm, or else 1.

    With the 1, derivatives of any order exist at zero, too.
    """
    square = jnp.sum(v**2, axis=-1, keepdims=True)
    positive = square > jnp.finfo(v.dtype).tiny
    return positive, jnp.sqrt(jnp.where(positive, square, 1))

  def step(_, v):
    v = product(v)
    return v / norm(v)[1]

  ones = jnp.ones(matrices.shape[:2], matrices.dtype)
  v = jax.lax.fori_loop(0, iterations - 1, step, ones / norm(ones)[1])
  positive, value = norm(product(v))
  return jnp.where(positive, jnp.sqrt(value), 0)[:, 0]
