"""Writers: the run folder, its images, its journal and its repair."""
