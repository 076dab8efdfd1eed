"""Drawing: charts and picture panels, as PNG through Pillow and as SVG in a page."""
