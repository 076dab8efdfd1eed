"""Batch: many images by many processes, on one machine or a cluster, resumable."""
