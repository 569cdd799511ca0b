"""What operators do from a terminal: look at the log, and at what is derived from it; through the gateway alone."""
