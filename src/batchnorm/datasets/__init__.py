"""Statistics of data sets: tables, arrays and images in files, on one machine or on an engine's workers.

``sources`` cuts files into pieces and reads them, ``measuring`` computes the statistics of a piece, ``engines`` do so
for all pieces, and ``DataStatistics`` is the result. The room does not need torch.
"""
