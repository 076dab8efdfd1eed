"""Networks: torch modules only, one file per network; no data, no training."""
