"""One file a family; each states its FAMILY, and `slime.models.registry` finds it by its model_type."""
