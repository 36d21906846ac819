"""A vectorised federated-learning simulator, built around FedFTG."""

from etils import epy

__version__ = '0.1.0'

with epy.lazy_api_imports(globals()):  # each when it is first used
  from fedftg_jax import federation
  from fedftg_jax import models
  from fedftg_jax import recipes
  from fedftg_jax import solvers
  from fedftg_jax.base import Batch
  from fedftg_jax.base import chain
  from fedftg_jax.base import Cohort
  from fedftg_jax.base import Data
  from fedftg_jax.base import Federation
  from fedftg_jax.base import Generator
  from fedftg_jax.base import Info
  from fedftg_jax.base import Local
  from fedftg_jax.base import Method
  from fedftg_jax.base import Model
  from fedftg_jax.base import Objective
  from fedftg_jax.base import Output
  from fedftg_jax.base import Received
  from fedftg_jax.base import Sent
  from fedftg_jax.base import State
  from fedftg_jax.base import Variables
  from fedftg_jax.base import View
  from fedftg_jax.evaluation import evaluate
  from fedftg_jax.federation import over_seeds
  from fedftg_jax.federation import run
  from fedftg_jax.methods.fed_avg import fed_avg
  from fedftg_jax.methods.fed_df import fed_df
  from fedftg_jax.methods.fed_df import fed_df_public
  from fedftg_jax.methods.fed_dyn import fed_dyn
  from fedftg_jax.methods.fed_ftg import fed_ftg
  from fedftg_jax.methods.fed_nova import fed_nova
  from fedftg_jax.methods.fed_prox import fed_prox
  from fedftg_jax.methods.moon import moon
  from fedftg_jax.methods.q_fed_avg import q_fed_avg
  from fedftg_jax.methods.remembering import remembering
  from fedftg_jax.methods.scaffold import scaffold
