"""Files that are written whole or not at all, and files beside a checkpoint."""
