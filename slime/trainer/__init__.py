"""The Megatron trainer: one Ray actor a device, driven through `TrainerGroup`."""
