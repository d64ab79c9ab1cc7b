"""Training: recipes, the loop, run directories."""

from residrop.common.errors import Interrupted as Interrupted
from residrop.common.extras import extra

with extra("train"):
    from residrop.training.callbacks import Callback as Callback
    from residrop.training.checkpoint import LoadedRun as LoadedRun
    from residrop.training.checkpoint import Run as Run
    from residrop.training.checkpoint import load_run as load_run
    from residrop.training.presets import PRESETS as PRESETS
    from residrop.training.presets import preset as preset
    from residrop.training.recipe import Recipe as Recipe
    from residrop.training.run import Outcome as Outcome
    from residrop.training.run import train as train
