"""The Megatron trainer: one Ray actor a device, driven through `TrainerGroup`."""

from slime.trainer import uncompiled

uncompiled.install()  # nothing of this room imports megatron-core before
