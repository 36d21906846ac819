"""pFedMe and pFedBreD: each client keeps a personal model near the common one.

Dinh, Tran and Nguyen, Personalized Federated Learning with Moreau Envelopes,
NeurIPS 2020, arXiv:2006.08848 (pFedMe). Shi et al., PRIOR: Personalized Prior
for Reactivating the Information Overlooked in Federated Learning, NeurIPS 2023,
arXiv:2310.09183 (pFedBreD; first arXiv:2211.10684). For each batch, with f_k
the client's loss on it and w_k its copy of the common model w:

  mu_k    = grad g(grad g*(w_k) - eta grad Phi_k)       mean of the prior
  theta_k ~ argmin f_k(theta) + lambda D(theta, mu_k)   prox_steps of descent
  w_k    <- w_k - lr lambda H(mu_k) (mu_k - theta_k)    lr the learning rate

and on the server w <- (1 - beta) w + beta mean(w_k), which is
`fed_avg(server_optimizer=optax.sgd(beta))`. D is the Bregman divergence of g*
and H its Hessian; g* and g belong to a prior of an exponential family, see
`Prior`. For the spherical Gaussian D is |theta - mu|^2 / 2 and H is 1. The
methods differ in Phi_k:

  pFedMe  none: mu_k = w_k
  lg      f_k, the loss: its gradient at w_k; the prox starts at mu_k
  meg     the envelope of the client's last round: H (last_k - theta_k), with
          last_k the w_k that it sent then (lambda is part of eta)
  mh      first w_k takes a step of first-order MAML, v1 = w_k - a grad f_k(w_k)
          and w_k <- w_k - a grad f_k(v1), each on a batch of its own; then meg

The personal model theta_k is the result of the method. It stays on the client
and is evaluated as 'theta', and after local training as 'personalised_theta',
beside w_k, which is 'personalised' there. The official pFedMe code
(CharlieDinh/pFedMe) overwrites theta_k by w_k before it is evaluated, and
reports the accuracy of w_k as the personal one.

This follows the official codes (CharlieDinh/pFedMe, BDeMo/pFedBreD_public),
with these deviations. The Jacobian of mu_k in w_k counts as 1, as in the codes.
Only the clients of a round train; in the codes all clients train, and only the
selected ones are averaged (`--train_all`, `schedules.with_all_at_work`).
Gradients of f_k are the solver's, with its clip and weight decay
(CharlieDinh/pFedMe: no clip, decay .001 in the prox alone; BDeMo: neither).
BatchNorm's running statistics are updated by every forward pass, and w_k and
theta_k share the last ones. A prior that is not spherical is ours: the released
code has no other.
"""

from collections.abc import Callable
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import trees
from fedftg_jax.base import Method, Model, Personal, PyTree, Rule, Variables

Kind = Literal['lg', 'meg', 'mh']
Family = Literal['spherical', 'diagonal']


class Prior(NamedTuple):
  """An exponential family, as a pair of conjugate convex functions.

  Attributes:
    potential: g*, a function of a mean: a tree of parameters. Its gradient is
      the natural parameters.
    cumulant: g, a function of natural parameters. Its gradient is the mean.
  """

  potential: Callable[[PyTree], jax.Array]
  cumulant: Callable[[PyTree], jax.Array]

  def natural(self, mean: PyTree) -> PyTree:
    """Computes the natural parameters of the member with this mean."""
    return jax.grad(self.potential)(mean)

  def mean(self, natural: PyTree) -> PyTree:
    """Computes the mean of the member with these natural parameters."""
    return jax.grad(self.cumulant)(natural)

  def divergence(self, theta: PyTree, mean: PyTree) -> jax.Array:
    """Computes g*(theta) - g*(mean) - <grad g*(mean), theta - mean>.

    This is the Bregman divergence D(theta, mean).
    """
    slope = optax.tree.vdot(self.natural(mean), optax.tree.sub(theta, mean))
    return self.potential(theta) - self.potential(mean) - slope

  def pull(self, mean: PyTree, theta: PyTree) -> PyTree:
    """Computes H(mean) (mean - theta).

    This is the gradient of the envelope in the mean, without lambda.
    """
    difference = optax.tree.sub(mean, theta)
    return jax.jvp(self.natural, (mean,), (difference,))[1]


def spherical() -> Prior:
  """Returns the Gaussian prior of unit variance: D = |theta - mu|^2 / 2."""

  def half_square(tree):
    return sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(tree)) / 2

  return Prior(half_square, half_square)


def diagonal() -> Prior:
  """Returns the Gaussian prior with one variance for each array (ours).

  D = sum_l p_l |theta_l - mu_l|^2 / 2. The precision p_l is proportional to the
  number of inputs of a layer's unit, whose inverse is the variance from which
  weights are initialised (biases and norms have one input). Its mean over all
  parameters is 1, so lambda keeps its scale.
  """

  def half_square(tree, power):
    precision = precisions(tree)
    return (
      sum(
        p**power * jnp.sum(jnp.square(a))
        for p, a in zip(precision, jax.tree.leaves(tree))
      )
      / 2
    )

  return Prior(
    functools.partial(half_square, power=1),
    functools.partial(half_square, power=-1),
  )


def precisions(params: PyTree) -> list[float]:
  """Computes the precisions of `diagonal` for each array of a model.

  Args:
    params: arrays or ShapeDtypeStructs.

  Returns:
    One number for each leaf.
  """
  leaves = jax.tree.leaves(params)
  inputs = [math.prod(a.shape[:-1]) for a in leaves]
  sizes = [math.prod(a.shape) for a in leaves]
  mean = sum(n * size for n, size in zip(inputs, sizes)) / max(sum(sizes), 1)
  return [n / mean for n in inputs]


_FAMILIES: dict[str, Callable[[], Prior]] = {
  'spherical': spherical,
  'diagonal': diagonal,
}


def prior(family: str) -> Prior:
  """Returns the prior of a family by name.

  Example:
    diagonal = prior('diagonal')
    mean = diagonal.mean(
      optax.tree.add_scale(diagonal.natural(params), -eta, grads)
    )

  Raises:
    ValueError: for a family that does not exist.
  """
  if family not in _FAMILIES:
    raise ValueError(
      f'family must be one of {tuple(_FAMILIES)}, got {family!r}.'
    )
  return _FAMILIES[family]()


class Slot(NamedTuple):
  """A client's slot of pFedMe and pFedBreD."""

  theta: Variables  # the personal model, at first the initial model
  last: PyTree  # parameters that it sent last, for meg and mh; else ()


class _Prox(NamedTuple):
  """The search for theta: `steps` of descent on f + lam D(., mean)."""

  prior: Prior
  lam: float
  rate: float
  steps: int

  def __call__(self, direction, begin, mean, batch, key):
    """Returns the resulting model and the cross-entropy before all steps."""
    anchor = self.prior.natural(mean)

    def descend(variables, _):
      grads, aux = direction(variables, batch, key)
      away = optax.tree.sub(self.prior.natural(variables.params), anchor)
      grads = optax.tree.add_scale(grads, self.lam, away)
      params = optax.tree.add_scale(variables.params, -self.rate, grads)
      return Variables(params, aux.stats), aux.cross_entropy

    found, losses = jax.lax.scan(descend, begin, length=self.steps)
    return found, losses[0]


def p_fed_me(
  model: Model,
  lam: float = 15.0,
  lr_p: float = 0.01,
  prox_steps: int = 5,
  warm: bool = True,
) -> Method:
  """Builds pFedMe.

  Args:
    model: the classifier.
    lam: lambda, how strongly a personal model is pulled to the mean of its
      prior.
    lr_p: learning rate of the personal model (official code: .09 on MNIST).
    prox_steps: steps of the personal model on each batch.
    warm: whether the personal model continues from batch to batch within a
      round, starting at the received model (official code), or starts on each
      batch at the client's copy of the common model (pFedBreD's code).

  Returns:
    The method. A client's slot is its personal model; nothing more is sent.

  Raises:
    ValueError: for a number out of range, or an lr_p with which the personal
      model's steps cannot converge.
  """
  prox = _Prox(prior('spherical'), lam, lr_p, prox_steps)
  _check(model, prox, 'spherical')

  def step(last, direction, variables, theta, batches, step_size, key):
    del last
    begin = variables._replace(params=theta) if warm else variables
    found, loss = prox(direction, begin, variables.params, batches[0], key)
    return *_pulled(prox, variables, variables.params, found, step_size), loss

  return _method(model, step, warm=warm)


def p_fed_bred(
  model: Model,
  kind: Kind = 'lg',
  lam: float = 15.0,
  lr_p: float = 0.01,
  prox_steps: int = 5,
  eta: float = 0.05,
  maml_rate: float = 0.01,
  family: Family = 'spherical',
) -> Method:
  """Builds pFedBreD.

  Args:
    model: the classifier.
    kind: how the mean of the prior is made: 'lg', from the gradient of the
      loss; 'meg', from the memorised gradient of the envelope; or 'mh', from
      both.
    lam: lambda, how strongly a personal model is pulled to the mean of its
      prior (official code: 15, for its MLP 30).
    lr_p: learning rate of the personal model.
    prox_steps: steps of the personal model on each batch.
    eta: distance factor between the mean of the prior and the client's copy of
      the common model; 0 is pFedMe without warm.
    maml_rate: for 'mh', the rate a of its MAML step.
    family: the prior: 'spherical', the Gaussian of the released code, or
      'diagonal', a Gaussian with one variance for each array.

  Returns:
    The method. A client's slot is its personal model and, for meg and mh, the
    parameters that it sent last; nothing more is sent.

  Raises:
    ValueError: for a number or a name out of range, or an lr_p with which the
      personal model's steps cannot converge.
  """
  if kind not in get_args(Kind):
    raise ValueError(f'kind must be one of {get_args(Kind)}, got {kind!r}.')
  if eta < 0 or maml_rate < 0:
    raise ValueError(
      f'eta and maml_rate must be at least 0, got {eta} and {maml_rate}.'
    )
  prox = _Prox(prior(family), lam, lr_p, prox_steps)
  _check(model, prox, family)

  def moved(params, grads):
    """Computes the mean of the prior from `params` and a gradient."""
    natural = prox.prior.natural(params)
    return prox.prior.mean(optax.tree.add_scale(natural, -eta, grads))

  def step(last, direction, variables, theta, batches, step_size, key):
    first, batch = batches[0], batches[-1]
    if kind == 'lg':
      grads, aux = direction(variables, batch, key)
      mean = moved(variables.params, grads)
      begin = Variables(mean, aux.stats)
      found, _ = prox(direction, begin, mean, batch, key)
      loss = aux.cross_entropy
    else:
      loss = None
      if kind == 'mh':
        variables, loss = maml(direction, variables, first, batch, key)
      mean = moved(variables.params, prox.prior.pull(last, theta))
      found, before = prox(direction, variables, mean, batch, key)
      loss = before if loss is None else loss
    return *_pulled(prox, variables, mean, found, step_size), loss

  def maml(direction, variables, first, second, key):
    grads, aux = direction(variables, first, key)
    inner = optax.tree.add_scale(variables.params, -maml_rate, grads)
    grads, then = direction(Variables(inner, aux.stats), second, key)
    params = optax.tree.add_scale(variables.params, -maml_rate, grads)
    return Variables(params, then.stats), aux.cross_entropy

  return _method(
    model, step, num_batches=1 + (kind == 'mh'), remembers=kind != 'lg'
  )


def _pulled(prox, variables, mean, found, step_size):
  """Returns w_k after the step, and theta."""
  pull = optax.tree.scale(prox.lam, prox.prior.pull(mean, found.params))
  params = jax.tree.map(
    lambda w, p: w - (step_size * p).astype(w.dtype), variables.params, pull
  )
  return Variables(params, found.stats), found.params


def _method(model, step, *, warm=False, num_batches=1, remembers=False):
  """Builds the slot and the local training that both methods share."""

  def init(key, variables):
    del key
    return (), Slot(variables, variables.params if remembers else ())

  def train(inner, objective, view, key):
    del key
    own = view.own
    begin = view.variables.params if warm else own.theta.params
    rule = Rule(begin, functools.partial(step, own.last), num_batches)
    local = inner(objective._replace(rule=rule), view)
    if not jax.tree.leaves(local.memory):
      raise ValueError(
        'pFedMe and pFedBreD need a solver whose steps follow a rule, such as '
        'solvers.local_sgd.'
      )
    sent = local.variables
    new = Slot(
      Variables(local.memory, sent.stats), sent.params if remembers else ()
    )
    own = trees.where(local.num_steps > 0, new, own)
    return local._replace(memory=()), own

  return Method(
    init=init,
    train=train,
    personal=lambda view: {'theta': Personal(model.apply, view.own.theta)},
  )


def _check(model, prox, family):
  if prox.steps < 1 or not (prox.lam > 0 and prox.rate > 0):
    raise ValueError(
      'lam and lr_p must be above 0 and prox_steps at least 1, got '
      f'{prox.lam}, {prox.rate} and {prox.steps}.'
    )
  params = jax.eval_shape(model.init, jax.random.key(0)).params
  most = 1.0 if family == 'spherical' else max(precisions(params))
  if prox.rate * prox.lam * most > 2:
    factor = '' if family == 'spherical' else f' * {most:.3g} (its largest p_l)'
    raise ValueError(
      f'lr_p * lam{factor} must be at most 2, or the steps of the personal '
      f'model diverge, got {prox.rate} * {prox.lam}.'
    )
