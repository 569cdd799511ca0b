"""Other platforms, each in an environment of its own, with the same shapes as ours in the same run."""
