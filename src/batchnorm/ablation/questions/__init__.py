"""The questions about the user's model, one module for each question or pair of questions."""
