"""Microscope: acquires frames through Micro-Manager and hands them to a sink."""
