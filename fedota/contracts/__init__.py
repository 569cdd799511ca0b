"""What processes say to each other besides events: commands, reports, and what a launched process is told."""
