"""What the doctor measures on a model, with data or without."""
