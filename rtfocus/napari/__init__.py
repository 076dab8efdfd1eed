"""Napari: run folders as layers, a live view, and restoration of any layer.

``napari.yaml`` tells napari what there is; ``pip install "rtfocus[napari]"``.
"""
