"""Engines: networks and built-in methods as folders, found by name."""
