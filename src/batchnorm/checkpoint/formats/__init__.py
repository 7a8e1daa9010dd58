"""The formats of checkpoints. Each is recognized by its bytes and read as bytes."""
