"""The questions that are asked of the user's model, each in a module of its own."""
