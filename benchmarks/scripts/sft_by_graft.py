"""The same run as ``graft train`` makes it: ``sft_by_graft.py RECIPE.yaml``."""

import sys

from clock import Clock

from graftkit.recipes.recipe import read_recipe
from graftkit.training.run import train

(recipe,) = sys.argv[1:]
clock = Clock()
train(read_recipe(recipe), callbacks=[clock])
clock.tell()
