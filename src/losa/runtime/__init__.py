"""Running sparse models fast: the packed format, its kernels, and the doors through which transformers opens it."""
