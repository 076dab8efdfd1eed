"""Runtimes: what runs the file of a network, on a CPU or on a GPU."""
