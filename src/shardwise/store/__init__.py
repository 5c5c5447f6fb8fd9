"""Where model states rest when they are off the training device: host memory, or files on NVMe."""
