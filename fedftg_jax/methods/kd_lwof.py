"""KD + LwoF: clients with custom architectures, linked to a common model.

Shi, Radu and Yang, arXiv:2211.03457: clients keep custom models of different
sizes. Knowledge distillation (KD) links each of them to a model of a common,
global architecture, which is the one that is sent. Learning without Forgetting
(LwoF) is added for better personal models. THIS IS A RECONSTRUCTION: only the
abstract of the paper was at hand, and no code is known. The form, weights and
temperature of the losses and the order of the phases are choices made here; the
results cannot be compared with any number of the paper.

With z the logits on a batch, KL(p || q) = T^2 KL(softmax(p / T) || softmax(q /
T)) as a mean over the batch, CE the cross-entropy, w the common model and u a
client's own model:

  phase A  u minimises (1 - alpha) CE + alpha KL(z_received || z_u)
           + beta KL(z_old || z_u). The received w and the own model as it was
           before the round ('old') are frozen, in eval mode.
  phase B  w, starting at the received one, minimises
           (1 - gamma) CE + gamma KL(z_u || z_w), with u frozen.

w is sent and averaged (FedAvg); u never leaves the client. Both phases take the
solver's steps, on the same batches. Joint training (deep mutual learning, in
which each model teaches the other in its current state) takes one step of both
models on each batch; the two gradients are clipped as one.

A client that drops out after training (`--dropout_after_work`) keeps its u.
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
  """A client's slot; it has the same size for every architecture."""

  flat: jax.Array  # [P of the largest model] its own model, packed
  seen: jax.Array  # [] bool, whether it has one; if not, it is drawn
  seed: jax.Array  # key data of that draw


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
  """Builds KD + LwoF: personal models, distilled to and from the common one.

  Args:
    model: the common classifier.
    architectures: the clients' models by name; client k has number k modulo
      their count.
    phases: 'a_b', clients train their own model and then the common one; 'b_a',
      the reverse order; or 'joint', both at once.
    terms: what own models learn from besides labels: 'kd_lwof', the received
      model and the old one; 'kd_only' (beta 0); 'lwof_only' (alpha 0); or
      'ce_only' (both 0).
    alpha: weight of the distillation from the received model in phase A.
    beta: weight of the distillation from the old model in phase A.
    gamma: weight of the distillation from the own model in phase B.
    tau: temperature T.
    own_steps: largest number of steps of phase A; 0 for as many as in phase B.
    old: the model that should not be forgotten: the client's 'own' before the
      round, or the 'received' one.

  Returns:
    The method. A client's slot holds its own model, which is evaluated as
    'custom', and by architecture. Metrics have those of the solver in phase A,
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
      raise ValueError(
        f'{name} must be one of {get_args(known)}, got {value!r}.'
      )
  alpha = alpha if terms in ('kd_lwof', 'kd_only') else 0.0
  beta = beta if terms in ('kd_lwof', 'lwof_only') else 0.0
  packing = _packing(architectures)

  def init(key, variables):
    del variables
    flat = jnp.zeros(packing.size, jnp.result_type(float))
    return (), Slot(flat, jnp.zeros((), bool), jax.random.key_data(key))

  def own_model(view):
    """Returns the client's own model, packed."""
    seed = jax.random.wrap_key_data(view.own.seed)
    drawn = packing.init(
      packing.kind(view), jax.random.fold_in(seed, view.client_id)
    )
    return jnp.where(view.own.seen, view.own.flat, drawn)

  def loss_of_own(apply, received, before):
    """Makes the loss of phase A; `received` and `before` return logits."""

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
    """Makes the objective of phase B; `teacher` maps images to logits."""
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
  """Computes the loss of phase A, a mean over the batch.

  Args:
    cross_entropy: [] that of the logits.
    logits: [B, C] of the own model.
    received: [B, C] logits of the received model; None without `alpha`.
    old: [B, C] logits of the old model; None without `beta`.
    mask: [B] bool, False on padding.
    alpha: weight of the first divergence; the cross-entropy has 1 - alpha.
    beta: weight of the second divergence.
    tau: temperature.

  Returns:
    A scalar.
  """
  total = (1 - alpha) * cross_entropy
  for weight, teacher in ((alpha, received), (beta, old)):
    if teacher is not None:
      divergence = losses.tempered_divergence(logits, teacher, tau)
      total += weight * losses.masked_mean(divergence, mask)
  return total


class _Packing(NamedTuple):
  """Models of several architectures, packed in vectors of the same length.

  `switch` runs one architecture if clients are not stacked, and all of them if
  they are.
  """

  models: tuple[Model, ...]
  size: int  # length of the largest model's vector
  kinds: tuple  # see `Personal`
  kind: Callable  # view -> [] index of its client's architecture
  switch: Callable  # (kind, i -> function of architecture i, *args)
  pack: Callable  # Variables -> [size]
  unpack: Callable  # (i, [size]) -> Variables
  init: Callable  # (kind, key) -> [size]
  apply: ApplyModel  # takes Variables([size], kind)


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
    """Runs the model forward; its statistics are not updated."""
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
    raise ValueError('architectures must have at least one model, got none.')
  if not (0 <= alpha <= 1 and 0 <= gamma <= 1):
    raise ValueError(
      f'alpha and gamma must be between 0 and 1, got {alpha} and {gamma}.'
    )
  losses.check_distillation(beta, tau)
  if own_steps < 0:
    raise ValueError(f'own_steps must be at least 0, got {own_steps}.')
