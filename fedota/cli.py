"""The `fedota` command."""
