"""Sources: files of a format, cut into pieces, which are read block by block."""
