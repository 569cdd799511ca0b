"""What every process of the platform stands on: the log, the bus, projections, the service scaffold."""
