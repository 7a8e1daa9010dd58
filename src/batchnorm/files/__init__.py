"""Files that are written as a whole or not at all, files beside a checkpoint, locks, and TOML files of constants."""
