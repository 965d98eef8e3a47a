"""Prompts as a pure function of their ordinal, and the account of what became of them."""
