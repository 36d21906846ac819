"""The same model and number of examples without a federation: one set of
weights, every batch as large as all clients' batches together."""

from fedftg_jax.contestants import ours

PACKAGES = ('jax',)


def prepare(workload):
  if workload.iterations:
    raise NotImplementedError('no server step')
  return ours.prepare(
    workload._replace(
      cohort=1,
      num_examples=workload.cohort * workload.num_examples,
      batch_size=workload.cohort * workload.batch_size,
    )
  )
