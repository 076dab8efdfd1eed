"""Classify: what every device knows of labels, rules and conditions."""
