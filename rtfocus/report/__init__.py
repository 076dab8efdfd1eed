"""Report: a run as one page, ``report.html``, made of its folder alone."""
