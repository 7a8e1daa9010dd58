"""Measurements of a model for the doctor, with data or without."""
