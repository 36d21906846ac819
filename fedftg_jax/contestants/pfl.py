"""Apple's pfl on PyTorch: its simulated backend and federated averaging."""

import itertools

from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
import torch
from torch.nn import functional

from fedftg_jax.contestants import torch as torch_loop
from fedftg_jax.contestants import workloads

PACKAGES = ('pfl', 'torch')


def prepare(workload):
  if workload.iterations:
    raise NotImplementedError('no server step')
  where = torch_loop.device()
  x, y = torch_loop.tensors(workload, where)
  module = torch_loop.MODELS[workload.model]()
  if workload.model != 'mlp':
    module = module.to(memory_format=torch.channels_last)

  def loss(x, y, is_eval=False):
    with torch_loop.autocast(workload, where):
      return functional.cross_entropy(module.train(not is_eval)(x), y)

  module.loss = loss
  module.metrics = lambda x, y, is_eval=True: {}
  model = PyTorchModel(
    module.to(where),
    torch.optim.SGD,
    torch.optim.SGD(module.parameters(), lr=1.0),
  )
  # A Dataset is shuffled once and then keeps its batches.
  users = [Dataset((x[k], y[k])) for k in range(workload.cohort)]
  turn = itertools.cycle(range(workload.cohort))
  dataset = FederatedDataset(users.__getitem__, lambda: next(turn))
  backend = SimulatedBackend(training_data=dataset, val_data=None)
  training = NNTrainHyperParams(
    local_num_epochs=1,
    local_learning_rate=workloads.LEARNING_RATE,
    local_batch_size=workload.batch_size,
  )
  params = NNAlgorithmParams(
    central_num_iterations=1,
    evaluation_frequency=10,
    train_cohort_size=workload.cohort,
    val_cohort_size=0,
  )

  def round_():
    FederatedAveraging().run(
      algorithm_params=params,
      backend=backend,
      model=model,
      model_train_params=training,
      model_eval_params=None,
    )
    torch_loop.finish()

  return round_
