"""Files that are written as a whole or not at all, files beside a checkpoint, and TOML files of constants."""
