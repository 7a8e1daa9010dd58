"""The lecture's claims, each an experiment in a module of its own."""
