"""Files that are written as a whole or not at all, and files beside a checkpoint."""
