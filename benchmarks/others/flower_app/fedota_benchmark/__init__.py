"""A Flower app that exchanges weights and trains nothing."""
