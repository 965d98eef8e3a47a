"""Recipes that come with slime: `base` and short differences to it. A user's own lie in the folder of --config-dir."""
