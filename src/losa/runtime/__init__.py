"""Running sparse models fast: the packed format, its kernels, and what is done with packed models in one process."""
