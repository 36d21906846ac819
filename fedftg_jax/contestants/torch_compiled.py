"""PyTorch training without a federation, as fast as its compiler makes it.

As `torch_central`, with `torch.compile`, which on a GPU also chooses kernels by
trying. The CUDA graph there is that of the whole step.
"""

import functools

import torch

from fedftg_jax.contestants import torch_central

PACKAGES = ('torch',)


def prepare(workload):
  on_gpu = torch.cuda.is_available()
  mode = 'max-autotune-no-cudagraphs' if on_gpu else 'default'
  return torch_central.prepare(
    workload, functools.partial(torch.compile, mode=mode)
  )
