"""Integrations: thin adapters to training frameworks, loggers and pytest, each imported by its own name.

``from batchnorm.integrations.lightning import BatchNormMonitor``. No other module imports them, and each only calls
``watch``, ``freeze``, ``recalibrate`` or ``examine`` at the right moments of its framework.
"""
