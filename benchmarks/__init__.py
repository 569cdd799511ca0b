"""Measures what Fedota's design promises, each figure beside an anchor measured in the same run."""
