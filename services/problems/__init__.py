"""The problems service."""
