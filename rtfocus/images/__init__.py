"""Images: reads and writes image files, one form for all formats."""
