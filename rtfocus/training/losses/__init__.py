"""Losses: what a network is told to be better at."""
