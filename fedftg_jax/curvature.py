"""Approximations of the Hessian in forward-mode derivatives of local training.

The derivative of local training in the model that it starts from is a product
over its steps; for plain SGD the factors are I - eta H, with H the Hessian of
the objective. A part from this module replaces H by an approximation and leaves
the training as it is: the gradient keeps its value and gets a derivative of its
own. `influence.tracking` takes a federation with such a part as `through`.

'blocks' and 'fisher' are from Xue, Niu, Zheng, Tang, Lyu, Wu and Chen, Toward
Understanding the Influence of Individual Clients in Federated Learning, AAAI
2021, arXiv:2012.10936.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
import optax

from fedftg_jax.base import Batch, Method, PyTree

KINDS = ('exact', 'blocks', 'fisher', 'first_order')


def curvature(kind: str = 'exact') -> Method:
  """Makes a part, the last of a chain, that replaces the Hessian of training.

  Only the derivative of the objective's gradient in the parameters changes. The
  derivative stays exact in everything else that the objective depends on, such
  as the received model in a penalty, and so do weight decay, clipping,
  momentum, and what a method computes outside of local training. A part that
  trains by itself, without calling `inner`, is differentiated exactly.

  Args:
    kind: 'exact' changes nothing. 'blocks' ignores the coupling between two
      arrays of the parameters: each array is multiplied with its own diagonal
      block of H. 'fisher' replaces the Hessian of the cross-entropy by the mean
      of g g^T over a batch, where g is the gradient of one example (the paper
      draws some examples; here it is the whole batch). Penalties keep their
      Hessians. 'first_order' multiplies each step's H with the change at the
      beginning of the round: I - eta sum_i H_i instead of the product.

  Returns:
    The method.

  Raises:
    ValueError: for another kind; when it is traced, for 'fisher' of a model
      with BatchNorm, where an example has no gradient of its own.
  """
  if kind not in KINDS:
    raise ValueError(f'curvature must be one of {KINDS}, got {kind!r}.')
  if kind == 'exact':
    return Method()
  rule = _RULES[kind]

  def train(inner, objective, view, key):
    del key
    if kind == 'fisher' and jax.tree.leaves(view.variables.stats):
      raise ValueError(
        "curvature 'fisher' needs the gradient of each example, which a model "
        "with BatchNorm does not have; use norm='group', or another curvature."
      )
    start = view.variables.params
    loss = functools.partial(_loss_with_rule, objective.loss, rule, start)
    return inner(objective._replace(loss=loss), view), view.own

  return Method(train=train)


class _At(NamedTuple):
  """The functions of the parameters alone that a rule can use."""

  loss: Callable  # -> (value, LossAux)
  by_example: Callable  # -> [B] cross-entropies
  mask: jax.Array  # [B] bool


def _loss_with_rule(loss, rule, start, variables, batch, key):
  """Computes `loss`; the derivative of its gradient is given by `rule`."""

  def whole(params, stats):
    return loss(variables._replace(params=params, stats=stats), batch, key)

  def by_example(params, stats):
    def one(x, y):
      alone = Batch(x[None], y[None], jnp.ones(1, bool))
      _, aux = loss(variables._replace(params=params, stats=stats), alone, key)
      return aux.cross_entropy

    return jax.vmap(one)(batch.x, batch.y)

  if rule is not _fisher:  # do not trace what is not used
    by_example = lambda *_: ()
  args = variables.params, variables.stats
  whole, consts = _opened(whole, *args)
  by_example, more_consts = _opened(by_example, *args)
  rest = variables.stats, consts, more_consts, batch.mask

  def at(rest):
    stats, consts, more_consts, mask = rest
    return _At(
      lambda params: whole(consts, params, stats),
      lambda params: by_example(more_consts, params, stats),
      mask,
    )

  def value_and_grad(params, rest):
    return jax.value_and_grad(at(rest).loss, has_aux=True)(params)

  @jax.custom_jvp
  def with_gradient(params, start, rest):
    del start
    return value_and_grad(params, rest)

  def derivative(primals, tangents):
    (params, _, rest), (dot, start_dot, rest_dot) = primals, tangents
    here = at(rest)
    _, along = _jvp(
      lambda both: at(both[1]).loss(both[0]), (params, rest), (dot, rest_dot)
    )
    out, (_, of_rest) = _jvp(
      lambda rest: value_and_grad(params, rest), rest, rest_dot
    )
    of_params = rule(here, params, _filled(dot), _filled(start_dot))
    return out, (along, optax.tree.add(of_rest, of_params))

  with_gradient.defjvp(derivative, symbolic_zeros=True)

  # The solver's gradient uses `forward` and `backward`. These are plain
  # operations for a derivative of the whole training.
  @jax.custom_vjp
  def value(params, start, rest):
    del start
    return at(rest).loss(params)

  def forward(params, start, rest):
    return with_gradient(params, start, rest)

  def backward(grads, cotangent):
    return optax.tree.scale(cotangent[0], grads), None, None

  value.defvjp(forward, backward)
  return value(variables.params, start, rest)


def _opened(function: Callable, *args: PyTree) -> tuple[Callable, list]:
  """Turns what `function` closes over into a first argument.

  A function with a custom derivative must not close over values that are traced
  outside of it.

  Returns:
    The new function, and the value of its first argument.
  """
  closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
  structure = jax.tree.structure(shape)

  def opened(consts, *args):
    leaves = jax.tree.leaves(args)
    return structure.unflatten(
      jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)
    )

  return opened, closed.consts


def _jvp(function: Callable, primal: PyTree, tangent: PyTree) -> Any:
  """Computes `jax.jvp` of one argument, skipping leaves with symbolic zeros."""
  leaves, structure = jax.tree.flatten(primal)
  dots = jax.tree.leaves(tangent, is_leaf=_is_zero)
  moving = [i for i, d in enumerate(dots) if not _is_zero(d)]

  def of(*some):
    values = list(leaves)
    for i, value in zip(moving, some):
      values[i] = value
    return function(structure.unflatten(values))

  if not moving:
    out = function(primal)
    return out, jax.tree.map(jnp.zeros_like, out)
  return jax.jvp(of, [leaves[i] for i in moving], [dots[i] for i in moving])


def _filled(tangent: PyTree) -> PyTree:
  return jax.tree.map(
    lambda d: jnp.zeros(d.shape, d.dtype) if _is_zero(d) else d,
    tangent,
    is_leaf=_is_zero,
  )


def _is_zero(tangent: Any) -> bool:
  return isinstance(tangent, SymbolicZero)


def _product(at, params, dot):
  """Multiplies `dot` with the Hessian of the loss."""
  gradient = jax.grad(lambda p: at.loss(p)[0])
  return jax.jvp(gradient, (params,), (dot,))[1]


def _blocks(at, params, dot, start_dot):
  """Multiplies each array of `dot` with its diagonal block of the Hessian."""
  del start_dot
  leaves, structure = jax.tree.flatten(params)

  def gradient_of(i, leaf):
    def loss(leaf):
      values = [*leaves[:i], leaf, *leaves[i + 1 :]]
      return at.loss(structure.unflatten(values))[0]

    return jax.grad(loss)(leaf)

  return structure.unflatten(
    [
      jax.jvp(functools.partial(gradient_of, i), (leaf,), (d,))[1]
      for i, (leaf, d) in enumerate(zip(leaves, jax.tree.leaves(dot)))
    ]
  )


def _fisher(at, params, dot, start_dot):
  """Computes mean_b g_b <g_b, dot>, plus the penalty's Hessian times `dot`."""
  del start_dot

  def penalty(params):
    loss, aux = at.loss(params)
    return loss - aux.cross_entropy

  _, along = jax.jvp(at.by_example, (params,), (dot,))  # [B]
  weight = at.mask / jnp.maximum(jnp.sum(at.mask), 1)
  _, pull = jax.vjp(at.by_example, params)
  (of_examples,) = pull((weight * along).astype(along.dtype))
  _, of_penalty = jax.jvp(jax.grad(penalty), (params,), (dot,))
  return optax.tree.add(of_examples, of_penalty)


def _first_order(at, params, dot, start_dot):
  """Multiplies the Hessian with the change at the beginning of the round."""
  del dot
  return _product(at, params, start_dot)


_RULES = {'blocks': _blocks, 'fisher': _fisher, 'first_order': _first_order}
