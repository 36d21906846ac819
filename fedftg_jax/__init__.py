"""A vectorised federated-learning simulator, built around FedFTG."""

from etils import epy

__version__ = '0.1.0'

with epy.lazy_api_imports(globals()):  # each is imported when first used
  from fedftg_jax import federation, models, recipes, solvers
  from fedftg_jax.base import (
    Batch,
    Cohort,
    Data,
    Federation,
    Generator,
    Info,
    Local,
    Method,
    Model,
    Objective,
    Output,
    Received,
    Sent,
    State,
    Variables,
    View,
    chain,
  )
  from fedftg_jax.evaluation import evaluate
  from fedftg_jax.federation import over_seeds, run
  from fedftg_jax.methods.fed_align import fed_align
  from fedftg_jax.methods.fed_avg import fed_avg
  from fedftg_jax.methods.fed_df import fed_df, fed_df_public
  from fedftg_jax.methods.fed_dm import fed_dm
  from fedftg_jax.methods.fed_dyn import fed_dyn
  from fedftg_jax.methods.fed_ftg import fed_ftg
  from fedftg_jax.methods.fed_gen import fed_gen
  from fedftg_jax.methods.fed_lsd import fed_lsd
  from fedftg_jax.methods.fed_mr import fed_mr
  from fedftg_jax.methods.fed_nova import fed_nova
  from fedftg_jax.methods.fed_ntd import fed_ntd
  from fedftg_jax.methods.fed_prox import fed_prox
  from fedftg_jax.methods.fed_zda import fed_zdac, fed_zdas
  from fedftg_jax.methods.moon import moon
  from fedftg_jax.methods.q_fed_avg import q_fed_avg
  from fedftg_jax.methods.remembering import remembering
  from fedftg_jax.methods.running_average import running_average
  from fedftg_jax.methods.scaffold import scaffold
  from fedftg_jax.runs import callbacks
  from fedftg_jax.simulation import compare, load_run, simulate
