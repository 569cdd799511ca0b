"""The one door for people."""
