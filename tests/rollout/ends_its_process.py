"""A module of reward functions that cannot be imported: it takes its process with it."""

import os

os._exit(9)
