"""Accuracy and loss of a model on a whole data set."""

import functools

import jax
import jax.numpy as jnp
import optax

from fedftg_jax.base import Model, Variables


@functools.partial(jax.jit, static_argnums=(0, 4))
def evaluate(
    model: Model, variables: Variables, x: jax.Array, y: jax.Array,
    batch_size: int = 500) -> dict[str, jax.Array]:
  """Mean cross-entropy and accuracy, in eval mode.

  Args:
    model: the classifier.
    variables: its variables.
    x: [M, H, W, channels] images.
    y: [M] labels.
    batch_size: examples at once; the last batch is padded and masked.

  Returns:
    {'loss', 'accuracy'}: scalars.
  """
  num = len(y)
  batch_size = min(batch_size, num)
  rows = jnp.arange(-(-num // batch_size) * batch_size)

  def one(total, rows):
    valid = rows < num
    rows = jnp.minimum(rows, num - 1)
    logits = model.apply(variables, x[rows]).logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
    correct = jnp.argmax(logits, axis=-1) == y[rows]
    return total + jnp.stack([jnp.sum(valid * loss), jnp.sum(valid * correct)]), ()

  zero = jnp.zeros(2, jnp.result_type(float))
  total, _ = jax.lax.scan(one, zero, rows.reshape(-1, batch_size))
  return {'loss': total[0] / num, 'accuracy': total[1] / num}
