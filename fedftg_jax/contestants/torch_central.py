"""PyTorch training without a federation, without a compiler.

There is one model, and each batch is as large as the batches of all clients
together. Images are channels-last. On a GPU the whole step (choice of the
batch, forward, backward, update by one kernel) is a CUDA graph, products are in
TF32, and cuDNN chooses its kernels by trying.
"""

import torch
from torch.nn import functional

from fedftg_jax.contestants import torch as torch_loop
from fedftg_jax.contestants import workloads

PACKAGES = ('torch',)


def prepare(workload, compiled=lambda loss: loss):
  if workload.iterations:
    raise NotImplementedError('no server step')
  where = torch_loop.device()
  x, y = (a.flatten(0, 1) for a in torch_loop.tensors(workload, where))
  size = workload.cohort * workload.batch_size
  model = torch_loop.MODELS[workload.model]().to(where)
  if workload.model != 'mlp':
    model = model.to(memory_format=torch.channels_last)
  model.train()
  optimizer = torch.optim.SGD(
    model.parameters(), workloads.LEARNING_RATE, fused=where == 'cuda'
  )

  def loss(x, y):
    with torch_loop.autocast(workload, where):
      return functional.cross_entropy(model(x), y)

  loss = compiled(loss)

  def step(rows):
    optimizer.zero_grad()
    loss(x[rows], y[rows]).backward()
    optimizer.step()

  if where == 'cuda':
    step = recorded(step, torch.arange(size, device=where))

  def round_():
    for rows in torch.randperm(len(y), device=where).split(size):
      step(rows)
    torch_loop.finish()

  return round_


def recorded(step, rows):
  """Records a step as a CUDA graph; all batches have the size of `rows`."""
  side = torch.cuda.Stream()
  side.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(side):
    for _ in range(3):  # kernels are chosen, and compiled if they are to be
      step(rows)
  torch.cuda.current_stream().wait_stream(side)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    step(rows)

  def replay(chosen):
    rows.copy_(chosen)
    graph.replay()

  return replay
