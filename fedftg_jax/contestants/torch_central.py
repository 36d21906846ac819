"""PyTorch training without a federation, without a compiler.

There is one model, and each batch is as large as the batches of all clients
together. Images are channels-last, and cuDNN chooses its kernels by trying.
"""

import torch
from torch.nn import functional

from fedftg_jax.contestants import torch as torch_loop
from fedftg_jax.contestants import workloads

PACKAGES = ('torch',)


def prepare(workload, compiled=lambda step: step):
  if workload.iterations:
    raise NotImplementedError('no server step')
  where = torch_loop.device()
  x, y = (a.flatten(0, 1) for a in torch_loop.tensors(workload, where))
  model = torch_loop.MODELS[workload.model]().to(where)
  if workload.model != 'mlp':
    model = model.to(memory_format=torch.channels_last)
  model.train()
  optimizer = torch.optim.SGD(model.parameters(), workloads.LEARNING_RATE)

  def loss(x, y):
    with torch_loop.autocast(workload, where):
      return functional.cross_entropy(model(x), y)

  loss = compiled(loss)

  def round_():
    for rows in torch.randperm(len(y), device=where).split(
      workload.cohort * workload.batch_size
    ):
      optimizer.zero_grad()
      loss(x[rows], y[rows]).backward()
      optimizer.step()
    torch_loop.finish()

  return round_
