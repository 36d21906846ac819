"""PyTorch training without a federation, as fast as its compiler makes it.

As `torch_central`, with `torch.compile`, which on a GPU also chooses kernels by
trying and replays CUDA graphs.
"""

import functools

import torch

from fedftg_jax.contestants import torch_central

PACKAGES = ('torch',)


def prepare(workload):
  on_gpu = torch.cuda.is_available()
  return torch_central.prepare(
    workload,
    functools.partial(
      torch.compile, mode='max-autotune' if on_gpu else 'default'
    ),
  )
