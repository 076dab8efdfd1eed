"""Transport: frames from the microscope side to the processor over ZeroMQ."""
