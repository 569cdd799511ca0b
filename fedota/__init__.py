"""Fedota: organizations train one model together without handing data over."""
