"""The rounds service."""
