"""The formats that checkpoints are in, each read as bytes, and told by them."""
