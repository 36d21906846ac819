"""Tests of augmentation: plain NumPy, its distribution, inside training."""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import models
from fedftg_jax.data import augment
from tests import problems

KEY = jax.random.key(0)


def plainly(x, draws):
  """Augments image by image, following the specification."""
  out = []
  for image, flip, (down, right) in zip(np.asarray(x), *map(np.asarray, draws)):
    if flip:
      image = np.fliplr(image)
    height, width, channels = image.shape
    canvas = np.zeros((height + 8, width + 8, channels), image.dtype)
    canvas[4 : 4 + height, 4 : 4 + width] = image
    out.append(canvas[down : down + height, right : right + width])
  return np.array(out)


def augmented(key, x):
  """Augments the images of `problems` in the way that the programs do."""
  return augment.flip_crop(key, models.normalise(x, (0.4,), (0.3,)))


AUGMENTED = problems.solver(augment=augmented)


class AugmentTest(parameterized.TestCase):
  def test_as_specified(self):
    x = jax.random.normal(KEY, (64, 10, 7, 3))
    draws = augment.draw(jax.random.key(1), 64)
    want = plainly(x, draws)
    np.testing.assert_array_equal(augment.apply(x, draws), want)
    np.testing.assert_array_equal(augment.flip_crop(jax.random.key(1), x), want)
    self.assertFalse(np.array_equal(want, x))

  def test_no_flip_and_the_middle_is_the_image(self):
    x = jax.random.normal(KEY, (3, 5, 6, 1))
    draws = augment.Draws(jnp.zeros(3, bool), jnp.full((3, 2), 4))
    np.testing.assert_array_equal(augment.apply(x, draws), x)

  def test_by_hand(self):
    x = jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1)  # 1 2 3 / 4 5 6
    for flip, offset, want in (
      (True, (4, 4), [[3, 2, 1], [6, 5, 4]]),
      (False, (5, 3), [[0, 4, 5], [0, 0, 0]]),
      (True, (4, 5), [[2, 1, 0], [5, 4, 0]]),
      (False, (0, 0), [[0, 0, 0], [0, 0, 0]]),
    ):
      draws = augment.Draws(jnp.array([flip]), jnp.array([offset]))
      np.testing.assert_array_equal(augment.apply(x, draws)[0, ..., 0], want)

  def test_distribution(self):
    """Half of the images are mirrored and half shifted, all 81 offsets
    equally."""
    num = 40_000
    flip, offset = map(np.asarray, augment.draw(KEY, num))
    self.assertAlmostEqual(flip.mean(), 0.5, delta=0.01)
    counts = np.zeros((9, 9))
    np.add.at(counts, tuple(offset.T), 1)
    share = counts / num
    self.assertAlmostEqual(share[4, 4], 0.5 + 0.5 / 81, delta=0.01)
    share[4, 4] = 0.5 / 81
    np.testing.assert_allclose(share, 0.5 / 81, atol=0.002)
    # Mirroring and shifting are independent, and so are the two axes.
    moved = (offset != 4).any(1)
    self.assertAlmostEqual(flip[moved].mean(), 0.5, delta=0.015)
    correlation = np.corrcoef(offset[moved].T)[0, 1]
    self.assertAlmostEqual(correlation, 0, delta=0.03)

  def test_padded_with_the_mean_colour(self):
    """The padding is 0 after normalisation, not black."""
    white = np.full((200, 8, 8, 1), 255, np.uint8)
    values = np.unique(augmented(KEY, jnp.asarray(white)))
    np.testing.assert_allclose(values, [0.0, 0.6 / 0.3], rtol=1e-6)

  def test_floats_are_normalised_already(self):
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    np.testing.assert_array_equal(models.normalise(x, (0.4,), (0.3,)), x)


class TrainingTest(absltest.TestCase):
  def after(self, ids, solve, chunk=0):
    fed = problems.make(solve=solve, client_chunk=chunk)
    state, info = fed.round(
      fed.init(KEY), problems.DATA, problems.row(ids), KEY
    )
    return state.variables, info

  def test_training_sees_it(self):
    plain, _ = self.after([0, 4], problems.SOLVER)
    other, _ = self.after([0, 4], AUGMENTED)
    self.assertGreater(
      np.abs(
        plain.params['head']['linear']['kernel']
        - other.params['head']['linear']['kernel']
      ).max(),
      1e-3,
    )

  def test_without_shifts_it_is_normalisation_alone(self):
    """Equals, bit for bit, the model's own normalisation of raw pixels."""
    plain, _ = self.after([0, 1, 4], problems.SOLVER)
    same, _ = self.after(
      [0, 1, 4],
      problems.solver(
        augment=lambda key, x: models.normalise(x, (0.4,), (0.3,))
      ),
    )
    chex.assert_trees_all_equal(plain, same)

  def test_draws_are_the_clients_own(self):
    """They depend neither on other clients in the round nor on stacking."""
    alone = [self.after([k], AUGMENTED)[0] for k in (1, 3)]
    together, _ = self.after([1, 3], AUGMENTED)
    sizes = np.array([problems.SIZES[k] for k in (1, 3)])
    mean = jax.tree.map(
      lambda a, b: (sizes[0] * a + sizes[1] * b) / sizes.sum(), *alone
    )
    chex.assert_trees_all_close(together, mean, atol=1e-6)
    chunked, _ = self.after([1, 3], AUGMENTED, chunk=1)
    chex.assert_trees_all_close(together, chunked, atol=1e-6)

  def test_a_new_draw_in_each_step(self):
    """With one image and one step per epoch, the augmented image changes.

    It remains an augmentation of that image.
    """
    seen = []

    def record(key, x):
      x = augmented(key, x)
      jax.debug.callback(lambda a: seen.append(np.asarray(a[0])), x)
      return x

    self.after([2], problems.solver(augment=record, epochs=30), chunk=1)
    jax.effects_barrier()
    self.assertLen(seen, 30)  # about half of them are shifted
    self.assertGreater(len({a.tobytes() for a in seen}), 8)

  def test_other_draws_stay_as_they_are(self):
    """Augmentation does not change the random draws of orders and penalties."""
    chex.assert_trees_all_equal(
      jax.random.split(KEY, 3)[:2], jax.random.split(KEY)
    )


if __name__ == '__main__':
  absltest.main()
