"""What organizations run beside their data."""
