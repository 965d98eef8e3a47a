"""The `slime` command: one file a sub-command."""
