"""The lecture's claims, one module with an experiment for each claim."""
