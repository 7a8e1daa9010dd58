"""Integrations: thin adapters to training frameworks, loggers and pytest, each imported from its own module.

For example ``from batchnorm.integrations.lightning import BatchNormMonitor``. No other module of the package imports
them. Each calls ``watch``, ``freeze``, ``recalibrate`` or ``examine`` at the right moments of its framework.
"""
