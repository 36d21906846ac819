"""Fed-ZDAC and Fed-ZDAS: zero-shot data augmentation at clients or the server.

Hao, El-Khamy, Lee, Zhang, Liang, Chen and Carin, Towards Fair Federated
Learning with Zero-Shot Data Augmentation, CVPR Workshops 2021,
arXiv:2104.13417. Images that are made from a model alone augment the training
data. No code was found, and the full text could not be read. The aim (more
accuracy for rare data, and less variance between clients) and the two forms, at
the clients and at the server, are from the abstract; the rest is our own
specification.

An image starts as noise, x ~ N(0, I), and Adam on its pixels minimises

  J = CE(f(x), y) + lam sum_l gap(batch's moments, running statistics)

over the BatchNorms l of a frozen model f in evaluation mode. The gap is

  l2  sum ((mu - m)^2 + (sd - s)^2)
  kl  sum (log(s / sd) + (sd^2 + (mu - m)^2) / (2 s^2) - 1 / 2), which is
      KL(N(mu, sd) || N(m, s)),

both over the channels. (`bn_term='none'`, without the gap, is a variant that
works with any model: cross-entropy alone, whose images look like noise.)

`fed_zdac`: all clients hold the same model, so one pool of images serves all
clients; it is made once a round and not sent. A client with n examples, to
which r images are to be added (see `label_plan`), minimises

  (n CE(real) + r CE(pool)) / (n + r),

where the second mean is over a batch of its own in each step, with labels drawn
according to the plan. BatchNorm normalises the two batches separately, and its
running statistics are those of the real one.

`fed_zdas`: the server makes images from each client's model, of the classes
that the client holds, and trains the mean further on all of them. Clients send
their class counts with the model.

Privacy: `fed_zdas` tells the server every client's class counts.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses, trees
from fedftg_jax.base import Info, Method, Model, PyTree, Variables
from fedftg_jax.data import clients

BnTerm = Literal['l2', 'kl', 'none']
Target = Literal['missing', 'mean', 'max']
Source = Literal['clients', 'mean']
_LEAST_VARIANCE = 1e-5  # the epsilon of BatchNorm
_OF_IMAGES = 2**31 - 3  # folded into the key of a step; no part has this number


def fed_zdac(
  model: Model,
  num_classes: int,
  image_shape: tuple[int, ...],
  *,
  per_class: int = 10,
  target: Target = 'missing',
  ratio: float = 1.0,
  shared_pool: bool = True,
  syn_batch_size: int = 20,
  steps: int = 200,
  lr: float = 0.1,
  lam: float = 1.0,
  bn_term: BnTerm = 'l2',
  first_round: int = 1,
) -> Method:
  """Builds Fed-ZDAC: zero-shot images at the clients.

  Args:
    model: the classifier.
    num_classes: C.
    image_shape: (height, width, channels).
    per_class: number of images of each class in the pool; 0 for none, which is
      FedAvg.
    target: how many images of a class are added: 'missing', per_class for a
      class without examples; 'mean' or 'max', so many that the class has as
      many examples as the client has per class on average or at most.
    ratio: largest number of images added to a client's data, relative to the
      number of its examples.
    shared_pool: whether all clients use one pool, made from the broadcast
      model; otherwise each client makes a pool from the model that it received,
      of the classes that it needs, which multiplies the cost by the cohort's
      size.
    syn_batch_size: images in each local step.
    steps: Adam steps on the pixels; 0 for no images.
    lr: learning rate of Adam on the pixels.
    lam: weight of the gap between statistics.
    bn_term: distance by which images match BatchNorm's statistics: l2 or kl; or
      none, a variant for models without BatchNorm.
    first_round: number of rounds before images are first made, since the model
      knows nothing at the beginning.

  Returns:
    The method. Its server slot is some of the pool, for pictures. Info has
    'fed_zdac/cross_entropy' of the pool and, except with `bn_term='none'`,
    'fed_zdac/gap', if the pool is shared.

  Raises:
    ValueError: for a value out of range, or for a model without BatchNorm if
      its statistics are to be matched.
  """
  _check('fed_zdac', model, image_shape, bn_term, steps, lam, first_round)
  distillation.check_least(
    per_class=(per_class, 0),
    ratio=(ratio, 0),
    syn_batch_size=(syn_batch_size, 1),
  )
  if target not in get_args(Target):
    raise ValueError(
      f'target must be one of {get_args(Target)}, got {target!r}.'
    )
  if not per_class or not ratio or not steps:
    return Method()
  labels = jnp.repeat(jnp.arange(num_classes), per_class)
  make = functools.partial(
    zero_shot_images,
    model,
    image_shape=image_shape,
    lr=lr,
    lam=lam,
    bn_term=bn_term,
  )

  def make_pool(variables, round_, key, mask=None):
    num_steps = jnp.where(round_ >= first_round, steps, 0)
    return make(variables, labels, key, mask=mask, steps=num_steps)

  def train(inner, objective, view, key):
    counts = clients.label_counts(view.data, num_classes)
    added = label_plan(counts, target, per_class, ratio)
    added = jnp.where(view.round >= first_round, added, 0)
    if shared_pool:
      images, _ = view.common
    else:
      wanted = added[labels] > 0
      images, _ = make_pool(view.received, view.round, key, wanted)
    num = jnp.sum(added)
    share = num / jnp.maximum(view.data.count + num, 1)

    def loss(variables, batch, key):
      value, aux = objective.loss(variables, batch, key)
      key_y, key_x = jax.random.split(jax.random.fold_in(key, _OF_IMAGES))
      y = distillation.iid_labels(key_y, added, syn_batch_size)
      which = jax.random.randint(key_x, y.shape, 0, per_class)
      x = images[y * per_class + which]
      logits = model.apply(variables, x, train=True).logits
      more = losses.cross_entropy(logits, y) - aux.cross_entropy
      return value + share * more, aux

    return inner(objective._replace(loss=loss), view), view.own

  method = Method(train=train)
  if not shared_pool:
    return method

  def update(variables, shared, received, key):
    del key
    images, terms = received.common
    active = received.round >= first_round
    valid = jnp.broadcast_to(active, labels.shape)
    shared = distillation.keep_images(shared, images, labels, valid)
    return variables, shared, Info(_named('fed_zdac', terms, active))

  return method._replace(
    init=lambda key, variables: (
      distillation.no_images(num_classes, image_shape),
      (),
    ),
    common=lambda variables, shared, round_, key: make_pool(
      variables, round_, key
    ),
    update=update,
    synthesise=distillation.draw_kept,
  )


def fed_zdas(
  model: Model,
  num_classes: int,
  image_shape: tuple[int, ...],
  *,
  images: int = 50,
  source: Source = 'clients',
  tune_steps: int = 50,
  tune_lr: float = 0.01,
  tune_batch_size: int = 50,
  tune_clip: float = 3.0,
  steps: int = 200,
  lr: float = 0.1,
  lam: float = 1.0,
  bn_term: BnTerm = 'l2',
  first_round: int = 1,
) -> Method:
  """Builds Fed-ZDAS: zero-shot images at the server; it refines the mean.

  The mean is trained further with its running statistics, which do not change.

  Args:
    model: the classifier.
    num_classes: C.
    image_shape: (height, width, channels).
    images: number of images made from each client's model, equally many of each
      class that the client holds; 0 for none, which is FedAvg.
    source: the models that images are made from: each client's ('clients'), or
      the mean ('mean'), of all classes equally and as many as for all clients.
    tune_steps: updates of the mean on the images; 0 for none, which is FedAvg.
    tune_lr: learning rate of these updates.
    tune_batch_size: images in each of these updates.
    tune_clip: largest global norm of a gradient in these updates; 0 for no
      bound.
    steps: as in `fed_zdac`.
    lr: as in `fed_zdac`.
    lam: as in `fed_zdac`.
    bn_term: as in `fed_zdac`.
    first_round: as in `fed_zdac`.

  Returns:
    The method. Its server slot is some of the images, for pictures. Info has
    'fed_zdas/cross_entropy', 'fed_zdas/gap' (except with `bn_term='none'`) and
    'fed_zdas/tuning', the mean loss of the updates, and the model 'augmented'.

  Raises:
    ValueError: as in `fed_zdac`.
  """
  _check('fed_zdas', model, image_shape, bn_term, steps, lam, first_round)
  distillation.check_least(
    images=(images, 0),
    tune_steps=(tune_steps, 0),
    tune_batch_size=(tune_batch_size, 1),
    tune_clip=(tune_clip, 0),
  )
  if source not in get_args(Source):
    raise ValueError(
      f'source must be one of {get_args(Source)}, got {source!r}.'
    )
  if not images or not tune_steps or not steps:
    return Method()

  make = functools.partial(
    zero_shot_images,
    model,
    image_shape=image_shape,
    lr=lr,
    lam=lam,
    bn_term=bn_term,
  )

  def of_model(variables, classes, round_, key):
    """Makes images from one model; returns images, labels and terms of J."""
    key_labels, key_images = jax.random.split(key)
    labels = distillation.quota_labels(key_labels, classes, images)
    labels = jnp.minimum(labels, num_classes - 1)  # if it has no classes
    num_steps = jnp.where(round_ >= first_round, steps, 0)
    made, terms = make(variables, labels, key_images, steps=num_steps)
    return made, labels, terms

  def update(variables, shared, received, key):
    num = len(received.arrived)
    key_images, key_tune = jax.random.split(key)
    keys = jax.random.split(key_images, num)
    if source == 'clients':
      models, counts = received.stacked
      of_client = models, (counts > 0).astype(jnp.int32), keys
      one = lambda of: of_model(of[0], of[1], received.round, of[2])
    else:
      classes = jnp.ones(num_classes, jnp.int32)
      of_client = keys
      one = lambda key: of_model(variables, classes, received.round, key)
    made, labels, terms = jax.lax.map(one, of_client)  # [K, R, ...]
    active = received.round >= first_round
    valid = jnp.repeat(received.arrived & active, images)
    made, labels = (a.reshape(-1, *a.shape[2:]) for a in (made, labels))
    tuned, loss = _tune(variables, made, labels, valid, key_tune)
    tuned = trees.where(active, tuned, variables)
    present = distillation.present(received.arrived)
    metrics = {
      **{name: jnp.sum(present * value) for name, value in terms.items()},
      'tuning': loss,
    }
    shared = distillation.keep_images(shared, made, labels, valid)
    info = Info(_named('fed_zdas', metrics, active), {'augmented': tuned})
    return tuned, shared, info

  def _tune(student, made, labels, valid, key):
    order = jnp.argsort(~valid)

    def examples(i):
      draw = jax.random.uniform(jax.random.fold_in(key, i), (tune_batch_size,))
      rows = order[jnp.floor(draw * jnp.sum(valid)).astype(jnp.int32)]
      return made[rows], labels[rows]

    student, values = distillation.distil(
      model,
      student,
      distillation.sgd(tune_lr, clip_norm=tune_clip),
      losses.cross_entropy,
      examples,
      tune_steps,
      forward=distillation.kept_statistics,
    )
    return student, jnp.mean(values)

  method = Method(
    init=lambda key, variables: (
      distillation.no_images(num_classes, image_shape),
      (),
    ),
    update=update,
    synthesise=distillation.draw_kept,
  )
  if source == 'mean':
    return method
  return method._replace(
    upload=distillation.count_labels(num_classes),
    stacked=lambda sent: (sent.model, sent.message),
  )


def label_plan(
  counts: jax.Array, target: Target, per_class: int, ratio: float
) -> jax.Array:
  """Computes how many images of each class are added to a client's data.

  Args:
    counts: [C] the client's number of examples of each class.
    target: see `fed_zdac`.
    per_class: see `fed_zdac`.
    ratio: see `fed_zdac`.

  Returns:
    [C] floats: what each class lacks to the target. If their sum would be more
    than `ratio` times the client's examples, all are scaled down by one factor.
  """
  counts = counts.astype(jnp.result_type(float))
  wanted = {
    'missing': lambda: jnp.where(counts == 0, float(per_class), 0),
    'mean': lambda: jnp.maximum(jnp.mean(counts) - counts, 0),
    'max': lambda: jnp.max(counts) - counts,
  }[target]()
  num, most = jnp.sum(wanted), ratio * jnp.sum(counts)
  return wanted * jnp.where(num > most, most / jnp.where(num > 0, num, 1), 1)


def zero_shot_images(
  model: Model,
  variables: Variables,
  labels: jax.Array,
  key: jax.Array,
  image_shape: tuple[int, ...],
  *,
  mask: jax.Array | None = None,
  steps: jax.Array | int = 200,
  lr: float = 0.1,
  lam: float = 1.0,
  bn_term: BnTerm = 'l2',
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Makes images that a model recognises, from the model alone.

  Args:
    model: the classifier; frozen, in evaluation mode.
    variables: its variables.
    labels: [B] the classes of the images.
    key: draws the noise that they start from.
    image_shape: (height, width, channels).
    mask: [B] False for images that are not needed; None if all are.
    steps: number of Adam steps.
    lr: Adam's learning rate.
    lam: weight of the gap between statistics.
    bn_term: see `fed_zdac`.

  Returns:
    [B, height, width, channels] in the space of the model's float inputs, and
    the terms of J before the last step (0 without a step), by name:
    'cross_entropy' and, except with `bn_term='none'`, 'gap'.
  """
  gap = None if bn_term == 'none' else GAPS[bn_term]

  def objective(x):
    output = model.apply(variables, x, mask=mask)
    terms = {'cross_entropy': losses.cross_entropy(output.logits, labels, mask)}
    total = terms['cross_entropy']
    if gap is not None:
      terms['gap'] = statistics_gap(output.moments, variables.stats, gap)
      total += lam * terms['gap']
    return total, terms

  # With `eps_root` there is a derivative where a pixel's gradient is 0.
  optimizer = optax.adam(lr, eps_root=1e-16)
  start = jax.random.normal(key, (len(labels), *image_shape))
  zero = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(objective, start)[1]
  )

  def step(_, carry):
    x, opt_state, _ = carry
    grads, terms = jax.grad(objective, has_aux=True)(x)
    updates, opt_state = optimizer.update(grads, opt_state, x)
    return optax.apply_updates(x, updates), opt_state, terms

  x, _, terms = jax.lax.fori_loop(
    0, steps, step, (start, optimizer.init(start), zero)
  )
  return x, terms


# Gaps of one BatchNorm: mean and variance of a batch, running ones -> scalar.
def l2_gap(mean, var, kept_mean, kept_var):
  """Sums the squared differences of means and of standard deviations."""
  deviation, kept = (
    jnp.sqrt(jnp.maximum(v, _LEAST_VARIANCE)) for v in (var, kept_var)
  )
  return jnp.sum((mean - kept_mean) ** 2 + (deviation - kept) ** 2)


def kl_gap(mean, var, kept_mean, kept_var):
  """Sums KL(N(batch) || N(running)) over the channels."""
  var, kept = (jnp.maximum(v, _LEAST_VARIANCE) for v in (var, kept_var))
  moved = var + (mean - kept_mean) ** 2
  return jnp.sum(jnp.log(kept / var) + moved / kept - 1) / 2


GAPS: dict[str, Callable] = {'l2': l2_gap, 'kl': kl_gap}


def statistics_gap(moments: PyTree, stats: PyTree, gap: Callable) -> jax.Array:
  """Sums the gaps of all BatchNorms between a batch and running statistics.

  Args:
    moments: see `Output.moments`.
    stats: see `Variables.stats`.
    gap: the gap of one BatchNorm, see `GAPS`.

  Returns:
    A scalar.
  """

  def is_norm(node: Any) -> bool:
    return hasattr(node, 'keys') and node.keys() == {'mean', 'var'}

  of_each = jax.tree.map(
    lambda a, b: gap(a['mean'], a['var'], b['mean'], b['var']),
    moments,
    stats,
    is_leaf=is_norm,
  )
  return jnp.sum(jnp.stack(jax.tree.leaves(of_each)))


def _named(method, metrics, active):
  """Prefixes metrics with the method's name; NaN in rounds without images."""
  return {
    f'{method}/{name}': jnp.where(active, value, jnp.nan)
    for name, value in metrics.items()
  }


def _check(method, model, image_shape, bn_term, steps, lam, first_round):
  distillation.check_least(
    steps=(steps, 0), lam=(lam, 0), first_round=(first_round, 0)
  )
  if bn_term not in get_args(BnTerm):
    raise ValueError(
      f'bn_term must be one of {get_args(BnTerm)}, got {bn_term!r}.'
    )
  if bn_term == 'none':
    return
  variables = jax.eval_shape(model.init, jax.random.key(0))
  output = jax.eval_shape(model.apply, variables, jnp.zeros((1, *image_shape)))
  if not jax.tree.leaves(output.moments):
    raise ValueError(
      f'{method} needs a model with BatchNorm, whose statistics its images '
      "match; use such a model, or bn_term='none'."
    )
