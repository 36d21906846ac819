"""Workloads to time: plain FedAvg rounds, and the FedFTG server step."""

from typing import NamedTuple

import numpy as np


class Workload(NamedTuple):
  """The work of one round; the same for every contestant.

  Attributes:
    help: description.
    model: 'small_cnn', 'fedavg_cnn', 'niid_cnn', 'mlp' or 'resnet18'.
    image_shape: (height, width, channels).
    cohort: number of clients in the round; of teachers in the server step.
    num_examples: number of examples of each client.
    batch_size: examples per local step, or generated images per server step.
    gflop: multiplications and additions of a round, in 10^9, of convolutions
      without shortcuts and of dense layers, forward and backward, without the
      gradient of the images, which nothing needs; None if not counted.
    iterations: iterations of the server step; 0 for local training.
    server_step: FedFTG's preset of the server step.
    bfloat16: whether layers compute in bfloat16, with float32 weights, instead
      of float32 with the fast matrix products of the device.
  """

  help: str
  model: str
  image_shape: tuple[int, int, int]
  cohort: int
  num_examples: int
  batch_size: int
  gflop: float | None = None
  iterations: int = 0
  server_step: str = 'official'
  bfloat16: bool = False


NUM_CLASSES = 10
LEARNING_RATE = 0.05
STUDENT_STEPS = 5  # in an iteration of the server step
GENERATOR_WIDTH = 64  # as in FedFTG's official code
NOISE_DIM = 100

WORKLOADS = {
  'W1': Workload(
    '50 clients x 50 images 32x32x3, batch 10, small CNN',
    'small_cnn',
    (32, 32, 3),
    50,
    50,
    10,
    249,
  ),
  'W2': Workload(
    '10 clients x 500 images 32x32x3, batch 50, FedAvg CNN',
    'fedavg_cnn',
    (32, 32, 3),
    10,
    500,
    50,
    934,
  ),
  'W3': Workload(
    '100 clients x 60 examples of 784, batch 20, MLP 200-200',
    'mlp',
    (28, 28, 1),
    100,
    60,
    20,
    5.3,
  ),
  'W4': Workload(
    'FedFTG server step, 10 FedAvg CNN teachers, batch 50, 10 x '
    '(10 generator + 5 student steps)',
    'fedavg_cnn',
    (32, 32, 3),
    10,
    0,
    50,
    5681,
    10,
  ),
  'W5': Workload(
    '10 clients x 500 images 32x32x3, batch 50, ResNet-18',
    'resnet18',
    (32, 32, 3),
    10,
    500,
    50,
    1086,
  ),
  'W6': Workload(
    '10 clients x 640 images 28x28x1, batch 64, LeNet of 6 and 16 channels',
    'niid_cnn',
    (28, 28, 1),
    10,
    640,
    64,
    9.7,
  ),
  'W7': Workload(
    'FedFTG server step of the preset robust, 10 ResNet-18 teachers on images '
    '32x32x3, batch 10, 10 x (2 generator + 5 student steps)',
    'resnet18',
    (32, 32, 3),
    10,
    0,
    10,
    iterations=10,
    server_step='robust',
  ),
  # Not measurements, only checks that all start.
  'W0': Workload(
    'a check that all start: 2 clients x 4 examples, batch 2, MLP 200-200',
    'mlp',
    (28, 28, 1),
    2,
    4,
    2,
  ),
  'W0_cnn': Workload(
    'the same with a LeNet of 6 and 16 channels',
    'niid_cnn',
    (28, 28, 1),
    2,
    4,
    2,
  ),
  'W0_norm': Workload(
    'the same with a ResNet-18 on images 8x8x3', 'resnet18', (8, 8, 3), 2, 4, 2
  ),
  'W0_server': Workload(
    'the same with a FedFTG server step of one iteration',
    'mlp',
    (28, 28, 1),
    2,
    0,
    2,
    iterations=1,
  ),
  'W0_robust': Workload(
    'the same with the server step of the preset robust',
    'mlp',
    (28, 28, 1),
    2,
    0,
    2,
    iterations=1,
    server_step='robust',
  ),
}


def examples(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
  """Draws images [clients, examples, H, W, channels] float32, and labels."""
  rng = np.random.default_rng(0)
  shape = workload.cohort, workload.num_examples
  x = rng.standard_normal((*shape, *workload.image_shape), np.float32)
  return x, rng.integers(NUM_CLASSES, size=shape).astype(np.int32)
