"""The version of the package: ``batchnorm.__version__``, for rooms that may not import the package's public names."""

VERSION = "0.1.0"
