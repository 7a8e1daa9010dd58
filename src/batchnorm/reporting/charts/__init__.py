"""Charts: their data, their scales and series, and their drawings."""
