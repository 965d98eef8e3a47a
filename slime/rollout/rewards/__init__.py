"""Rewards: what an answer is worth, judged where a crash or a hang costs one sample and not the run."""
