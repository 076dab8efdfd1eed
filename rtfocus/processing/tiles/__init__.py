"""Tiles: how frames are cut, mirrored, shown to networks and joined again."""
