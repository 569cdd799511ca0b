"""The platform's services: each owns its facts and speaks with the others only by events."""
