"""Processing: from a frame to its defocus and its restored form, on one machine."""
