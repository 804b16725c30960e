"""What the smaller commands do, a file each, without a word of the terminal; the larger ones have rooms of their own."""
