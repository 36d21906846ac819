"""FedDM: clients send a few images that represent their data, and no model.

Xiong, Wang, Cheng, Yu and Hsieh, FedDM: Iterative Distribution Matching for
Communication-Efficient Federated Learning, CVPR 2023, arXiv:2207.09653. There
is no official code; this follows a public re-implementation that quotes Eq. 8
(m13891290332/fedDM, commit 138ef55). Client k learns images S_c for each class
c that it has. In each iteration the received model w is moved to a random point
nearby, w' = w + xi min(1, rho / ||xi||) with xi ~ N(0, I), and SGD on the
pixels minimises

  L = sum_c ||mean h(X_c) - mean h(S_c)||^2 + ||mean z(X_c) - mean z(S_c)||^2

with X_c a batch of the client's images of the class, h the features before the
last layer and z the logits, at w' and in evaluation mode. Images start as
images of the client, or as noise. The server trains its model further, by
cross-entropy, on the union of the images that arrive.

Deviations from that code: a batch of real images is drawn with replacement (in
that code only if a class has too few). The default learning rate of the pixels
is 0.1; at 1, which that code has, lenet was not finite in round 3.

Privacy: with `init='real'` an image starts as one of the client's images, and
it is sent. If a client has no more than `ipc` examples of a class, what it
sends is nearly these examples. No differentially private form is offered: the
gradient of a pixel depends on means over real features, so clipping it does not
bound the share of a single example; there is no accounting for batches drawn
with replacement; and a hundred iterations in each round on a class of a few
images leave no useful epsilon.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation, losses, models, solvers
from fedftg_jax.base import (
  NO_LIMIT,
  Data,
  Info,
  Local,
  LossAux,
  Method,
  Model,
  Objective,
  PyTree,
  Variables,
  View,
)
from fedftg_jax.data import clients

Begin = Literal['real', 'noise']


class Images(NamedTuple):
  """The images that a client sends."""

  x: jax.Array  # [C, ipc, H, W, channels], 0 for classes that it does not have
  owned: jax.Array  # [C] bool, True for classes that it has


def fed_dm(
  model: Model,
  num_classes: int,
  image_shape: tuple[int, ...],
  *,
  ipc: int = 5,
  iterations: int = 100,
  real_batch: int = 20,
  image_lr: float = 0.1,
  image_momentum: float = 0.5,
  rho: float = 5.0,
  init: Begin = 'real',
  server_epochs: int = 100,
  server_batch_size: int = 50,
  server_lr: float = 0.01,
  server_momentum: float = 0.9,
  server_weight_decay: float = 5e-4,
) -> Method:
  """Builds FedDM, distribution matching; it aggregates.

  Args:
    model: the classifier.
    num_classes: C.
    image_shape: (height, width, channels).
    ipc: images per class that a client sends (10 in the re-implementation).
    iterations: steps on the pixels in a round (1,000 there); a straggler takes
      at most as many as it has local steps.
    real_batch: the client's own images of each class in such a step (256
      there).
    image_lr: learning rate of the pixels (1 in the re-implementation).
    image_momentum: momentum of SGD on the pixels.
    rho: radius of the ball around the model; 0 for the model itself.
    init: whether images start as real images of the client, or as noise.
    server_epochs: epochs of the server on all images of a round (500 there).
    server_batch_size: images in a step of the server (256 there).
    server_lr: learning rate of the server.
    server_momentum: momentum of the server's SGD.
    server_weight_decay: weight decay of the server's SGD.

  Returns:
    The method. It replaces local training; its message is the images. Its
    server slot is some of them, for pictures. Metrics are 'fed_dm/matching',
    the mean of L over the iterations and the clients, 'fed_dm/images', the
    number that arrived, and 'fed_dm/server_loss'; 'train_loss' is the
    cross-entropy of the received model on the clients' data.

  Raises:
    ValueError: for a value out of range, or a model that cannot normalise
      images.
  """
  normalise = models.need(model, 'normalise', 'fed_dm')
  distillation.check_least(
    ipc=(ipc, 1),
    iterations=(iterations, 1),
    real_batch=(real_batch, 1),
    image_momentum=(image_momentum, 0),
    rho=(rho, 0),
    server_epochs=(server_epochs, 1),
    server_batch_size=(server_batch_size, 1),
    server_momentum=(server_momentum, 0),
  )
  if init not in get_args(Begin):
    raise ValueError(f'init must be one of {get_args(Begin)}, got {init!r}.')
  server = solvers.local_sgd(
    server_lr,
    batch_size=server_batch_size,
    epochs=server_epochs,
    weight_decay=server_weight_decay,
    optimizer=optax.trace(server_momentum)
    if server_momentum
    else optax.identity(),
  )

  def train(inner, objective, view, key):
    del inner, objective
    key_start, key_steps = jax.random.split(key)
    rows, counts = by_class(view.data, num_classes)
    owned = counts > 0
    num_steps = jnp.minimum(iterations, view.num_steps)

    def real_images(which):  # [C, n] places in the classes
      first = jnp.cumsum(counts) - counts
      places = first[:, None] + which % jnp.maximum(counts, 1)[:, None]
      return normalise(view.data.x[rows[jnp.minimum(places, len(rows) - 1)]])

    def step(i, carry):
      x, velocity, total = carry
      key_model, key_real = jax.random.split(jax.random.fold_in(key_steps, i))
      near = view.variables._replace(
        params=perturbed(key_model, view.variables.params, rho)
      )
      draw = jax.random.uniform(key_real, (num_classes, real_batch))
      which = jnp.floor(draw * counts[:, None]).astype(jnp.int32)
      real = real_images(which)
      value, gradient = jax.value_and_grad(
        lambda x: matching_loss(model, near, real, x, owned)
      )(x)
      velocity = image_momentum * velocity + gradient
      return x - image_lr * velocity, velocity, total + value

    if init == 'real':
      offset = jax.random.randint(key_start, (num_classes, 1), 0, NO_LIMIT // 2)
      start = real_images(offset + jnp.arange(ipc))
      start = start.astype(jnp.result_type(float))
    else:
      start = jax.random.normal(key_start, (num_classes, ipc, *image_shape))
    zero = jnp.zeros((), start.dtype)
    x, _, total = jax.lax.fori_loop(
      0, num_steps, step, (start, jnp.zeros_like(start), zero)
    )
    # A straggler without a step has only the initial images, and sends none.
    owned &= num_steps > 0
    x = jnp.where(owned.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    metrics = {
      'train_loss': _cross_entropy(model, view),
      'fed_dm/matching': total / jnp.maximum(num_steps, 1),
    }
    local = Local(
      view.variables,
      num_steps,
      jnp.asarray(image_lr),
      metrics,
      optimizer_state=view.optimizer_state,
    )
    return local, Images(x, owned)

  def message_bits(message):
    of_class = 8 * message.x[0].size * message.x.dtype.itemsize
    return of_class * jnp.sum(message.owned) + num_classes

  def update(variables, shared, received, key):
    x, owned = received.stacked
    owned &= received.arrived[:, None]
    valid = jnp.repeat(owned.reshape(-1), ipc)
    x = x.reshape(-1, *image_shape)
    y = jnp.tile(jnp.repeat(jnp.arange(num_classes), ipc), len(owned))
    union = Data(
      x,
      y,
      jnp.argsort(~valid).astype(jnp.int32),
      jnp.sum(valid, dtype=jnp.int32),
    )
    local = server(
      Objective(_loss(model), jnp.zeros(())),
      _server_view(variables, union, received.round),
      key,
    )
    metrics = {
      'fed_dm/images': union.count,
      'fed_dm/server_loss': local.metrics['train_loss'],
    }
    shared = distillation.keep_images(shared, x, y, valid)
    return local.variables, shared, Info(metrics)

  return Method(
    init=lambda key, variables: (
      distillation.no_images(num_classes, image_shape),
      (),
    ),
    train=train,
    # The slot that `train` returns is the message; nothing is kept.
    upload=lambda view, local, objective, key: ((), view.own),
    message_bits=message_bits,
    stacked=lambda sent: sent.message,
    update=update,
    synthesise=distillation.draw_kept,
    aggregates=True,
    sends_model=False,
  )


def matching_loss(
  model: Model,
  variables: Variables,
  real: jax.Array,
  images: jax.Array,
  owned: jax.Array | None = None,
) -> jax.Array:
  """Sums over classes the distances of mean features and of mean logits.

  This is Eq. 8, with squared distances.

  Args:
    model: the classifier, in evaluation mode.
    variables: its variables, such as those with `perturbed` parameters.
    real: [C, R, H, W, channels] images of each class, in the model's space; no
      gradient is taken of them.
    images: [C, I, H, W, channels] the images that should match them.
    owned: [C] False for classes that do not count; None if all count.

  Returns:
    A scalar.
  """

  def means(variables, x):
    output = model.apply(variables, x.reshape(-1, *x.shape[2:]))
    return [
      jnp.mean(a.reshape(*x.shape[:2], -1), axis=1)
      for a in (output.features, output.logits)
    ]

  targets = losses.frozen(lambda variables: means(variables, real), variables)
  distance = sum(
    jnp.sum((mean - target) ** 2, axis=-1)
    for mean, target in zip(means(variables, images), targets)
  )
  return jnp.sum(distance if owned is None else jnp.where(owned, distance, 0))


def perturbed(key: jax.Array, params: PyTree, rho: float) -> PyTree:
  """Moves parameters by xi min(1, rho / ||xi||), with xi ~ N(0, I)."""
  xi = optax.tree.random_like(key, params, jax.random.normal)
  scale = jnp.minimum(1, rho / optax.tree.norm(xi))
  return jax.tree.map(lambda p, d: p + scale.astype(p.dtype) * d, params, xi)


def by_class(data: Data, num_classes: int) -> tuple[jax.Array, jax.Array]:
  """Sorts one client's examples by class.

  Args:
    data: one client's data.
    num_classes: C.

  Returns:
    Rows of `data.x`, those of class 0 first and padding last; and the number of
    examples of each class, [C].
  """
  valid = jnp.arange(len(data.index)) < data.count
  order = jnp.argsort(jnp.where(valid, data.y[data.index], num_classes))
  return data.index[order], clients.label_counts(data, num_classes)


def _cross_entropy(model, view):
  """Computes the received model's cross-entropy on the client's data."""

  def of_batch(batch):
    def mean(variables):
      logits = model.apply(variables, batch.x, mask=batch.mask).logits
      return losses.cross_entropy(logits, batch.y, batch.mask)

    return losses.frozen(mean, view.variables)

  return clients.mean_over_examples(of_batch, view.data, 50)


def _loss(model):
  """Makes the server's loss: cross-entropy on labelled images."""

  def loss(variables, batch, key):
    del key
    output = model.apply(variables, batch.x, mask=batch.mask, train=True)
    value = losses.cross_entropy(output.logits, batch.y, batch.mask)
    return value, LossAux(output.stats, value, output.logits)

  return loss


def _server_view(variables, data, round_) -> View:
  """Builds the view for a solver on the server, which trains as a client."""
  return View(
    variables,
    variables,
    shared=(),
    common=(),
    own=(),
    data=data,
    client_id=jnp.int32(0),
    share=jnp.ones(()),
    round=round_,
    num_steps=jnp.int32(NO_LIMIT),
  )
