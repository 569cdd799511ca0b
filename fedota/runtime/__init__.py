"""Coordinator, selector, and what they speak."""
