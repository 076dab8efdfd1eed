"""GPU: networks and frames on the device, with nothing of it in the base install."""
