"""Restore: what every device knows of restorations, and the names of the classical."""

WHOLE_FRAME = ("wiener", "richardson_lucy", "richardson_lucy_accelerated")
"""Deconvolutions of whole frames, level by level."""

PATCH_BY_PATCH = "richardson_lucy_tiles"
"""LB-DVD as published (He 2020)."""

METHODS = (*WHOLE_FRAME, PATCH_BY_PATCH)
"""Restorations built in; any other name but ``none`` is an engine's."""

LEARNED_WIENER = "builtin:learned_wiener"
"""Implementation of engines that predict the strength of a Wiener filter."""
