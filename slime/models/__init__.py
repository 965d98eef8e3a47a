"""Hugging Face families -> values for megatron-core and the moves of every tensor. No Megatron import."""
