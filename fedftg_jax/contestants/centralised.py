"""Training without a federation: the same model and number of examples.

There is one set of weights, and each batch is as large as the batches of all
clients together.
"""

from fedftg_jax.contestants import ours

PACKAGES = ('jax',)


def prepare(workload, **options):
  if workload.iterations:
    raise NotImplementedError('no server step')
  return ours.prepare(
    workload._replace(
      cohort=1,
      num_examples=workload.cohort * workload.num_examples,
      batch_size=workload.cohort * workload.batch_size,
    ),
    **options,
  )
