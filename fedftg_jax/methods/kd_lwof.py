"""KD + LwoF: clients with models of their own, linked to the common one.

Shi, Radu and Yang, arXiv:2211.03457: clients keep custom models of unequal
size; knowledge distillation (KD) links each to a common, global architecture,
which is what travels, joined by Learning without Forgetting (LwoF) for better
personal models. A RECONSTRUCTION: of the paper only the abstract was at hand,
and no code is known. The losses' form, weights and temperature and the order of
the phases are choices made here; no number of the paper can be compared with.

With z the logits on a batch, KL(p || q) = T^2 KL(softmax(p / T) ||
softmax(q / T)) in the mean over it, CE the cross-entropy, w the common model
and u a client's own:

  phase A  u minimises (1 - alpha) CE + alpha KL(z_received || z_u)
           + beta KL(z_old || z_u), with the received w and the own model as it
           was before the round ('old') frozen, in eval mode.
  phase B  w, beginning at the received one, minimises
           (1 - gamma) CE + gamma KL(z_u || z_w), with u frozen.

w is sent and averaged (FedAvg); u never leaves the client. Both phases have the
solver's steps, on the same batches. Joint training (deep mutual learning: each
teaches the other as it is at the moment) takes one step of both on a batch; the
two gradients are clipped as one.

A client that drops out after its work (`--dropout_after_work`) keeps its u.
"""

from collections.abc import Callable, Mapping
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import losses
from fedftg_jax.base import (
  ApplyModel,
  LossAux,
  Method,
  Model,
  Objective,
  Output,
  Personal,
  Variables,
)

Phases = Literal['a_b', 'b_a', 'joint']
Terms = Literal['kd_lwof', 'kd_only', 'lwof_only', 'ce_only']
Old = Literal['own', 'received']


class Slot(NamedTuple):
  """A client's slot, of one size whatever its model."""

  flat: jax.Array  # [P of the largest] its own model, packed
  seen: jax.Array  # [] bool, whether it has one; else it is drawn
  seed: jax.Array  # key data, of the draw


def kd_lwof(
  model: Model,
  architectures: Mapping[str, Model],
  phases: Phases = 'a_b',
  terms: Terms = 'kd_lwof',
  alpha: float = 0.5,
  beta: float = 0.5,
  gamma: float = 0.5,
  tau: float = 2.0,
  own_steps: int = 0,
  old: Old = 'own',
) -> Method:
  """Own models on the clients, in both directions distilled with the common.

  Args:
    model: the common classifier.
    architectures: the clients' models by name; client k has that of number k
      modulo their number.
    phases: 'a_b', clients train their own model and then the common one,
      'b_a', the other way round, or 'joint', both at once.
    terms: what own models learn from beside labels: 'kd_lwof', the received
      model and the old one, 'kd_only' (beta 0), 'lwof_only' (alpha 0), or
      'ce_only' (both 0).
    alpha: weight of the received model's answers in phase A.
    beta: weight of the old model's answers in phase A.
    gamma: weight of the own model's answers in phase B.
    tau: temperature T.
    own_steps: of phase A, steps at most; 0 for as many as phase B has.
    old: which model is not to be forgotten: the client's 'own' before the
      round, or the 'received' one.

  Returns:
    The method. A client's slot holds its own model, which is evaluated as
    'custom', and by architecture. Metrics have what the solver says of phase A,
    such as 'kd_lwof/own_train_loss'.

  Raises:
    ValueError: without a model, or for a number or a name out of range.
  """
  _check(architectures, alpha, beta, gamma, tau, own_steps)
  for name, value, known in (
    ('phases', phases, Phases),
    ('terms', terms, Terms),
    ('old', old, Old),
  ):
    if value not in get_args(known):
      raise ValueError(f'{name} must be one of {get_args(known)}: {value!r}.')
  alpha = alpha if terms in ('kd_lwof', 'kd_only') else 0.0
  beta = beta if terms in ('kd_lwof', 'lwof_only') else 0.0
  packing = _packing(architectures)

  def init(key, variables):
    del variables
    flat = jnp.zeros(packing.size, jnp.result_type(float))
    return (), Slot(flat, jnp.zeros((), bool), jax.random.key_data(key))

  def own_model(view):
    """The client's own model, packed."""
    seed = jax.random.wrap_key_data(view.own.seed)
    drawn = packing.init(
      packing.kind(view), jax.random.fold_in(seed, view.client_id)
    )
    return jnp.where(view.own.seen, view.own.flat, drawn)

  def loss_of_own(apply, received, before):
    """Phase A; `received` and `before` give logits of images."""

    def loss(variables, batch, key):
      del key
      output = apply(variables, batch.x, mask=batch.mask, train=True)
      ce = losses.cross_entropy(output.logits, batch.y, batch.mask)
      total = own_loss(
        ce,
        output.logits,
        received(batch.x) if alpha else None,
        before(batch.x) if beta else None,
        batch.mask,
        alpha,
        beta,
        tau,
      )
      return total, LossAux(output.stats, ce, output.logits)

    return loss

  def taught(objective, teacher):
    """Phase B's objective; `teacher` gives logits of images."""
    if not gamma:
      return objective

    def loss(variables, batch, key):
      value, aux = objective.loss(variables, batch, key)
      divergence = losses.masked_mean(
        losses.tempered_divergence(aux.logits, teacher(batch.x), tau),
        batch.mask,
      )
      return value + gamma * (divergence - aux.cross_entropy), aux

    return objective._replace(loss=loss)

  def with_logits(apply, variables):
    return lambda x: losses.frozen(lambda v: apply(v, x).logits, variables)

  def phase_a(inner, view, flat):
    limit = jnp.minimum(view.num_steps, own_steps or view.num_steps)
    received = with_logits(model.apply, view.received)

    def of_kind(i):
      apply = packing.models[i].apply

      def train(flat):
        begin = packing.unpack(i, flat)
        before = with_logits(apply, begin) if old == 'own' else received
        local = inner(
          Objective(loss_of_own(apply, received, before), jnp.zeros(())),
          view._replace(variables=begin, num_steps=limit),
        )
        return packing.pack(local.variables), local.metrics

      return train

    return packing.switch(packing.kind(view), of_kind, flat)

  def phase_b(inner, objective, view, flat):
    kind = packing.kind(view)
    teacher = with_logits(
      lambda flat, x: packing.apply(Variables(flat, kind), x), flat
    )
    return inner(taught(objective, teacher), view)

  def joint(inner, objective, view, flat):
    received = with_logits(model.apply, view.received)

    def of_kind(i):
      apply = packing.models[i].apply

      def train(flat):
        begin = packing.unpack(i, flat)
        before = with_logits(apply, begin) if old == 'own' else received

        def loss(both, batch, key):
          common, own = (
            Variables(*one) for one in zip(both.params, both.stats)
          )
          frozen_common, frozen_own = (
            one._replace(params=jax.tree.map(losses.held_fixed, one.params))
            for one in (common, own)
          )
          to_common = taught(objective, with_logits(apply, frozen_own))
          to_own = loss_of_own(
            apply, with_logits(model.apply, frozen_common), before
          )
          of_common, aux = to_common.loss(common, batch, key)
          of_own, own_aux = to_own(own, batch, key)
          stats = aux.stats, own_aux.stats
          return of_common + of_own, aux._replace(stats=stats)

        both = Variables(*zip(view.variables, begin))
        local = inner(
          objective._replace(loss=loss), view._replace(variables=both)
        )
        common, own = (Variables(*one) for one in zip(*local.variables))
        return local._replace(variables=common), packing.pack(own)

      return train

    return packing.switch(packing.kind(view), of_kind, flat)

  def train(inner, objective, view, key):
    del key
    flat, metrics = own_model(view), {}
    if phases == 'joint':
      local, flat = joint(inner, objective, view, flat)
    elif phases == 'a_b':
      flat, metrics = phase_a(inner, view, flat)
      local = phase_b(inner, objective, view, flat)
    else:
      local = phase_b(inner, objective, view, flat)
      flat, metrics = phase_a(inner, view, flat)
    of_own = {f'kd_lwof/own_{name}': v for name, v in metrics.items()}
    local = local._replace(metrics={**local.metrics, **of_own})
    return local, Slot(flat, jnp.ones((), bool), view.own.seed)

  def personal(view):
    kind = packing.kind(view)
    custom = Personal(
      packing.apply, Variables(own_model(view), kind), packing.kinds, kind
    )
    return {'custom': custom}

  return Method(init=init, train=train, personal=personal)


def own_loss(
  cross_entropy: jax.Array,
  logits: jax.Array,
  received: jax.Array | None,
  old: jax.Array | None,
  mask: jax.Array | None,
  alpha: float,
  beta: float,
  tau: float,
) -> jax.Array:
  """Phase A's loss, a mean over the batch.

  Args:
    cross_entropy: [] of the logits.
    logits: [B, C] of the own model.
    received: [B, C] of the received one; None without `alpha`.
    old: [B, C] of the old one; None without `beta`.
    mask: [B] bool, False on padding.
    alpha: weight of the first divergence, against the cross-entropy's.
    beta: weight of the second.
    tau: temperature.
  """
  total = (1 - alpha) * cross_entropy
  for weight, teacher in ((alpha, received), (beta, old)):
    if teacher is not None:
      divergence = losses.tempered_divergence(logits, teacher, tau)
      total += weight * losses.masked_mean(divergence, mask)
  return total


class _Packing(NamedTuple):
  """Models of several architectures, each in one vector of one length.

  `switch` runs the one of a number where clients are not stacked, and all of
  them where they are.
  """

  models: tuple[Model, ...]
  size: int  # of the largest
  kinds: tuple  # see `Personal`
  kind: Callable  # view -> [] number of its client's
  switch: Callable  # (kind, function that makes the function of i, *args)
  pack: Callable  # Variables -> [size]
  unpack: Callable  # (i, [size]) -> Variables
  init: Callable  # (kind, key) -> [size]
  apply: ApplyModel  # of Variables([size], kind)


def _packing(architectures: Mapping[str, Model]) -> _Packing:
  each = tuple(architectures.values())
  like = [jax.eval_shape(m.init, jax.random.key(0)) for m in each]
  size = max(
    sum(math.prod(a.shape) for a in jax.tree.leaves(tree)) for tree in like
  )

  def switch(kind, of_kind, *args):
    return jax.lax.switch(kind, [of_kind(i) for i in range(len(each))], *args)

  def pack(variables):
    leaves = [jnp.ravel(a) for a in jax.tree.leaves(variables)]
    flat = jnp.concatenate(leaves).astype(jnp.result_type(float))
    return jnp.pad(flat, (0, size - len(flat)))

  def unpack(i, flat):
    leaves, structure = jax.tree.flatten(like[i])
    ends = np.cumsum([0, *(math.prod(a.shape) for a in leaves)])
    arrays = [
      flat[first:last].reshape(a.shape).astype(a.dtype)
      for a, first, last in zip(leaves, ends, ends[1:])
    ]
    return jax.tree.unflatten(structure, arrays)

  def init(kind, key):
    return switch(kind, lambda i: lambda key: pack(each[i].init(key)), key)

  def apply(variables, x, mask=None, train=False):
    """Statistics are not renewed."""
    flat, kind = variables

    def of_kind(i):
      run = each[i].apply
      return lambda flat: run(unpack(i, flat), x, mask=mask, train=train).logits

    return Output(switch(kind, of_kind, flat), (), kind)

  def unpacker(i):
    return lambda variables: unpack(i, variables.params)

  return _Packing(
    each,
    size,
    tuple((name, unpacker(i)) for i, name in enumerate(architectures)),
    lambda view: view.client_id % len(each),
    switch,
    pack,
    unpack,
    init,
    apply,
  )


def _check(architectures, alpha, beta, gamma, tau, own_steps):
  if not architectures:
    raise ValueError('architectures must have at least one.')
  if not (0 <= alpha <= 1 and 0 <= gamma <= 1):
    raise ValueError(
      f'alpha and gamma must be between 0 and 1, got {alpha} and {gamma}.'
    )
  losses.check_distillation(beta, tau)
  if own_steps < 0:
    raise ValueError(f'own_steps must be at least 0, got {own_steps}.')
