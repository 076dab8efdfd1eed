"""CPU: frames through NumPy, Fourier transforms and CPU networks."""
