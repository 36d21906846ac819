"""Optimisers whose steps have a derivative everywhere."""

import jax
import jax.numpy as jnp
import optax


def adam(
  learning_rate: float | jax.Array, **options: float
) -> optax.GradientTransformation:
  """`optax.adam`, `with_derivative`; arguments are its own."""
  return optax.chain(
    with_derivative(optax.scale_by_adam(**options)),  # type: ignore[arg-type]
    optax.scale_by_learning_rate(learning_rate),
  )


def with_derivative(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Gives an optimiser a finite derivative, and leaves its steps as they are.

  Where all gradients so far were exactly 0, as those of units that have not
  been active, a step of Adam is 0 / eps, and JAX's derivative of the square
  root makes 0 / 0 of it. Here that is 0. (Adam's `eps_root` would be another
  way out, with other steps.)

  Args:
    optimizer: one that does not look at the parameters, and closes over no
      array of a trace.

  Returns:
    The optimiser.
  """

  @jax.custom_jvp
  def step(grads, state):
    return optimizer.update(grads, state)

  @step.defjvp
  def derivative(primals, tangents):
    out, dots = jax.jvp(optimizer.update, primals, tangents)
    return out, jax.tree.map(
      lambda a, d: (
        jnp.where(jnp.isnan(d), 0, d)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else d
      ),
      out,
      dots,
    )

  def update(grads, state, params=None):
    del params
    return step(grads, state)

  return optax.GradientTransformation(optimizer.init, update)
