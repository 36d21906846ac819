"""PyTorch with the clients stacked by torch.func.vmap."""

import torch
from torch.nn import functional

from fedftg_jax.contestants import torch as torch_loop
from fedftg_jax.contestants import workloads

PACKAGES = ('torch',)


def prepare(workload):
  if workload.iterations or workload.model == 'resnet18':
    raise NotImplementedError('no server step, no BatchNorm')
  where = torch_loop.device()
  x, y = torch_loop.tensors(workload, where)
  model = torch_loop.MODELS[workload.model]().to(where)
  current = {k: v.detach().clone() for k, v in model.named_parameters()}
  clients = torch.arange(workload.cohort, device=where)[:, None]

  def loss(params, x, y):
    with torch_loop.autocast(workload, where):
      logits = torch.func.functional_call(model, params, (x,))
      return functional.cross_entropy(logits, y)

  gradient = torch.func.vmap(torch.func.grad(loss))

  def round_():
    nonlocal current
    stacked = {
      k: v.expand(workload.cohort, *v.shape).clone() for k, v in current.items()
    }
    order = torch.rand(
      workload.cohort, workload.num_examples, device=where
    ).argsort(1)
    for rows in order.split(workload.batch_size, dim=1):
      grads = gradient(stacked, x[clients, rows], y[clients, rows])
      for name, value in stacked.items():
        value.sub_(grads[name], alpha=workloads.LEARNING_RATE)
    current = {k: v.mean(0) for k, v in stacked.items()}
    torch_loop.finish()

  return round_
