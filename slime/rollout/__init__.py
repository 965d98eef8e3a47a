"""Prompts to rewarded batches: generation, rewards, filters, evaluation."""
