"""Optimisers whose steps have a derivative everywhere."""

import jax
import jax.numpy as jnp
import optax


def adam(
  learning_rate: float | jax.Array, **options: float
) -> optax.GradientTransformation:
  """Builds `optax.adam` with the derivative of `with_derivative`.

  Args:
    learning_rate: step size.
    **options: other arguments of `optax.adam`.

  Returns:
    The optimiser.
  """
  return optax.chain(
    with_derivative(optax.scale_by_adam(**options)),  # type: ignore[arg-type]
    optax.scale_by_learning_rate(learning_rate),
  )


def with_derivative(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Gives an optimiser a finite derivative without changing its steps.

  If all gradients so far were exactly 0, as for units that have never been
  active, a step of Adam is 0 / eps, and JAX's derivative of the square root
  gives 0 / 0. Here that derivative is 0. (Adam's `eps_root` would also avoid
  it, but would change the steps.)

  Args:
    optimizer: one that does not use the parameters, and does not close over
      traced arrays.

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
