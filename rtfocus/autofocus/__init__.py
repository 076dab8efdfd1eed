"""Autofocus: from images to z moves, decided by pure functions within limits."""
