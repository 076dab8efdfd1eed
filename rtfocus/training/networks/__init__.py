"""Networks: one file each, with the network, what it learns and its recipe."""
